"""Paired, prior-centred successive halving: who goes on, who is dropped and why, where else to look, when to stop.

Pure functions of recorded held-out losses. At a rung every arm is judged on the same rows with the running average of
its weights, so that a high rate which has not decayed yet is not punished for its noise. An arm is dropped only if it
is worse than the best by more than two paired standard errors and its slope cannot catch up by the end. Of what else
can be done (stop, go on with all that are left, add an arm) that is done which is worth most: the loss that it is
expected to save, less a price for the training. At the last rung what is judged are the weights themselves.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

import numpy as np

from welltuned.search.curve import Curve, Point, Prior, fit
from welltuned.training.monitor.robust import Difference, difference

ENOUGH = 0.002  # expected regret, relative to the loss, at which there is nothing left to find out
# Relative loss that a whole run's training must be expected to save; what saves less is not compared any further. On
# made-up curves (benchmarks/results/sweep_policy.json) half of it buys nothing, and twice as much loses a little.
PRICE = 0.001
ERRORS = 2.0  # paired standard errors
CHANCE = 0.05  # that the best rate moves so far until the end that the arm would be the better one
# Assumed: relative deviation of what a group comes to at the end from what its lead now says, times
# sqrt(ln(1 / share)); half of what the same for rates (curve.SHIFT) makes of two that are a factor of two apart.
DRIFT = 0.005
APART = math.log(1.15)  # arms nearer to each other than this are one
STEP = math.log(2.0)
AT_EDGE = "the best arm lies at the edge of the bracket, which is extended once"
NO_MORE = "nothing more can be learned for its price"
BOOTSTRAPS = 1_000
LEAST_POINTS = 3  # of a curve, where some rung has as many


@dataclass(frozen=True, slots=True)
class Look:
    """An arm judged after `share` of its run: the mean loss of each held-out row."""

    share: float
    loss_of_row: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of an arm.

    Attributes:
        arm: its number.
        x: ln(alpha · rate). group: all other settings, as text; arms of one group lie on one curve.
        looks: in order; the latest is the one that is judged.
        alive: neither dropped nor diverged.
    """

    arm: int
    x: float
    group: str
    looks: tuple[Look, ...]
    alive: bool = True

    def until(self, share: float) -> "Entry":
        """The same as it was known then."""
        return replace(self, looks=tuple(look for look in self.looks if look.share <= share))


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows from a rung.

    Attributes:
        leader: the arm with the lowest expected regret among those alive.
        drop: arms that end here, each with the reason.
        add: ln(alpha · rate) of a new arm in the leader's group, with the reason.
        stop: why no other arm than the leader need go on; None to go on.
        regret: the leader's, expected, relative to the loss.
        curve: through the leader's group.
    """

    leader: int
    drop: Mapping[int, str] = field(default_factory=lambda: MappingProxyType({}))
    add: tuple[float, str] | None = None
    stop: str | None = None
    regret: float = math.nan
    curve: Curve | None = None


def rungs(updates: int) -> tuple[int, ...]:
    """After which updates of a run arms are compared: max(100, 10 %), 30 %, and the end.

    In a run of less than 1,000 updates the first is after 20 %, and the second never before twice the first; below
    five updates nothing can be told.

    >>> rungs(3_000), rungs(500), rungs(120), rungs(12), rungs(4)
    ((300, 900, 3000), (100, 200, 500), (24, 48, 120), (5, 12), (4,))
    """
    first = max(math.ceil(updates / 10), min(100, math.ceil(updates / 5)), 5)
    second = max(math.ceil(0.3 * updates), 2 * first)
    return (*(step for step in (first, second) if step < 0.8 * updates), updates)


def decide(
    entries: Sequence[Entry],
    weights: Sequence[int],
    priors: Mapping[str, Prior],
    *,
    extended: bool,
    rates: bool = True,
    following: float = 1.0,
) -> Decision:
    """Judge the arms that are alive at their latest look.

    Args:
        weights: what each held-out row weighs in the mean.
        priors: of each group.
        extended: whether the bracket was extended at an edge before, which is done once.
        rates: whether the rate is searched; else arms are what they are, and no curve speaks for another one.
        following: the share of the run after which the arms would be judged next.
    """
    alive = [e for e in entries if e.alive]
    if not alive:
        raise ValueError("no arm is alive")
    share = min(e.looks[-1].share for e in alive)
    best = min(alive, key=lambda e: mean(e, weights))
    across, apart = _between(alive, weights, following)
    regret, curve = across, None
    if rates:
        curve = _curve([e for e in entries if e.group == best.group], weights, priors[best.group], share)
        regret = {e.arm: max(curve.regret(e.x), across[e.arm]) if e.group == best.group else math.inf for e in alive}
    ended = share >= 1
    leader = best if ended else min(alive, key=lambda e: regret[e.arm])
    here = regret[leader.arm]
    if ended:
        add = None if curve is None or here < ENOUGH else _last_addition(entries, leader, curve, extended=extended)
        return Decision(leader.arm, add=add, regret=here, curve=curve)
    drop = _dropped(alive, leader, best, weights, curve)
    if here < ENOUGH:
        stop = f"choosing it now is expected to cost {here:.2%} of the loss, less than {ENOUGH:.1%}"
        return Decision(leader.arm, drop, stop=stop, regret=here, curve=curve)
    going = [e for e in alive if e.arm not in drop]
    steps = _steps(entries, going, leader, curve, apart, (share, following), extended=extended)
    step = max(steps, key=lambda s: s.worth)
    return Decision(
        leader.arm,
        drop,
        add=(step.x, step.why) if step.kind is Kind.ADD else None,
        stop=step.why if step.kind is Kind.STOP else None,
        regret=here,
        curve=curve,
    )


def mean(entry: Entry, weights: Sequence[int]) -> float:
    """The mean held-out loss of the latest look; infinite where a row's is not finite."""
    value = math.fsum(w * loss for w, loss in zip(weights, entry.looks[-1].loss_of_row, strict=True)) / sum(weights)
    return value if math.isfinite(value) else math.inf


