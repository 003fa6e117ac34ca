"""Where a run is, and what its checkpoint is written from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from welltuned.models.lora import Slot
from welltuned.training.step import Evaluation

_NO_STATE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a run is, beside its weights and moments.

    Attributes:
        step: updates done, those that were skipped among them.
        rate_factor: what every rate is multiplied by since the run went back.
        skipped, in_a_row: updates left out because something was not finite: all, and the latest without a break.
        returns: how often the run went back to a checkpoint.
        seconds, tokens: spent in updates. elapsed: all of the run's time.
        before, last: evaluations before the first update and the latest.
        best: the update that the monitor holds for the best; its checkpoint stays.
        monitor: the monitor's own state.
        ended: why the run ended before its last planned update, if it did.
    """

    step: int = 0
    token_budget: int
    rate_factor: float = 1.0
    skipped: int = 0
    in_a_row: int = 0
    returns: int = 0
    seconds: float = 0.0
    tokens: int = 0
    elapsed: float = 0.0
    before: Evaluation | None = None
    last: Evaluation | None = None
    best: int | None = None
    monitor: Mapping[str, Any] = field(default_factory=lambda: _NO_STATE)
    ended: str | None = None

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Position":
        """What `to_plain` made of one."""
        return cls(**{**plain, "before": _evaluation(plain["before"]), "last": _evaluation(plain["last"])})


def _evaluation(plain: Mapping[str, Any] | None) -> Evaluation | None:
    if plain is None:
        return None
    lists = {name: tuple(value) for name, value in plain.items() if isinstance(value, list)}
    return Evaluation(**{**plain, **lists})


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a checkpoint is written from, in host memory, and not changed while it is written.

    Attributes:
        flat_KP, exp_avg_KP, exp_avg_sq_KP: trained numbers and AdamW's moments, fp32. steps_G: AdamW's step counts.
        codes: moments in 8 bits by name, and their scales.
        average_KP: the average of the weights, where the run keeps one.
        slots: names and places in a row of flat_KP.
        run: the run's id.
        metrics_bytes: length of metrics.jsonl at this position.
        identity: what the run is of, to be compared when it goes on.
    """

    flat_KP: Tensor
    exp_avg_KP: Tensor
    exp_avg_sq_KP: Tensor
    steps_G: Tensor
    slots: Sequence[Slot]
    average_KP: Tensor | None = None
    codes: Mapping[str, Tensor] = field(default_factory=dict)
    position: Position
    run: str
    metrics_bytes: int
    identity: Mapping[str, Any]
    versions: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """About what its checkpoint takes on disk."""
        average = 0 if self.average_KP is None else self.average_KP.nbytes
        buffers = (self.flat_KP, self.exp_avg_KP, self.exp_avg_sq_KP, *self.codes.values())
        return sum(t.nbytes for t in buffers) + average + 2**16
