"""Where a search is: what a checkpoint holds of it beside weights and moments, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from welltuned.advice.codec import from_plain, to_plain
from welltuned.search.halving import Entry, Look

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Status(StrEnum):
    """What has become of an arm: it trains, it was ended by a comparison or by itself, or it made all its updates."""

    ALIVE = "alive"
    DROPPED = "dropped"
    DIVERGED = "diverged"
    DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmState:
    """One arm.

    Attributes:
        step: updates made or left out. skipped, in_a_row: those that were not finite.
        loss: the smoothed training loss.
        looks: its comparisons so far, on running averages until the last.
        plain: the same on the weights themselves, where a grid is measured.
        why: how it ended, as a sentence part.
        monitor: what its watch remembers.
    """

    number: int
    settings: Mapping[str, Any]
    status: Status = Status.ALIVE
    step: int = 0
    skipped: int = 0
    in_a_row: int = 0
    tokens: int = 0
    loss: float | None = None
    looks: tuple[Look, ...] = ()
    plain: tuple[Look, ...] = ()
    why: str = ""
    monitor: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)

    @property
    def alive(self) -> bool:
        return self.status in (Status.ALIVE, Status.DONE)

    def entry(self, x: float, group: str) -> Entry:
        return Entry(self.number, x, group, self.looks, self.alive)


@dataclass(frozen=True, slots=True, kw_only=True)
class RungRecord:
    """What was decided at one rung, in words and numbers."""

    share: float
    leader: int
    regret: float
    best_rate: float | None
    best_rate_factor: float | None
    said: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All of a search.

    Attributes:
        bank: the number of the arm in each row of the flat buffer.
        target: index of the look that is worked towards.
        extended: whether the bracket was extended at an edge.
        winner: the arm that the rest of the work is for; None while several are alive.
        evaluated: tokens that evaluations passed through the model.
        refused: proposals of a sampler that were no arms.
    """

    arms: tuple[ArmState, ...]
    bank: tuple[int, ...] = ()
    target: int = 0
    extended: bool = False
    winner: int | None = None
    ended: bool = False
    evaluated: int = 0
    refused: int = 0
    rungs: tuple[RungRecord, ...] = ()

    def with_arm(self, arm: ArmState) -> "State":
        return replace(self, arms=tuple(arm if a.number == arm.number else a for a in self.arms))

    @property
    def alive(self) -> tuple[ArmState, ...]:
        return tuple(arm for arm in self.arms if arm.alive)

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(self)
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "State":
        arms = [{key: value for key, value in arm.items() if key != "like"} for arm in plain["arms"]]  # earlier form
        found = from_plain(cls, {**plain, "arms": arms})
        assert isinstance(found, State)
        return found