def paired(ours: Entry, theirs: Entry, weights: Sequence[int]) -> Difference:
    """Our latest loss less theirs, row by row."""
    return difference(ours.looks[-1].loss_of_row, theirs.looks[-1].loss_of_row, weights)


def _curve(group: Sequence[Entry], weights: Sequence[int], prior: Prior, share: float) -> Curve:
    """Through all arms of the group that were judged at the latest rung that saw three of them, dropped ones included.

    At the end of a search that stopped early one arm is left, and the curve is that of the rung where it stopped.
    """
    at: dict[float, list[Point]] = {}
    for e in group:
        for look in e.looks:
            if look.share <= share and all(map(math.isfinite, look.loss_of_row)):
                at.setdefault(look.share, []).append(Point(e.x, look.loss_of_row))
    latest = max((s for s in at if len(at[s]) >= LEAST_POINTS), default=max(at))
    return fit(at[latest], weights, prior, latest)


def _between(alive: Sequence[Entry], weights: Sequence[int], following: float) -> tuple[dict[int, float], float]:
    """How much worse each arm is expected to be than the best of all, and what the next look saves; relative.

    Only between groups: within a group the curve knows more. By resampled rows, and by what may change until the end.
    """
    of_group: dict[str, list[Entry]] = {}
    for e in alive:
        of_group.setdefault(e.group, []).append(e)
    if len(of_group) == 1:
        return {e.arm: 0.0 for e in alive}, 0.0
    best = [min(group, key=lambda e: mean(e, weights)) for group in of_group.values()]
    loss_GI, weight_I = np.array([e.looks[-1].loss_of_row for e in best]), np.asarray(weights, dtype=np.float64)
    draw = np.random.default_rng(0)
    times_BI = draw.multinomial(len(weight_I), np.full(len(weight_I), 1 / len(weight_I)), size=BOOTSTRAPS) * weight_I
    mean_BG = times_BI @ loss_GI.T / times_BI.sum(1, keepdims=True)
    now_G = loss_GI @ weight_I / weight_I.sum()
    share = min(e.looks[-1].share for e in best)
    told_BG = 1 + DRIFT * math.sqrt(math.log(following / share)) * draw.standard_normal(mean_BG.shape)
    mean_BG *= told_BG * (1 + DRIFT * math.sqrt(math.log(1 / following)) * draw.standard_normal(mean_BG.shape))
    over_BG = (mean_BG - mean_BG.min(1, keepdims=True)) / mean_BG.min(1, keepdims=True)
    over_G, then_B = over_BG.mean(0), (now_G * told_BG).argmin(1)
    saved = float(over_G[now_G.argmin()] - over_BG[np.arange(BOOTSTRAPS), then_B].mean())
    return {e.arm: float(over) for group, over in zip(of_group.values(), over_G, strict=True) for e in group}, saved


