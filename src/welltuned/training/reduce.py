"""The one sum over the ranks that an update needs: gradient, loss and measures, and whether anybody has a word to say.

Behind the flat gradient lie a few numbers more, so that one collective takes all of it. Only where a rank says that
something happened (a loss that is not finite, memory, a signal, an error) do words follow, and then on all ranks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from welltuned.errors import RunError
from welltuned.models.full import FullParameters
from welltuned.models.oom import is_out_of_memory
from welltuned.training.ranks import Failure, Group, Lost, Ranks
from welltuned.training.step import Gradient, NotFinite, Trained

# Places behind the gradient: how many ranks have a word, the loss, the gradient's squares where each rank holds a part
# of it, and an objective's own.
WORDS, LOSS, SQUARES, MEASURES = 0, 1, 2, 3
TAIL = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What a rank has to say beside its numbers.

    Attributes:
        token_budget: that it has come down to, for want of memory.
        notes: what the user should know; signal: by which it was asked to end.
        not_finite: why the update must be left out; failure: why the run cannot go on.
    """

    token_budget: int
    notes: tuple[str, ...] = ()
    signal: int | None = None
    not_finite: str | None = None
    failure: Failure | None = None

    @property
    def is_empty(self) -> bool:
        return not self.notes and self.signal is None and self.not_finite is None and self.failure is None


class GradientSum:
    """Takes the place of the flat gradient where there are several ranks; does nothing where there is one.

    Args:
        passes_together: whether the others wait in the middle of a pass for a rank that fails, so that it only ends.
    """

    def __init__(self, trained: Trained, ranks: Ranks, *, passes_together: bool = False):
        self._together = passes_together
        self._group = ranks if isinstance(ranks, Group) else None
        self._trained, self._in_pieces = trained, isinstance(trained, FullParameters) and trained.in_pieces
        self._length = math.nan
        if self._group is not None and self._in_pieces:  # which every pass has summed already
            self._buffer = self._tail = torch.zeros(TAIL, dtype=torch.float32, device=trained.grad_KP.device)
        elif self._group is not None:
            count = trained.grad_KP.numel()
            self._buffer = torch.zeros(count + TAIL, dtype=torch.float32, device=trained.grad_KP.device)
            trained.grad_KP = self._buffer[:count].view_as(trained.grad_KP)
            self._tail = self._buffer[count:]
        trained.claim_gradients()

    def of(
        self, make: Callable[[], Gradient], word: Callable[[], Word], heed: Callable[[Sequence[Word]], None]
    ) -> Gradient:
        """The gradient of the whole update, of which `make` adds this rank's share to the flat buffer.

        Args:
            word: what this rank has to say, asked after `make`; `heed` hears every rank's, where one says something.

        Raises:
            NotFinite: a rank's loss is not; on all of them. Any other error of `make`, on all of them.
        """
        if self._group is None:
            return make()
        made, failed = None, None
        try:
            made = make()
        except Exception as error:
            alone = self._together and not isinstance(error, NotFinite)  # which is found out after all passes
            if alone or is_out_of_memory(error) or isinstance(error, Lost):  # the others hear of it when this one ends
                raise
            failed = error
        said = word()
        if isinstance(failed, NotFinite):
            said = replace(said, not_finite=str(failed))
        elif failed is not None:
            said = replace(said, failure=Failure.of(failed))
        self._fill(made, said)
        self._group.sum_(self._buffer)
        numbers = self._tail.tolist()
        self._length = math.sqrt(numbers[SQUARES])
        self._tail.zero_()
        if numbers[WORDS]:
            words = self._group.exchange(said)
            heed(words)
            self._group.require_no_failure([w.failure for w in words], failed)
            not_finite = next((w.not_finite for w in words if w.not_finite is not None), None)
            if not_finite is not None:
                raise NotFinite(not_finite)
        assert made is not None
        return replace(made, loss=numbers[LOSS], measures=dict(zip(made.measures, numbers[MEASURES:], strict=False)))

    def lengths(self) -> Tensor:
        """The length of each adapter's gradient after `of`; the same on all ranks."""
        if self._in_pieces:
            return torch.tensor([self._length])
        return torch.linalg.vector_norm(self._trained.grad_KP, dim=1)

    def _fill(self, made: Gradient | None, said: Word) -> None:
        if made is None:
            return self._write([float(not said.is_empty)])
        squares = float(torch.linalg.vector_norm(self._trained.grad_KP)) ** 2 if self._in_pieces else 0.0
        if len(made.measures) > TAIL - MEASURES:
            raise RunError(f"an objective has {len(made.measures)} measures, and {TAIL - MEASURES} can be shared")
        return self._write([float(not said.is_empty), made.loss, squares, *made.measures.values()])

    def _write(self, numbers: Sequence[float]) -> None:
        self._tail[: len(numbers)] = torch.tensor(numbers, dtype=torch.float32)
