"""Lines of numbers kept as columns: a million updates are a hundred megabytes, and can be added to."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_POINTS = 2_000  # of a curve: more than the pixels that it is drawn on
_SMOOTHED = 20_000  # values of a long curve that are averaged first

Floats = NDArray[np.float64]


class Table:
    """Numbers by name, one row a line; what a line lacks is NaN."""

    def __init__(self) -> None:
        self._columns: dict[str, array[float]] = {}
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    @property
    def names(self) -> Sequence[str]:
        """In the order in which they first came."""
        return tuple(self._columns)

    def add(self, line: Mapping[str, Any]) -> None:
        """Append the numbers of a line; text and the rest are left out."""
        for name, value in line.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                column = self._columns.get(name)
                if column is None:
                    column = self._columns[name] = array("d", [np.nan]) * self._rows
                column.append(value)
        self._rows += 1
        for column in self._columns.values():
            if len(column) < self._rows:
                column.append(np.nan)

    def column(self, name: str) -> Floats:
        """One column [rows]; all NaN where no line has it."""
        found = self._columns.get(name)
        return np.full(self._rows, np.nan) if found is None else np.array(found)

    def rows(self, most: int) -> Iterator[dict[str, float | None]]:
        """The first lines again, None for what is missing or no finite number."""
        for at in range(min(most, self._rows)):
            yield {name: column[at] if np.isfinite(column[at]) else None for name, column in self._columns.items()}


def thinned(values: Floats, most: int = MOST_POINTS) -> NDArray[np.intp]:
    """Which of the values to draw: all of few; of many the lowest and the highest of every stretch, and both ends.

    >>> thinned(np.array([1.0, 5.0, 2.0, 0.0, 3.0, 3.0]), most=4).tolist()
    [0, 1, 3, 5]
    """
    count = len(values)
    if count <= most:
        return np.arange(count)
    stretches = max(1, (most - 2) // 2)
    edges = np.arange(stretches + 1) * count // stretches
    low, high = np.nan_to_num(values, nan=np.inf), np.nan_to_num(values, nan=-np.inf)
    kept = [0, count - 1]
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        if np.isfinite(values[start:stop]).any():
            kept += [start + int(low[start:stop].argmin()), start + int(high[start:stop].argmax())]
    return np.unique(kept)


def smoothed(values: Floats, share: float = 0.05) -> Floats:
    """The average of what came before, weighted less the longer ago: over about `share` of the series, at least 4.

    The first values are averages of few, so that the curve does not start at zero (the correction of Adam's averages).
    Of a long series stretches are averaged first.
    """
    count = len(values)
    stretches = min(count, _SMOOTHED)
    if not count:
        return values
    edges = np.arange(stretches + 1) * count // stretches
    known = np.isfinite(values)
    sums = np.add.reduceat(np.where(known, values, 0.0), edges[:-1])
    counts = np.add.reduceat(known.astype(float), edges[:-1])
    keep = 1 - 1 / max(4.0, share * stretches)
    out, total, weight = np.full(stretches, np.nan), 0.0, 0.0
    for at, (one, number) in enumerate(zip(sums.tolist(), counts.tolist(), strict=True)):
        if number:
            total, weight = keep * total + (1 - keep) * one / number, keep * weight + (1 - keep)
        if weight:
            out[at] = total / weight
    return out[np.searchsorted(edges, np.arange(count), side="right") - 1]


def plain(values: Floats, digits: int = 6) -> list[float | None]:
    """As JSON holds them, with so many significant digits: a page should not carry sixteen."""
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values]