def _dropped(
    alive: Sequence[Entry], leader: Entry, best: Entry, weights: Sequence[int], curve: Curve | None
) -> dict[int, str]:
    found = {}
    for e in alive:
        if e.arm in (leader.arm, best.arm) or len(e.looks) < 2:  # of an arm seen once no slope is known
            continue
        gap = paired(e, best, weights)
        if gap.error is None or not gap.mean > ERRORS * gap.error:
            continue
        on_curve = curve is not None and e.group == best.group
        if on_curve and curve is not None and curve.chance(e.x, best.x) > CHANCE:
            continue
        if gap.mean - _gains(e, best, weights) > 0:
            why = f"worse than the best by {gap.mean:.4f} ± {gap.error:.4f}"
            found[e.arm] = f"{why}, and its slope does not make up for that"
    return found


def _gains(ours: Entry, best: Entry, weights: Sequence[int]) -> float:
    """By how much our slope, loss over ln(updates), would shorten the distance to the best until the end."""
    if len(ours.looks) < 2 or len(best.looks) < 2:
        return 0.0
    return max(0.0, _slope(ours, weights) - _slope(best, weights)) * math.log(1 / ours.looks[-1].share)


def _slope(entry: Entry, weights: Sequence[int]) -> float:
    """Fall of the loss per unit of ln(updates), between the last two looks."""
    then, now = entry.looks[-2:]
    fall = -difference(now.loss_of_row, then.loss_of_row, weights).mean
    return fall / math.log(now.share / then.share)


# ── what comes next ──────────────────────────────────────────────────────────────────────────────────────────────────


class Kind(StrEnum):
    """What can be done at a rung."""

    STOP = "stop"
    GO_ON = "go on"
    ADD = "add"


@dataclass(frozen=True, slots=True)
class Step:
    """One of the things that can be done, and why.

    Attributes:
        worth: the relative loss that it is expected to save, less its tokens' price; of stopping it is nothing.
        x: of the arm that is added.
    """

    kind: Kind
    worth: float
    why: str
    x: float = math.nan


def _steps(
    entries: Sequence[Entry],
    going: Sequence[Entry],
    leader: Entry,
    curve: Curve | None,
    apart: float,
    shares: tuple[float, float],
    *,
    extended: bool,
) -> list[Step]:
    """Stopping, going on with all arms that are left, and adding one; each with what it is worth.

    Args:
        apart: what the next look is expected to save by telling groups apart.
        shares: now, and at the next look.
    """
    now, following = shares
    others = [e.x for e in going if e.group == leader.group and e.arm != leader.arm]
    new = PRICE * following if following < 1 else math.inf  # of an arm that would be added at the next look
    runs = (len(going) - 1) * (following - now)
    saves = apart + (curve.gain(leader.x, others, following, new) if curve is not None else 0.0)
    told = f"comparing {len(going)} arms as far as {following:.0%} is expected to save {saves:.2%} of the loss"
    if len(going) == 1:
        told = "of the arms only the best is left"
    steps = [Step(Kind.GO_ON, saves - PRICE * runs, told)] if len(going) > 1 else []
    if curve is not None:
        edge = None if extended else _beyond(entries, leader, curve)
        if edge is not None:
            return [Step(Kind.ADD, math.inf, AT_EDGE, edge)]
        xs = sorted(e.x for e in entries if e.group == leader.group)
        if xs[0] < curve.cheapest < xs[-1] and min(abs(curve.cheapest - x) for x in xs) > APART:
            more = apart + curve.gain(leader.x, [*others, curve.cheapest], following, new)
            why = f"the lowest point of the curve through the arms, expected to save {more - saves:.2%} of the loss"
            steps.append(Step(Kind.ADD, more - PRICE * (runs + following), why, curve.cheapest))
            told += f", and {len(going) + 1} with one at the lowest point of the curve {more:.2%}"
    little = f"{NO_MORE}: {told}; {PRICE:.2%} is asked for each run's training"
    return [*steps, Step(Kind.STOP, 0.0, little)]


def _beyond(entries: Sequence[Entry], leader: Entry, curve: Curve) -> float | None:
    """One step beyond an edge that the best lies at, where the curve falls there."""
    xs = sorted(e.x for e in entries if e.group == leader.group)
    if leader.x == xs[-1] and curve.x > xs[-1] - APART:
        return leader.x + STEP
    if leader.x == xs[0] and curve.x < xs[0] + APART:
        return leader.x - STEP
    return None


def _last_addition(
    entries: Sequence[Entry], leader: Entry, curve: Curve, *, extended: bool
) -> tuple[float, str] | None:
    """At the end only the edge is worth a whole run, and only where the curve expects it to bring its price."""
    edge = None if extended else _beyond(entries, leader, curve)
    if edge is None or curve.gain(leader.x, [edge], 1.0) < PRICE:
        return None
    return edge, AT_EDGE
