"""What a search found, as numbers, as a table, as a plot, and as what it changes about the advice."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from welltuned.advice.codec import to_plain
from welltuned.advice.learning_rate import two_digits
from welltuned.advice.settle import shown
from welltuned.search.applied import RATE
from welltuned.search.arms import Arm
from welltuned.search.board import Board
from welltuned.search.curve import Curve
from welltuned.search.halving import APART, ENOUGH, mean, paired
from welltuned.search.state import RungRecord

GRID = 7  # rates that a grid would try, each to its end
POINTS, BEYOND = 41, 0.2  # of the curve, which is drawn so far in ln(rate) beyond the outer arms
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 360, 70, 20, 30, 52
_SHARES = ("#c9d6ea", "#8fb0d9", "#4f83c2", "#1f5fbf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """An arm at one look: the mean held-out loss, and how far it is above the best there, paired."""

    share: float
    loss: float
    above_best: float
    above_best_se: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRow:
    """One line of the table. `why` says how the arm ended."""

    number: int
    name: str
    settings: dict[str, Any]
    learning_rate: float
    group: str
    status: str
    why: str
    updates: int
    total_updates: int
    tokens: int
    looks: tuple[Judged, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """The parabola at one rate: the median of the held-out loss there, and one standard deviation to either side."""

    rate: float
    low: float
    loss: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """All of it.

    Attributes:
        best_rate, best_rate_factor: the lowest point of the curve, and the factor that it may be off by to either side
            (one standard deviation); None where the rate was not searched.
        regret: what the winner is expected to cost beyond the lowest point, relative to the loss.
        tokens: trained on by all arms. run_tokens: by the winner alone. evaluated: held-out tokens that were judged.
        fitted: the parabola through the winner's group; `fitted_share` is after how much of the run it was measured.
    """

    rows: tuple[ArmRow, ...]
    winner: int
    advised_rate: float
    best_rate: float | None
    best_rate_factor: float | None
    regret: float
    advised_regret: float | None
    curve: float | None
    tokens: int
    run_tokens: int
    evaluated: int
    rungs: tuple[RungRecord, ...]
    advice: str
    fitted: tuple[Fitted, ...] = ()
    fitted_share: float | None = None

    @property
    def runs_worth(self) -> float:
        """How many whole runs the training of all arms was worth."""
        return self.tokens / self.run_tokens

    @property
    def grid_share(self) -> float:
        """Tokens as a share of what a grid of seven whole runs takes."""
        return self.runs_worth / GRID


def found_of(board: Board, winner: Arm) -> Found:
    """What a search that ended found."""
    advised = board.rules.advised.get(winner.group, winner.plan.value(RATE))
    decision = board.last_decision
    curve = None if decision is None else decision.curve
    best = None if curve is None else winner.plan.value(RATE) * math.exp(curve.x - winner.x)
    at_advice = winner.x + math.log(advised / winner.plan.value(RATE))
    state = board.of(winner.number)
    regret = math.nan if decision is None else decision.regret
    advised_regret = None if curve is None else curve.regret(at_advice)
    rows = tuple(_row(board, number) for number in board.arms)
    error = None if curve is None else curve.x_error
    return Found(
        rows=rows,
        winner=winner.number,
        advised_rate=advised,
        best_rate=best,
        best_rate_factor=None if curve is None else math.exp(curve.x_error),
        regret=regret,
        advised_regret=advised_regret,
        curve=None if curve is None else curve.curve,
        tokens=sum(arm.tokens for arm in board.state.arms),
        run_tokens=state.tokens,
        evaluated=board.state.evaluated,
        rungs=board.state.rungs,
        advice=_changes(winner, advised, best, error, advised_regret, seen=_seen(rows, advised)),
        fitted=() if curve is None else _fitted(board, winner, curve),
        fitted_share=None if curve is None else curve.share,
    )


def _fitted(board: Board, winner: Arm, curve: Curve) -> tuple[Fitted, ...]:
    """The curve over the rates of the winner's group, and a little beyond."""
    xs = [arm.x for arm in board.arms.values() if arm.group == winner.group]
    x_P = np.linspace(min(xs) - BEYOND, max(xs) + BEYOND, POINTS)
    rates = winner.plan.value(RATE) * np.exp(x_P - winner.x)
    points = zip(rates.tolist(), *curve.losses(x_P).tolist(), strict=True)
    return tuple(Fitted(rate=rate, low=low, loss=loss, high=high) for rate, low, loss, high in points)


