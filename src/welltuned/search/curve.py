"""Held-out loss over ln(alpha · rate): a parabola with what the advice knew beforehand, and what a choice may cost.

Near its lowest point the loss is a parabola in ln(alpha · rate); the published sweep and our own cells look like one
over a factor of four. With z = ln(alpha · rate) - ln(advised), the model of an arm's relative loss is

    y = a + b z + c z^2 / 2        a free, c ~ N(CURVE, CURVE_DOUBT^2), b ~ N(0, (max(c, CURVE) · doubt)^2)

where `doubt` is the advice's own, as a deviation of ln(rate). Measurement errors are those of means over the same
held-out rows, with their covariance, so that what rows differ by among themselves drops out; a point far from the best
has an error of its own besides, since the parabola ends somewhere. All of it is Gaussian, so the posterior is exact;
the lowest point and what a choice costs are read off draws from it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Relative loss per square of ln(rate): 0.11 to 0.27 in ten cells at 135M (M091), 0.015 from 1B to 70B (E025).
CURVE, CURVE_DOUBT = 0.10, 0.10
LEAST_CURVE = 0.01  # a draw that is flatter, or opens downward, counts as this
FAR = 0.3  # share of the parabola's own height that a point may be off by at 4 times the best rate, less nearer by
# Relative: what two runs that differ in nothing that matters differ by. 0.003 % to 1.1 % in bfloat16 (M093), more where
# a loss is near zero; so the least of these at which the points are as near to a parabola as chance has it.
REPEATS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
SHIFT = 0.15  # assumed: deviation of ln(best rate at the end) - ln(best rate now), times sqrt(ln(1 / share of the run))
DRAWS = 4_000
EDGE = math.log(4.0)  # the lowest point is looked for this far beyond the arms, no further


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
        lowest: draws of the lowest point. curves: the curvature of each draw.
        parabolas: draws of a, b and c [draws, 3]; z is 0 at `origin`, and y is relative to `level`.
        share: of the run that the losses were measured after.
    """

    x: float
    x_error: float
    curve: float
    lowest: Array
    curves: Array
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
    best = z_K[int(mean_K.argmin())]
    noise_KK = covariance(loss_KI, weight_I) / level**2
    design_K3 = np.stack([np.ones_like(z_K), z_K, z_K**2 / 2], axis=1)
    for repeat in REPEATS:
        curve = CURVE
        for _ in range(2):  # the second time with the curvature that the first found
            off_K = FAR * curve / 2 * np.abs(z_K - best) ** 3 / EDGE
            before_33 = np.diag([1e-6, (max(curve, CURVE) * prior.doubt) ** -2, CURVE_DOUBT**-2])
            error_KK = noise_KK + np.diag(repeat**2 + off_K**2)
            known = np.linalg.solve(error_KK, design_K3)
            precision_33 = before_33 + design_K3.T @ known
            centre_3 = np.linalg.solve(precision_33, before_33 @ [0.0, 0.0, CURVE] + known.T @ (mean_K / level - 1))
            curve = max(LEAST_CURVE, float(centre_3[2]))
        left_K = mean_K / level - 1 - design_K3 @ centre_3
        if len(points) <= 3 or left_K @ np.linalg.solve(error_KK, left_K) <= len(points) - 2:
            break  # three points are always on a parabola
    draw = np.random.default_rng(0)
    drawn_D3 = draw.multivariate_normal(centre_3, np.linalg.inv(precision_33), size=DRAWS, method="cholesky")
    curves = np.maximum(drawn_D3[:, 2], LEAST_CURVE)
    moved = SHIFT * math.sqrt(math.log(1 / share)) * draw.standard_normal(DRAWS) if share < 1 else 0.0
    lowest = np.clip(-drawn_D3[:, 1] / curves, z_K.min() - EDGE, z_K.max() + EDGE) + moved + prior.x
    middle, low, high = (float(v) for v in np.quantile(lowest, (0.5, 0.16, 0.84)))
    error, typical = (high - low) / 2, float(np.median(curves))
    return Curve(middle, error, typical, lowest, curves, drawn_D3, prior.x, level, share)


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
