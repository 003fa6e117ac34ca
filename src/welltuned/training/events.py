"""What a run tells while it works. The command line prints it, metrics.jsonl keeps it, a caller may watch it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

_NOTHING: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence about the data, the model or the run that the user should see."""

    text: str


@dataclass(frozen=True, slots=True)
class Updated:
    """One update. `step` counts from 1; `loss` is the mean over the update's supervised tokens, in nats.

    `evaluation_follows` says that the next event is the `Evaluated` of this step. `measures` are the objective's own
    numbers, which metrics.jsonl holds beside the others.
    """

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    tokens_per_second: float
    epoch: float
    memory_bytes: int
    seconds_left: float
    evaluation_follows: bool
    measures: Mapping[str, float] = field(default_factory=lambda: _NOTHING)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Held-out loss after `step` updates: mean over supervised tokens, with its standard error over examples.

    Of grpo the loss is minus the mean reward; `samples` are some of its completions.
    """

    step: int
    eval_loss: float
    eval_loss_se: float
    measures: Mapping[str, float] = field(default_factory=lambda: _NOTHING)
    samples: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Skipped:
    """An update that was not made, since its loss or gradient was not finite: nothing of it is in the weights.

    `what` says which of the two and where; `rows` are the origins of those rows of it that are at fault alone, all of
    its rows where none is.
    """

    step: int
    total_steps: int
    what: str
    rows: tuple[str, ...]


Event = Note | Updated | Skipped | Evaluated
Observer = Callable[[Event], None]


def silent(_: Event) -> None:
    """For callers that do not watch."""
