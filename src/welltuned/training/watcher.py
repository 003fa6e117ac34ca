"""The place of whoever watches a run: it is shown every event, and may say something or end the run."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from welltuned.advice.plan import Plan
from welltuned.training.events import Event


class Watch(Protocol):
    """Who watches a run. Every event is shown to it; what it says is told.

    Attributes:
        stop_reason: why the run should end here; None to go on.
        best_step: the update whose weights are the best so far, which must have been evaluated; None if none is.
    """

    @property
    def stop_reason(self) -> str | None: ...
    @property
    def best_step(self) -> int | None: ...
    def see(self, event: Event) -> tuple[Event, ...]: ...
    def state(self) -> Mapping[str, Any]:
        """Plain values from which it can go on."""
        ...


MakeWatch = Callable[[Plan, Mapping[str, Any]], Watch]
"""Makes a watch for a plan, from the state that a checkpoint holds of it; at the start that is empty."""


class Unwatched:
    """Nobody watches."""

    stop_reason: str | None = None
    best_step: int | None = None

    def see(self, event: Event) -> tuple[Event, ...]:
        return ()

    def state(self) -> Mapping[str, Any]:
        return {}


def unwatched(plan: Plan, state: Mapping[str, Any]) -> Watch:
    return Unwatched()
