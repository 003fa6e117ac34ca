"""What a search tells while it works, beside the notes of a run."""

from collections.abc import Callable
from dataclasses import dataclass

from welltuned.training.events import Finding, Note


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