def _row(board: Board, number: int) -> ArmRow:
    arm, state = board.arms[number], board.of(number)
    return ArmRow(
        number=number,
        name=arm.name,
        settings=dict(arm.settings),
        learning_rate=arm.plan.value(RATE),
        group=arm.group,
        status=str(state.status),
        why=state.why,
        updates=state.step,
        total_updates=arm.plan.updates,
        tokens=state.tokens,
        looks=tuple(_judged(board, number)),
    )


def _judged(board: Board, number: int) -> list[Judged]:
    """Every look of an arm beside the best arm of that look."""
    everyone, weights, found = board.entries(), board.weights, []
    own = next((e for e in everyone if e.arm == number), None)
    for i in range(len(own.looks) if own is not None else 0):
        assert own is not None
        share = own.looks[i].share
        there = [e.until(share) for e in everyone if any(look.share == share for look in e.looks)]
        best, mine = min(there, key=lambda e: mean(e, weights)), own.until(share)
        gap = paired(mine, best, weights)
        found.append(Judged(share=share, loss=mean(mine, weights), above_best=gap.mean, above_best_se=gap.error))
    return found


def _seen(rows: Sequence[ArmRow], rate: float) -> float:
    """At what share of its run the arm of this rate was last judged; 1 where there is none."""
    return next((row.looks[-1].share for row in rows if row.looks and row.learning_rate == rate), 1.0)


def _changes(
    winner: Arm, advised: float, best: float | None, error: float | None, regret: float | None, *, seen: float
) -> str:
    """What this changes about the advice, in a sentence or two; `seen` as `_seen` finds it of the advised rate."""
    chosen = winner.plan.value(RATE)
    if best is None or error is None or regret is None:
        kept = "" if RATE in winner.settings else "; the advice's rates were kept"
        return f"Of what was compared, {winner.name} did best on your held-out rows{kept}."
    off = abs(math.log(best / advised))
    where = f"The advice was {shown(float(advised))}; your rows put the best rate at {shown(two_digits(best))} "
    where += f"(×/÷ {math.exp(error):.2f})"
    if regret < ENOUGH or off < APART:
        return f"{where}: nothing changes. Staying with the advice is expected to cost {regret:.2%} of the loss."
    if abs(math.log(chosen / advised)) < APART:
        return f"{where}, and yet the advised rate did best of what was compared: nothing changes."
    tie = " The two cannot be told apart with certainty." if off < error else ""
    early = (
        f" (less, maybe: it was last seen after {seen:.0%} of its run, where low rates look worse)" if seen < 1 else ""
    )
    return (
        f"{where}. Staying with the advice would be expected to cost {regret:.2%} of the loss{early}; "
        f"use {shown(float(chosen))} for data like this.{tie}"
    )


def to_json(found: Found) -> dict[str, Any]:
    """The document that `welltuned sweep --json` prints, and sweep.json holds."""
    plain: dict[str, Any] = to_plain(found)
    arms = plain.pop("rows")
    return {**plain, "runs_worth": found.runs_worth, "share_of_a_grid_of_seven": found.grid_share, "arms": arms}


