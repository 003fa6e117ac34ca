"""Memory for all arms of a round: where it does not suffice, smaller micro-batches, which change no result."""

from collections.abc import Callable
from typing import TypeVar

from welltuned.advice.plan import Plan
from welltuned.errors import RunError
from welltuned.models.oom import retried
from welltuned.training.healing import halved
from welltuned.training.memory_guard import MemoryGuard

T = TypeVar("T")


class Room:
    """The token budget of micro-batches, all arms together.

    Attributes:
        budget: most tokens of one micro-batch.
    """

    def __init__(self, plan: Plan, budget: int, tell: Callable[[str], None]):
        self.budget, self._tell = budget, tell
        self._guard, self._most_tokens = MemoryGuard(plan), 0

    def reserve(self, where: str) -> None:
        """See that the next round fits, before the kernel ends a process that takes too much."""
        while (lacking := self._guard.short_of(self.budget)) > 0:
            self._shrink(f"{where} would need {lacking / 1e6:,.0f} MB more than are free")

    def give(self, make: Callable[[], T], where: str) -> T:
        """What `make` gives, tried again with a smaller budget each time that memory is out.

        Raises:
            RunError: it does not suffice for one example.
        """
        return retried(make, lambda: self._shrink(f"{where} ran out of memory"))

    def learn(self, tokens: int) -> None:
        """A round of so many tokens is done within the budget."""
        self._guard.learn(self.budget)
        self._most_tokens = max(self._most_tokens, tokens)

    def _shrink(self, why: str) -> None:
        budget = self.budget
        if budget <= 1:
            raise RunError(f"{why}, though every example is computed by itself; search fewer arms, or a smaller model")
        self.budget = halved(budget, self._most_tokens or None)
        text = f"{why}: micro-batches hold at most {self.budget:,} tokens from here on, not {budget:,}"
        self._tell(f"{text}; the effective batch, and with it the result, stays the same")
