"""Passes that all ranks make together, since each of them holds only a part of the model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from welltuned.errors import WelltunedError
from welltuned.kernels.token_loss import Head
from welltuned.models.oom import is_out_of_memory
from welltuned.training.ranks import Group, Lost

if TYPE_CHECKING:
    from welltuned.models.sharded import Whole

T = TypeVar("T")


class Stranded(Lost):
    """This rank failed in the middle of a pass, in which the others wait for it: it can only end, and they with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """A model in pieces.

    Attributes:
        root: what passes run in.
        base_weights: the frozen base's fingerprint, taken while it was whole.
    """

    root: "Whole"
    ranks: Group
    base_weights: Mapping[str, str]

    def run(self, make: Callable[[Head | None], T], head: Head | None) -> T:
        """What `make` computes with the head whole."""

        def passed() -> T:
            return make(None if head is None else _live(head, self.root.model.get_output_embeddings()))

        with self.together():
            found: T = self.root(passed) if torch.is_grad_enabled() else self.root.without_gradient(passed)
            return found

    def ask(self, look: Callable[[], T]) -> T:
        """What `look` finds of the model, in passes without a gradient."""
        with self.together():
            return self.root.without_gradient(look)

    def once(self, make: Callable[[], T]) -> T:
        """What `make` gives by passes, which are never tried again: the others would not."""
        with self.together():
            return make()

    def backward(self, value: Tensor) -> None:
        with self.together():
            value.backward()

    def even(self, bins: Sequence[list[int]]) -> list[list[int]]:
        """This rank's micro-batches, and empty ones until all ranks have equally many."""
        most = max(self.ranks.gather(lambda: len(bins)))
        return [*bins, *([] for _ in range(most - len(bins)))]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within the block ranks wait for each other: an error of this one is not told but ends it.

        Raises:
            Lost: another rank is gone. Stranded: this one failed.
        """
        try:
            yield
        except WelltunedError:  # said already, or on all ranks alike
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and _is_connection(error):
                raise self.ranks.lost(error) from error
            raise self._stranded(error) from error

    def _stranded(self, error: Exception) -> Stranded:
        text = f"process {self.ranks.rank} of {self.ranks.size}"
        if is_out_of_memory(error):
            text += " ran out of memory in a pass that all share; the last checkpoint is as it was; lower token_budget"
            return Stranded(f"{text} in the recipe and: welltuned resume RUN --accept-changes")
        return Stranded(f"{text} failed in a pass that all share ({type(error).__name__}: {error})")


def _live(head: Head, module: nn.Module) -> Head:
    """The head with its weights as they are in this pass."""
    return replace(head, w_VH=module.get_parameter("weight"), bias_V=module._parameters.get("bias"))


def _is_connection(error: RuntimeError) -> bool:
    """What gloo and NCCL raise; gloo's errors are plain ones that name its source."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "nccl" in str(error).lower()
