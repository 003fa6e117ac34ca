"""Long series made short enough to draw, without losing a peak."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

MOST_POINTS = 2_000  # of a curve: more than the pixels that it is drawn on

Number = float | None
Line = Mapping[str, Any]


def thinned(values: Sequence[Number], most: int = MOST_POINTS) -> list[int]:
    """Which of the values to draw: all of few; of many the lowest and the highest of every stretch, and both ends.

    >>> thinned([1.0, 5.0, 2.0, 0.0, 3.0, 3.0], most=4)
    [0, 1, 3, 5]
    """
    count = len(values)
    if count <= most:
        return list(range(count))
    stretches = max(1, (most - 2) // 2)
    kept = {0, count - 1}
    for number in range(stretches):
        part = range(number * count // stretches, (number + 1) * count // stretches)
        known = [i for i in part if values[i] is not None]
        if known:
            kept |= {min(known, key=lambda i: values[i]), max(known, key=lambda i: values[i])}  # type: ignore[arg-type,return-value]
    return sorted(kept)


def smoothed(values: Sequence[Number], share: float = 0.05) -> list[Number]:
    """The average of what came before, weighted less the longer ago: over about `share` of the series.

    The first values are averages of few, so that the curve does not start at zero (the correction of Adam's averages).
    """
    keep = 1 - 1 / max(1.0, share * len(values))
    out: list[Number] = []
    total = weight = 0.0
    for value in values:
        if value is not None:
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight if weight else None)
    return out


def column(lines: Sequence[Line], name: str) -> list[Number]:
    """One key of every line; None where it is missing or no finite number."""
    return [_number(line.get(name)) for line in lines]


def _number(value: Any) -> Number:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def rounded(values: Sequence[Number], digits: int = 6) -> list[Number]:
    """With so many significant digits: a page should not carry sixteen."""
    return [None if value is None else float(f"{value:.{digits}g}") for value in values]