def table(found: Found) -> list[tuple[str, ...]]:
    """Lines of text cells: arm, updates, tokens, held-out loss at each look, what became of it. First the header."""
    shares = sorted({look.share for row in found.rows for look in row.looks})
    lines = [("arm", *(f"at {share:.0%}" for share in shares), "above the best", "updates", "what became of it")]
    for row in found.rows:
        at = {look.share: look for look in row.looks}
        cells = [f"{at[share].loss:.4f}" if share in at else "" for share in shares]
        last = row.looks[-1] if row.looks else None
        gap = ""
        if last is not None and last.above_best_se is not None and last.above_best:
            gap = f"{last.above_best:.4f} ± {last.above_best_se:.4f}"
        fate = "chosen" if row.number == found.winner else row.why or row.status
        lines.append((row.name, *cells, gap, f"{row.updates}/{row.total_updates}", fate))
    return lines


def spent(found: Found) -> str:
    """Tokens against what others would have taken."""
    return (
        f"{found.tokens:,} tokens trained, as many as {found.runs_worth:.2f} whole runs: {found.grid_share:.0%} of a "
        f"grid of {GRID}; {found.evaluated:,} held-out tokens judged"
    )


# ── the plot ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def plot(found: Found) -> str:
    """Held-out loss over the learning rate: a point an arm and look with its paired error, as an SVG file."""
    points = [(row, look) for row in found.rows for look in row.looks if math.isfinite(look.loss)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="held-out loss over the learning rate">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    if not points:
        return "\n".join([*parts, "</svg>"]) + "\n"
    shares = sorted({look.share for _, look in points})
    xs = [math.log(row.learning_rate) for row, _ in points]
    lows = [look.loss - (look.above_best_se or 0.0) for _, look in points]
    highs = [look.loss + (look.above_best_se or 0.0) for _, look in points]
    x_of = _axis(min(xs), max(xs), _LEFT + 24, _WIDTH - _RIGHT - 24)
    y_of = _axis(min(lows), max(highs), _HEIGHT - _BOTTOM - 8, _TOP + 8)
    parts += _axes(found, x_of, y_of, min(lows), max(highs))
    for share in shares:
        colour = _SHARES[min(len(_SHARES) - 1, len(_SHARES) - len(shares) + shares.index(share))]
        parts += _series([(r, look) for r, look in points if look.share == share], colour, f"{share:.0%}", x_of, y_of)
    best = next(row for row in found.rows if row.number == found.winner)
    at = x_of(math.log(best.learning_rate))
    parts.append(
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" stroke="#999" stroke-dasharray="4 3"/>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axis(low: float, high: float, start: float, end: float) -> Any:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _axes(found: Found, x_of: Any, y_of: Any, low: float, high: float) -> list[str]:
    parts = []
    for rate in sorted({row.learning_rate for row in found.rows}):
        x, name = x_of(math.log(rate)), escape(shown(float(rate)))
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 32}" text-anchor="middle">{name}</text>')
    for i in range(5):
        value = low + (high - low) * i / 4
        parts.append(f'<text x="{_LEFT - 8}" y="{y_of(value) + 4:.1f}" text-anchor="end">{value:.3f}</text>')
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y_of(value):.1f}" y2="{y_of(value):.1f}" stroke="#eee"/>'
        )
    parts.append(
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 10}" text-anchor="middle">learning rate; held-out loss after each share '
        f"of the run, bars: one paired standard error</text>"
    )
    return parts


def _series(points: Sequence[tuple[ArmRow, Judged]], colour: str, name: str, x_of: Any, y_of: Any) -> list[str]:
    ordered = sorted(points, key=lambda p: p[0].learning_rate)
    path = " ".join(f"{x_of(math.log(r.learning_rate)):.1f},{y_of(look.loss):.1f}" for r, look in ordered)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>']
    for row, look in ordered:
        x, y, error = x_of(math.log(row.learning_rate)), y_of(look.loss), look.above_best_se or 0.0
        top, bottom = y_of(look.loss + error), y_of(look.loss - error)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{colour}"/>')
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{escape(row.name)}</title></circle>'
        )
    last = ordered[-1]
    x, y = x_of(math.log(last[0].learning_rate)) + 8, y_of(last[1].loss) + 4
    parts.append(f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{name}</text>')
    return parts
