"""What the monitor remembers of a run: bounded, made of plain numbers, and the same after it was written and read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from welltuned.training.events import Evaluated, Updated
from welltuned.training.monitor.robust import Difference, difference, is_outlier, spread_of
from welltuned.training.monitor.thresholds import limit


@dataclass(slots=True, kw_only=True)
class Update:
    """One update. `smooth` is the smoothed loss with it, `residual` its loss less the smoothed loss without it."""

    step: int
    loss: float
    smooth: float
    residual: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    seconds: float
    weight_change: float | None
    measures: dict[str, float]
    spike: bool
    origins: list[str]  # of a spike's rows


@dataclass(slots=True, kw_only=True)
class Held:
    """One evaluation, with the difference from the best one before it.

    Attributes:
        error: standard error of the loss; None where it is not known.
        smooth: the smoothed training loss then; None before the first update.
        rates: sum of the learning rates until then.
        rise, rise_error: how far it lies above the best one before, and that difference's standard error.
        fall, fall_error: how far it lies below the first one.
    """

    step: int
    loss: float
    error: float | None
    smooth: float | None
    rates: float
    rise: float = 0.0
    rise_error: float | None = None
    fall: float = 0.0
    fall_error: float | None = None
    measures: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Block:
    """Means of one part of the run; `square` is the mean square of the loss, `measures` are sums."""

    count: int = 0
    rates: float = 0.0
    loss: float = 0.0
    square: float = 0.0
    measures: dict[str, float] = field(default_factory=dict)

    def add(self, loss: float, rate: float, measures: Mapping[str, float]) -> None:
        self.count += 1
        self.rates += rate
        self.loss += (loss - self.loss) / self.count
        self.square += (loss * loss - self.square) / self.count
        for name, value in measures.items():
            self.measures[name] = self.measures.get(name, 0.0) + value


@dataclass(slots=True, kw_only=True)
class History:
    """All that detectors may look at.

    Attributes:
        updates: the latest ones. blocks: the whole run in parts. evaluations: all of them, without their rows.
        least, least_step, least_spread: the lowest smoothed loss, and how residuals spread then.
        fastest: the highest median of tokens/s over a few updates in a row.
        rows: loss of each held-out row at the first, the best and the latest evaluation; `weights` are their tokens.
    """

    step: int = 0
    total: int = 0
    count: int = 0
    rates: float = 0.0
    broken: int = 0
    updates: list[Update] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    evaluations: list[Held] = field(default_factory=list)
    least: float = math.inf
    least_step: int = 0
    least_spread: float = 0.0
    fastest: float = 0.0
    best: int | None = None
    rows: dict[str, list[float]] = field(default_factory=dict)
    weights: list[int] = field(default_factory=list)

    @property
    def smooth(self) -> float | None:
        return self.updates[-1].smooth if self.updates else None

    @property
    def done(self) -> float:
        """Share of the run that is done."""
        return self.step / self.total if self.total else 0.0

    @property
    def finished(self) -> bool:
        """Whether the last update, and what was evaluated after it, have been seen."""
        return 0 < self.total <= self.step

    @property
    def best_evaluation(self) -> Held | None:
        return next((e for e in self.evaluations if e.step == self.best), None)

    def add_update(self, event: Updated) -> None:
        self.step, self.total = event.step, event.total_steps
        if not (math.isfinite(event.loss) and math.isfinite(event.grad_norm)):
            self.broken += 1
            return
        self.count += 1
        self.rates += event.learning_rate
        self._add_to_block(event)
        before = self.smooth
        weight = 1 / min(self.count, limit("smooth_updates"))
        smooth = event.loss if before is None else before + weight * (event.loss - before)
        residual = 0.0 if before is None else event.loss - before
        spike, moved = self._is_spike(event, residual), event.weight_change
        self.updates.append(
            Update(
                step=event.step,
                loss=event.loss,
                smooth=smooth,
                residual=residual,
                grad_norm=event.grad_norm,
                learning_rate=event.learning_rate,
                tokens_per_second=event.tokens_per_second,
                seconds=event.tokens / event.tokens_per_second if event.tokens_per_second else 0.0,
                weight_change=moved if moved is not None and math.isfinite(moved) else None,
                measures=_finite(event.measures),
                spike=spike,
                origins=list(event.origins) if spike else [],
            )
        )
        del self.updates[: -int(limit("window"))]
        if smooth < self.least:
            self.least, self.least_step = smooth, event.step
            self.least_spread = spread_of([u.residual for u in self.updates])
        latest = self.updates[-int(limit("throughput_updates")) :]
        if len(latest) == limit("throughput_updates"):
            self.fastest = max(self.fastest, median(u.tokens_per_second for u in latest))

    def _add_to_block(self, event: Updated) -> None:
        size = max(1, math.ceil(event.total_steps / limit("blocks")))
        if not self.blocks or self.blocks[-1].count >= size:
            self.blocks.append(Block())
        self.blocks[-1].add(event.loss, event.learning_rate, _finite(event.measures))

    def _is_spike(self, event: Updated, residual: float) -> bool:
        """Loss and gradient norm both far outside what the latest updates show."""
        if len(self.updates) < limit("spike_history") or self.smooth is None:
            return False
        norms = [math.log(max(u.grad_norm, math.ulp(0.0))) for u in self.updates]
        return (
            residual > limit("spike_rise") * abs(self.smooth)
            and is_outlier(residual, [u.residual for u in self.updates], level=abs(self.smooth))
            and is_outlier(math.log(max(event.grad_norm, math.ulp(0.0))), norms, level=1.0)
        )

    def add_evaluation(self, event: Evaluated) -> None:
        self.step = max(self.step, event.step)
        if not math.isfinite(event.eval_loss):
            return
        rows = list(event.loss_of_example)
        if not all(map(math.isfinite, rows)):  # a row that could not be judged: then by the mean and its error
            rows = []
        self.weights = list(event.tokens_of_example) or [1] * len(rows)
        held = Held(
            step=event.step,
            loss=event.eval_loss,
            error=event.eval_loss_se if math.isfinite(event.eval_loss_se) else None,
            smooth=self.smooth,
            rates=self.rates,
            measures=_finite(event.measures),
        )
        if self.evaluations:
            first, best = self.evaluations[0], self.best_evaluation or self.evaluations[0]
            risen = self._against("best", held, rows, best)
            fallen = self._against("first", held, rows, first)
            held.rise, held.rise_error = risen.mean, risen.error
            held.fall, held.fall_error = -fallen.mean, fallen.error
        else:
            self.rows["first"] = rows
        self.evaluations.append(held)
        if self.best is None or held.rise < 0:
            self.best, self.rows["best"] = held.step, rows

    def _against(self, name: str, held: Held, rows: Sequence[float], other: Held) -> Difference:
        """Row by row where both have the same rows, else by the two standard errors."""
        then = self.rows.get(name, [])
        if len(rows) == len(then) > 1:
            return difference(rows, then, self.weights)
        known = held.error is not None and other.error is not None
        error = math.hypot(held.error, other.error) if known else None  # type: ignore[arg-type]
        return Difference(held.loss - other.loss, error)

    def to_json(self) -> dict[str, Any]:
        state = asdict(self)
        state["least"] = self.least if math.isfinite(self.least) else None
        return state

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "History":
        parts = {
            "updates": [Update(**u) for u in state["updates"]],
            "blocks": [Block(**b) for b in state["blocks"]],
            "evaluations": [Held(**e) for e in state["evaluations"]],
            "least": math.inf if state["least"] is None else state["least"],
        }
        return cls(**{**state, **parts})


def _finite(measures: Mapping[str, float]) -> dict[str, float]:
    """The measures that are numbers: some are not where nothing could be judged."""
    return {name: value for name, value in measures.items() if math.isfinite(value)}
