"""Held-out loss over ln(alpha · rate): a parabola with what the advice knew beforehand, and what a choice may cost.

Near its lowest point the loss is a parabola in ln(alpha · rate); the published sweep and our own cells look like one
over a factor of four. With z = ln(alpha · rate) - ln(advised), the model of an arm's relative loss is

    y = a + b z + c z^2 / 2        a free, c ~ N(C, (C/2)^2), b ~ N(0, (C · doubt)^2)

where `doubt` is the advice's own, as a deviation of ln(rate). Measurement errors are those of means over the same
held-out rows, with their covariance, so that what rows differ by among themselves drops out; what two equal runs would
differ by; and, for a point far from the best, an error of its own, since the parabola ends somewhere. How steep the
parabola is (C), how far equal runs differ, and whether the advice knew as much as it said are unknown, and three points
cannot tell: each is one of a few, and every combination counts by how well it explains the points (its marginal
likelihood). Given those all is Gaussian; the lowest point and what a choice costs are read off draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Relative loss per square of ln(rate): 0.015 from 1B to 70B (E025), 0.11 to 0.27 in ten cells at 135M (M091), about 1
# where the loss itself is near zero, as on the demo's tickets.
STEEP = (0.015, 0.05, 0.15, 0.5, 1.5)
LEAST_CURVE = 0.01  # a draw that is flatter, or opens downward, counts as this
FAR = 0.3  # share of the parabola's own height that a point may be off by at 4 times the best rate, less nearer by
# Nats: what two runs that differ in nothing that matters differ by at the end. Measured in bfloat16: 0.00002 to 0.008
# (M093), and 0.001 to 0.01 on the demo's tickets, whose loss is a tenth.
REPEATS = (0.0003, 0.001, 0.003, 0.01, 0.03)
# The advice's doubt may be too small itself: a fifth of the weight on three times of it.
DOUBTS = ((1.0, 0.8), (3.0, 0.2))
SHIFT = 0.15  # assumed: deviation of ln(best rate at the end) - ln(best rate now), times sqrt(ln(1 / share of the run))
DRAWS, THIN = 4_000, 8  # draws; every eighth suffices for what a later look is worth
EDGE = math.log(4.0)  # the lowest point is looked for this far beyond the arms, no further
NEWS = np.polynomial.hermite_e.hermegauss(15)  # places and weights by which what a later look may say is averaged


@dataclass(frozen=True, slots=True)
class Point:
    """An arm on the curve: ln(alpha · rate) and the mean loss of each held-out row."""

    x: float
    loss_of_row: Sequence[float]


@dataclass(frozen=True, slots=True)
class Prior:
    """Where the advice expects the lowest point, and the deviation of that in ln(rate)."""

    x: float
    doubt: float


@dataclass(frozen=True, slots=True)
class Curve:
    """What is known of the curve.

    Attributes:
        x, x_error: of the lowest point at the end of the run: ln(alpha · rate).
        curve: relative loss per square of ln(rate).
        lowest: draws of the lowest point. curves, repeats: of each draw, the curvature and what equal runs differ by.
        parabolas: draws of a, b and c [draws, 3]; z is 0 at `origin`, and y is relative to `level`.
        share: of the run that the losses were measured after.
    """

    x: float
    x_error: float
    curve: float
    lowest: Array
    curves: Array
    repeats: Array
    parabolas: Array
    origin: float
    level: float
    share: float

    def losses(self, x_P: Array) -> Array:
        """The held-out loss at these places: the 16th, 50th and 84th percentile of the draws [3, P]."""
        z_P = x_P - self.origin
        drawn_DP = self.parabolas @ np.stack([np.ones_like(z_P), z_P, z_P**2 / 2])
        return self.level * (1 + np.quantile(drawn_DP, (0.16, 0.5, 0.84), axis=0))

    def regret(self, x: float) -> float:
        """The expected loss of choosing x beyond the lowest point's, relative to the loss."""
        return float(np.mean(self.curves * (x - self.lowest) ** 2) / 2)

    @property
    def cheapest(self) -> float:
        """The place that is expected to cost least: steep draws count more, since to be off costs more there."""
        return float(np.average(self.lowest, weights=self.curves))

    def gain(self, chosen: float, others: Sequence[float], share: float, new: float = math.inf) -> float:
        """By how much less the best of all these is expected to cost, chosen after `share` of the run, than `chosen`.

        Until then the lowest point moves; what arms say of that is blurred by what equal runs differ by, which more
        arms do not take away (expected value of sample information; Raiffa and Schlaifer, 1961, chapter 5).

        Args:
            new: the price, as relative loss, at which an arm may begin then wherever the lowest point has come to lie.
        """
        x_A = np.array([chosen, *others])
        curves, repeats = self.curves[::THIN], self.repeats[::THIN]
        moves = SHIFT**2 * math.log(max(share, self.share) / self.share)
        apart = float(((x_A - x_A.mean()) ** 2).sum())
        told = np.zeros_like(curves)
        if moves > 0 and apart > 0:
            told = moves / np.sqrt(moves + repeats**2 / (curves**2 * apart))
        news, odds = NEWS
        then_DN = self.cheapest + told[:, None] * news
        nearest_DN = np.minimum(((x_A - then_DN[:, :, None]) ** 2).min(-1), 2 * new / curves[:, None])
        saved_D = ((chosen - then_DN) ** 2 - nearest_DN) @ (odds / odds.sum())
        return float(np.mean(curves * saved_D) / 2)

    def chance(self, ours: float, theirs: float) -> float:
        """The probability that the lowest point lies nearer to ours than to theirs."""
        return float(np.mean(np.abs(self.lowest - ours) < np.abs(self.lowest - theirs)))


