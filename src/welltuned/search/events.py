"""What a search tells while it works, beside the notes of a run."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from welltuned.training.events import Evaluated, Finding, Note, Updated

if TYPE_CHECKING:  # they bring torch
    from welltuned.training.step import Evaluation, Gradient


@dataclass(frozen=True, slots=True)
class ArmUpdated:
    """One update of one arm; `loss` is its own mean, `share` how much of its run is done."""

    arm: int
    step: int
    total_steps: int
    share: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    supervised_tokens: int


@dataclass(frozen=True, slots=True)
class ArmJudged:
    """One arm on the held-out rows: its mean loss, and how much that is above the best's, paired."""

    arm: int
    step: int
    share: float
    eval_loss: float
    above_best: float
    above_best_se: float | None


@dataclass(frozen=True, slots=True)
class ArmEnded:
    """An arm goes no further: dropped, diverged, or done."""

    arm: int
    step: int
    status: str
    why: str


@dataclass(frozen=True, slots=True)
class ArmAdded:
    """Another arm, beyond those that the search began with (which are told as well)."""

    arm: int
    name: str
    why: str


SearchEvent = Note | Finding | ArmUpdated | ArmJudged | ArmEnded | ArmAdded
SearchObserver = Callable[[SearchEvent], None]


def unheard(_: SearchEvent) -> None:
    """For callers that do not watch."""


# ── as others take them ──────────────────────────────────────────────────────────────────────────────────────────────


def evaluated(step: int, found: "Evaluation") -> Evaluated:
    rows = found.loss_of_example, found.tokens_of_example
    return Evaluated(step, found.loss, found.standard_error, found.measures, *rows)


def update_event(step: int, total: int, made: "Gradient", norm: float, rate: float) -> Updated:
    """As a run would tell it to its watch; what depends on the clock is left out, so that resuming changes nothing."""
    return Updated(
        step=step,
        total_steps=total,
        loss=made.loss,
        learning_rate=rate,
        grad_norm=norm,
        tokens=made.tokens,
        supervised_tokens=made.supervised_tokens,
        tokens_per_second=0.0,
        epoch=0.0,
        memory_bytes=0,
        seconds_left=0.0,
        evaluation_follows=False,
    )


def line_of(event: SearchEvent) -> dict[str, Any]:
    """An event as a line of metrics.jsonl, under names that no run's own lines have."""
    match event:
        case ArmUpdated():
            names = ("arm", "step", "learning_rate", "grad_norm", "tokens", "supervised_tokens")
            return {"event": "arm_update", "arm_loss": event.loss, **{name: getattr(event, name) for name in names}}
        case ArmJudged():
            gap = {name: getattr(event, name) for name in ("arm", "step", "share", "above_best", "above_best_se")}
            return {"event": "arm_judged", "arm_eval_loss": event.eval_loss, **gap}
        case ArmEnded():
            return {
                "event": "arm_ended",
                "arm": event.arm,
                "step": event.step,
                "status": event.status,
                "why": event.why,
            }
        case ArmAdded():
            return {"event": "arm", "arm": event.arm, "name": event.name, "why": event.why}
    raise TypeError(f"{event!r} is no event of a search")


def curve_of(
    lines: Iterable[Mapping[str, Any]], arm: int, total: int, steps_per_epoch: int, speed: float
) -> list[Updated]:
    """An arm's updates as a run would have told them, from the lines of metrics.jsonl.

    Args:
        speed: tokens a second of the whole search, since arms share every second.
    """
    return [
        Updated(
            step=line["step"],
            total_steps=total,
            loss=line["arm_loss"],
            learning_rate=line["learning_rate"],
            grad_norm=line["grad_norm"],
            tokens=line["tokens"],
            supervised_tokens=line["supervised_tokens"],
            tokens_per_second=speed,
            epoch=line["step"] / steps_per_epoch,
            memory_bytes=0,
            seconds_left=0.0,
            evaluation_follows=line["step"] == total,
        )
        for line in lines
        if line.get("event") == "arm_update" and line["arm"] == arm
    ]
