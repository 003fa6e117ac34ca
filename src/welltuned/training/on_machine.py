"""What a run asks of the machine that it is on: its allocator's settings, and a sentence where memory is out."""

from collections.abc import Iterator
from contextlib import contextmanager

from welltuned.advice.plan import Plan
from welltuned.errors import RunError
from welltuned.models.oom import is_out_of_memory
from welltuned.training.in_pieces import lies_in_pieces
from welltuned.training.process import allocator_keeps_memory, allocator_returns_memory
from welltuned.training.ranks import ALONE, Ranks


@contextmanager
def on_this_machine(plan: Plan, ranks: Ranks = ALONE) -> Iterator[None]:
    """The allocator's settings for a run; out of memory while a model is loaded is a sentence."""
    allocator = allocator_returns_memory if lies_in_pieces(plan, ranks) else allocator_keeps_memory
    with allocator(plan.facts.machine.device):
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            mend = "close other programs, use --tune qlora, or a smaller model"
            raise RunError(f"there is not enough memory for this model; {mend}") from error
