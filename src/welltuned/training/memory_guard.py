"""On the CPU: see that memory will not suffice, before the kernel ends the process without a word.

A GPU says when it has no memory left, and a process can go on. Linux gives the host's memory away first and kills
whoever uses it too late, so here the growth that an update will bring is compared with what is free.
"""

from collections.abc import Callable

from welltuned.advice.plan import Plan
from welltuned.facts.machine import Device, memory_available
from welltuned.training.process import memory_used

RESERVE = 128 * 2**20  # bytes that stay free: other processes, and the kernel's own
LEAST_BUDGET = 256  # tokens; a forecast does not ask for fewer, only a real failure does


class MemoryGuard:
    """What one run needs for an update, by the plan's forecast until one of that size was measured.

    Args:
        processes: how many share this machine's memory, and will all grow as this one does.
    """

    def __init__(self, plan: Plan, available: Callable[[], int] = memory_available, *, processes: int = 1):
        self._on_cpu = plan.facts.machine.device is Device.CPU
        self._available, self._processes = available, processes
        parts = plan.memory.parts
        passing = sum(parts.get(name, 0) for name in ("activations", "workspace"))
        self._per_token = passing / max(1, plan.value("token_budget"))
        self._start = memory_used(plan.facts.machine.device).now
        self._measured: dict[int, int] = {}  # most resident bytes in updates within a token budget

    def short_of(self, budget: int) -> int:
        """How many bytes an update in micro-batches of `budget` tokens would lack; 0 where it fits or nobody knows."""
        if not self._on_cpu or budget <= LEAST_BUDGET:
            return 0
        expected = self._measured.get(budget, self._start + int(self._per_token * budget))
        growth = expected - memory_used(Device.CPU).now
        if growth <= 0:  # it holds this memory already
            return 0
        return max(0, growth - max(0, self._available() - RESERVE) // self._processes)

    def learn(self, budget: int) -> None:
        """An update within `budget` is done: what it took is known now."""
        if self._on_cpu and budget not in self._measured:
            self._measured[budget] = memory_used(Device.CPU).now
