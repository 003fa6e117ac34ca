"""Packed rows of a few static lengths, for decoder layers that are compiled for these alone; or of any length.

A micro-batch is followed by an inert tail up to the next length: examples of their own, which nothing attends to and no
label is in. So nothing but the rounding of larger products changes. Where that would be much padding, the length is no
part of the compiled code, and nothing is padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from welltuned.kernels.lora import Dropout

MULTIPLE = 64  # lengths are multiples of this, which is as fine as a GPU's tiles


@dataclass(slots=True)
class Static:
    """The lengths that a model's layers are compiled for, and what came of it.

    Attributes:
        lengths: ascending. `any_length`: they are compiled for every length instead. Neither: they are not compiled.
        longest: no row is longer, nor a piece of the tail.
        graphs: how often something was compiled. `most`: as often as lengths and kinds of layers ask for.
        tokens, padding: of micro-batches that ran compiled. `plain`: micro-batches that did not.
        problem: why compiled code is no longer used.
        noted: adapters and dropout of the latest micro-batch, and their ledger.
    """

    lengths: tuple[int, ...] = ()
    longest: int = 0
    graphs: int = 0
    most: int = 0
    tokens: int = 0
    padding: int = 0
    plain: int = 0
    problem: str | None = None
    any_length: bool = False
    noted: tuple[tuple[int, ...] | None, Dropout, Tensor] | None = None

    @property
    def ready(self) -> bool:
        return bool(self.lengths) or self.any_length

    def fitting(self, lengths: Sequence[int]) -> int | None:
        """The static length for a micro-batch of these rows; None where it runs as it is."""
        if not self.ready or not torch.is_grad_enabled():
            return None
        if self.most and self.graphs > self.most:
            self.give_up(f"its layers were compiled {self.graphs} times, where {self.most} would do")
        if self.problem is not None:
            return None
        total = sum(lengths)
        length = total if self.any_length else next((n for n in self.lengths if n >= total), None)
        if length is None or max(lengths) > self.longest or length < 2:  # of 1, torch makes code of its own
            self.plain += 1
            return None
        self.tokens += total
        self.padding += length - total
        return length

    def give_up(self, why: str) -> None:
        """Run as without compiled code from here on."""
        self.problem = why

    def tail(self, rows: int) -> list[int]:
        """So many rows as inert examples."""
        whole, rest = divmod(rows, self.longest)
        return [self.longest] * whole + [rest] * (rest > 0)


_STATIC: WeakKeyDictionary[nn.Module, Static] = WeakKeyDictionary()


def static_of(model: nn.Module) -> Static | None:
    """The static lengths of a model, where its layers can run compiled."""
    return _STATIC.get(model)


def set_static(model: nn.Module, static: Static) -> None:
    """From here on the model's micro-batches have these lengths."""
    _STATIC[model] = static


def static_lengths(sizes: Sequence[int], most: int, multiple: int = MULTIPLE) -> tuple[int, ...]:
    """At most so many lengths, ascending, that take every size with the least padding in total.

    By dynamic programming over the distinct sizes, rounded up: the best choice of m lengths for the smallest ones is
    that of m - 1 for some of them, and one more length for the rest.
    """
    rounded = [-(-n // multiple) * multiple for n in sizes]
    distinct = sorted(set(rounded))
    count = [rounded.count(n) for n in distinct]
    total = [0]
    for n in count:
        total.append(total[-1] + n)
    # tokens laid out for the first j distinct sizes: each weighs what the length that takes it does
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())] + [(total[j + 1] * n, (n,)) for j, n in enumerate(distinct)]
    for _ in range(most - 1):
        best = [
            best[0],
            *(
                min(
                    (best[i][0] + (total[j] - total[i]) * distinct[j - 1], (*best[i][1], distinct[j - 1]))
                    for i in range(j)
                )
                for j in range(1, len(best))
            ),
        ]
    return best[-1][1]


def padded_share(sizes: Sequence[int], lengths: Sequence[int]) -> float:
    """Share of padding in what passes through the model; sizes beyond the longest length pass as they are."""
    laid = [min((n for n in lengths if n >= size), default=size) for size in sizes]
    return 1 - sum(sizes) / sum(laid) if laid else 0.0
