"""What a run tells while it works. The command line prints it, metrics.jsonl keeps it, a caller may watch it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
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
    numbers, which metrics.jsonl holds beside the others. `weight_change` is how far the trained weights have moved
    since the start, relative to what they change (training/monitor/movement.py); None where nobody measured it.
    `origins` names the update's rows.
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
    weight_change: float | None = None
    origins: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Held-out loss after `step` updates: mean over supervised tokens, with its standard error over examples.

    `loss_of_example` is the mean of each held-out row, always in the same order, `tokens_of_example` its weight in the
    whole mean (empty: all alike). With them two evaluations can be compared row by row.
    Of grpo the loss is minus the mean reward; `samples` are some of its completions.
    """

    step: int
    eval_loss: float
    eval_loss_se: float
    measures: Mapping[str, float] = field(default_factory=lambda: _NOTHING)
    loss_of_example: tuple[float, ...] = ()
    tokens_of_example: tuple[int, ...] = ()
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


@dataclass(frozen=True, slots=True)
class Compiled:
    """How compiling the decoder layers went, before the first update (models/compiled.py).

    Attributes:
        lengths: of packed rows that they are compiled for; none: any length. graphs: pieces of code.
        error: largest relative difference of hidden states and gradients from plain layers, on random rows.
        padding: share of padding in what this run's micro-batches pass through the model.
        problem: why the run goes on without; None where they are compiled.
    """

    seconds: float
    lengths: tuple[int, ...]
    graphs: int
    error: float | None
    padding: float
    problem: str | None = None

    @property
    def sentence(self) -> str:
        """All of it."""
        if self.problem is not None:
            return f"decoder layers run uncompiled: {self.problem}"
        lengths = ", ".join(f"{n:,}" for n in self.lengths)
        at = f"for packed rows of {lengths} tokens ({self.padding:.1%} padding)" if lengths else "for any length of row"
        return f"decoder layers compiled {at} in {self.seconds:.0f} s"


class Severity(StrEnum):
    """How much a finding matters: worth knowing, to be mended for the next run, or this run is lost."""

    HINT = "hint"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Remedy:
    """One way out, in words, with the recipe keys to change and their new values (none where no key does it)."""

    text: str
    changes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Finding:
    """What the monitor noticed (training/watch.py).

    Attributes:
        id: names the kind, such as `overfitting`; one run tells each at most once.
        what: a sentence part with the number that shows it.
        cause: the likely cause, for this run.
        remedies: ways out, the best for this run first.
    """

    id: str
    severity: Severity
    step: int
    what: str
    cause: str
    remedies: tuple[Remedy, ...] = ()

    @property
    def changes(self) -> Mapping[str, Any]:
        """The recipe keys to change and their new values, by the first remedy that has any."""
        return next((r.changes for r in self.remedies if r.changes), MappingProxyType({}))

    @property
    def sentence(self) -> str:
        """All of it: what, why, and the first thing to do."""
        mend = f" To mend it: {self.remedies[0].text}." if self.remedies else ""
        return f"After {self.step} updates: {self.what}. {self.cause}.{mend}"

    def to_json(self) -> dict[str, Any]:
        """As metrics.jsonl, run.json and a checkpoint hold it."""
        return {
            "id": self.id,
            "severity": str(self.severity),
            "step": self.step,
            "what": self.what,
            "cause": self.cause,
            "changes": dict(self.changes),
            "remedies": [{"text": r.text, "changes": dict(r.changes)} for r in self.remedies],
            "sentence": self.sentence,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Finding":
        remedies = tuple(Remedy(r["text"], MappingProxyType(r["changes"])) for r in value["remedies"])
        severity = Severity(value["severity"])
        return cls(value["id"], severity, value["step"], value["what"], value["cause"], remedies)


Event = Note | Compiled | Updated | Skipped | Evaluated | Finding
Observer = Callable[[Event], None]


def silent(_: Event) -> None:
    """For callers that do not watch."""
