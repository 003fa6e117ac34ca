"""Rows chosen from one or several stores, in a fixed order and cut at max_length: a view, so nothing is copied."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from welltuned.data.render import Example, shortened
from welltuned.data.store import MARKS, RECORD, ExampleStore


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Ascending row numbers [n] of one store."""

    store: ExampleStore
    index: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Rows(Sequence[Example]):
    """The parts' rows, one part after the other; each example is read when it is asked for.

    A column is the whole row's, whatever `max_length` leaves of it.
    """

    parts: tuple[Part, ...]
    max_length: int | None = None

    def __len__(self) -> int:
        return sum(len(part.index) for part in self.parts)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index: int | slice) -> "Example | Rows":
        if isinstance(index, slice):
            chosen = np.zeros(len(self), bool)
            if index.step is not None and index.step < 1:
                raise ValueError("rows are sliced forwards")
            chosen[index] = True
            return self.where(chosen)
        store, row = self._place(index)
        example = store[row]
        return example if self.max_length is None else shortened(example, self.max_length)

    def origin(self, index: int) -> str:
        store, row = self._place(index)
        return store.origin(row)

    def column(self, name: str) -> NDArray[Any]:
        """One field of every row's record."""
        out = np.empty(len(self), RECORD[name])
        start = 0
        for part in self.parts:
            np.take(part.store.column(name), part.index, out=out[start : start + len(part.index)], mode="clip")
            start += len(part.index)
        return out

    def owner(self) -> NDArray[np.uint16]:
        """The number of the part that each row belongs to."""
        return np.repeat(np.arange(len(self.parts), dtype=np.uint16), self.sizes())

    def sizes(self) -> list[int]:
        """Rows of each part."""
        return [len(part.index) for part in self.parts]

    def where(self, keep: NDArray[np.bool_]) -> "Rows":
        """The rows for which `keep` [n] is true; a part without any stays, empty."""
        borders = np.cumsum(self.sizes())[:-1]
        parts = zip(self.parts, np.split(keep, borders), strict=True)
        return replace(self, parts=tuple(Part(part.store, part.index[k]) for part, k in parts))

    def within(self, max_length: int | None) -> "Rows":
        return replace(self, max_length=max_length)

    def tally(self) -> NDArray[np.int64]:
        """How many tokens have each mark [MARKS], after the cut."""
        return sum((p.store.tally(p.index, self.max_length) for p in self.parts), np.zeros(MARKS, np.int64))

    def _place(self, index: int) -> tuple[ExampleStore, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        ends = list(accumulate(self.sizes()))
        at = bisect_right(ends, index)
        part = self.parts[at]
        return part.store, int(part.index[index - (ends[at] - len(part.index))])


def all_rows(stores: Sequence[ExampleStore]) -> Rows:
    """Every row of every store."""
    return Rows(tuple(Part(store, np.arange(len(store))) for store in stores))