def fit(points: Sequence[Point], weights: Sequence[float], prior: Prior, share: float = 1.0) -> Curve:
    """The curve through these points, with losses measured after `share` of the run.

    Args:
        weights: what each held-out row weighs in the mean.
        share: where below 1, the lowest point may still move until the end.
    """
    loss_KI, weight_I = np.array([p.loss_of_row for p in points]), np.asarray(weights, dtype=np.float64)
    mean_K = loss_KI @ weight_I / weight_I.sum()
    level = float(mean_K.min())
    z_K = np.array([p.x for p in points]) - prior.x
    noise_KK = covariance(loss_KI, weight_I) / level**2
    centre_H3, error_H33, odds_H, repeat_H = _combinations(z_K, mean_K / level - 1, noise_KK, prior.doubt, level)
    draw = np.random.default_rng(0)
    of_D = np.repeat(np.arange(len(odds_H)), draw.multinomial(DRAWS, odds_H))
    root_H33 = np.linalg.cholesky(error_H33)
    drawn_D3 = centre_H3[of_D] + np.einsum("dij,dj->di", root_H33[of_D], draw.standard_normal((DRAWS, 3)))
    repeats = repeat_H[of_D]
    curves = np.maximum(drawn_D3[:, 2], LEAST_CURVE)
    moved = SHIFT * math.sqrt(math.log(1 / share)) * draw.standard_normal(DRAWS) if share < 1 else 0.0
    lowest = np.clip(-drawn_D3[:, 1] / curves, z_K.min() - EDGE, z_K.max() + EDGE) + moved + prior.x
    middle, low, high = (float(v) for v in np.quantile(lowest, (0.5, 0.16, 0.84)))
    error, typical = (high - low) / 2, float(np.median(curves))
    return Curve(middle, error, typical, lowest, curves, repeats, drawn_D3, prior.x, level, share)


def _combinations(
    z_K: Array, y_K: Array, noise_KK: Array, doubt: float, level: float
) -> tuple[Array, Array, Array, Array]:
    """Bayesian linear regression under every combination (Gelman et al., Bayesian Data Analysis, section 14.8).

    Returns:
        of each combination: a, b and c [H, 3], their covariance [H, 3, 3], its weight, and how far equal runs differ.
    """
    design_K3 = np.stack([np.ones_like(z_K), z_K, z_K**2 / 2], axis=1)
    far_K = FAR / 2 * np.abs(z_K - z_K[int(y_K.argmin())]) ** 3 / EDGE
    steep_H, nats_H, times_H, odds_H = np.array([(c, r, *d) for c, r, d in product(STEEP, REPEATS, DOUBTS)]).T
    repeat_H, nothing_H = nats_H / level, np.zeros_like(steep_H)
    before_H3 = np.stack([nothing_H, nothing_H, steep_H], axis=1)
    deviation_H3 = np.stack([nothing_H + 1.0, steep_H * doubt * times_H, steep_H / 2], axis=1)
    spread_H33 = deviation_H3[:, :, None] ** 2 * np.eye(3)
    own_HK = repeat_H[:, None] ** 2 + (steep_H[:, None] * far_K) ** 2
    seen_HKK = noise_KK + own_HK[:, :, None] * np.eye(len(z_K)) + design_K3 @ spread_H33 @ design_K3.T
    gain_H3K = np.linalg.solve(seen_HKK, design_K3 @ spread_H33).transpose(0, 2, 1)
    off_HK = y_K - before_H3 @ design_K3.T
    centre_H3 = before_H3 + np.einsum("hik,hk->hi", gain_H3K, off_HK)
    error_H33 = spread_H33 - gain_H3K @ design_K3 @ spread_H33
    misfit_H = np.einsum("hk,hk->h", off_HK, np.linalg.solve(seen_HKK, off_HK[:, :, None])[:, :, 0])
    fits_H = np.log(odds_H) - (misfit_H + np.linalg.slogdet(seen_HKK)[1]) / 2
    weight_H = np.exp(fits_H - fits_H.max())
    return centre_H3, (error_H33 + error_H33.transpose(0, 2, 1)) / 2, weight_H / weight_H.sum(), repeat_H


def covariance(loss_KI: Array, weight_I: Array) -> Array:
    """Of the arms' mean losses over the same rows, less what they have in common [K, K].

    The means are ratios of sums over rows (Cochran, Sampling Techniques, 1977, section 6.4).
    """
    k, n = loss_KI.shape
    if n < 2:
        return np.eye(k)
    share_I = weight_I / weight_I.sum()
    gap_KI = loss_KI - loss_KI.mean(0)
    rest_KI = (gap_KI - (gap_KI @ share_I)[:, None]) * share_I
    return rest_KI @ rest_KI.T * n / (n - 1)
