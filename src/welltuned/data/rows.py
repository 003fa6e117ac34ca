"""Rows chosen from one or several stores, in a fixed order and cut at max_length: a view, so nothing is copied.

Documents may lie in pieces instead: each begins with the token that the one before it ended with, so that every token
of the document but its first is learned exactly once.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from types import MappingProxyType
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from welltuned.data.render import Example, shortened
from welltuned.data.speakers import Speaker
from welltuned.data.store import MARKS, RECORD, ExampleStore


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Ascending row numbers [n] of one store.

    Attributes:
        starts: for documents in pieces of at most `piece` tokens, where in its row each begins [n].
    """

    store: ExampleStore
    index: NDArray[np.int64]
    starts: NDArray[np.int64] | None = None
    piece: int = 0

    def where(self, keep: NDArray[np.bool_]) -> "Part":
        return replace(self, index=self.index[keep], starts=None if self.starts is None else self.starts[keep])

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, or of each piece."""
        whole = self.store.column("length")[self.index].astype(np.int64)
        return whole if self.starts is None else np.minimum(whole - self.starts, self.piece)


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
        part, at = self._place(index)
        example = part.store[int(part.index[at])]
        if part.starts is not None:
            example = _piece(example, int(part.starts[at]), part.piece)
        return example if self.max_length is None else shortened(example, self.max_length)

    def origin(self, index: int) -> str:
        part, at = self._place(index)
        origin = part.store.origin(int(part.index[at]))
        return origin if part.starts is None else _origin(origin, int(part.starts[at]))

    def column(self, name: str) -> NDArray[Any]:
        """One field of every row's record; a piece of a document has its own."""
        out = np.empty(len(self), RECORD[name])
        start = 0
        for part in self.parts:
            rows = out[start : start + len(part.index)]
            np.take(part.store.column(name), part.index, out=rows, mode="clip")
            if part.starts is not None and name in _OF_PIECES:
                rows[:] = _OF_PIECES[name](part.lengths())
            start += len(part.index)
        return out

    def kept(self, max_length: int) -> NDArray[np.int64]:
        """Tokens that are left of every row [n] where each sequence is cut to `max_length`."""
        length, shared, second = (self.column(name).astype(np.int64) for name in ("length", "shared", "second"))
        room = np.maximum(max_length - shared, 0)
        return np.minimum(shared, max_length) + np.minimum(second - shared, room) + np.minimum(length - second, room)

    def in_pieces(self, max_length: int) -> "Rows":
        """Documents of more than `max_length` tokens in pieces of at most that; the other rows as they are."""
        return replace(self, parts=tuple(_in_pieces(part, max_length) for part in self.parts))

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
        return replace(self, parts=tuple(part.where(k) for part, k in parts))

    def within(self, max_length: int | None) -> "Rows":
        return replace(self, max_length=max_length)

    def tally(self) -> NDArray[np.int64]:
        """How many tokens have each mark [MARKS], after the cut."""
        return sum((self._tally(part) for part in self.parts), np.zeros(MARKS, np.int64))

    def _tally(self, part: Part) -> NDArray[np.int64]:
        if part.starts is None:
            return part.store.tally(part.index, self.max_length)
        first = part.starts == 0  # whose first token may be the template's
        counts = part.store.tally(part.index[first], 1)
        lengths = part.lengths() if self.max_length is None else np.minimum(part.lengths(), self.max_length)
        counts[2 * Speaker.DOCUMENT] += int((~first).sum())
        counts[2 * Speaker.DOCUMENT + 1] += int((lengths - 1).sum())
        return counts

    def _place(self, index: int) -> tuple[Part, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        ends = list(accumulate(self.sizes()))
        at = bisect_right(ends, index)
        part = self.parts[at]
        return part, index - (ends[at] - len(part.index))


def all_rows(stores: Sequence[ExampleStore]) -> Rows:
    """Every row of every store."""
    return Rows(tuple(Part(store, np.arange(len(store))) for store in stores))


_OF_PIECES: Mapping[str, Callable[[NDArray[np.int64]], NDArray[np.int64]]] = MappingProxyType(
    {
        **dict.fromkeys(("length", "longest", "shared", "second"), lambda lengths: lengths),
        **dict.fromkeys(("trained", "last"), lambda lengths: lengths - 1),
        "first": np.ones_like,
        "needed": lambda lengths: np.full_like(lengths, 2),
    }
)


def _in_pieces(part: Part, max_length: int) -> Part:
    """Rows of which all but the first token is trained, as documents are, are cut; others are left as they are."""
    if part.starts is not None:  # in longer pieces: begin anew
        part = part if part.piece <= max_length else Part(part.store, part.index[part.starts == 0])
    lengths = part.lengths()
    whole = part.store.column("trained")[part.index] == lengths - 1
    if part.starts is not None or not whole.all() or not len(lengths) or int(lengths.max()) <= max_length:
        return part
    pieces = np.maximum(-(-(lengths - 1) // (max_length - 1)), 1)
    number = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return Part(part.store, np.repeat(part.index, pieces), number * (max_length - 1), max_length)


def _piece(example: Example, start: int, max_length: int) -> Example:
    """Tokens [start, start + max_length) of a document; what stands first is there to predict from."""
    rows = slice(start, start + max_length)
    mask = example.mask[rows].copy()
    mask[:1] = False
    roles = None if example.roles is None else example.roles[rows]
    return replace(example, ids=example.ids[rows], mask=mask, roles=roles, origin=_origin(example.origin, start))


def _origin(origin: str, start: int) -> str:
    return f"{origin} (from token {start:,})" if start else origin
