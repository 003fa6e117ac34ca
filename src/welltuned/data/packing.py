"""Pack whole examples into fixed token budgets, best fit first, so that almost no budget is left empty."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Bins of indices into `lengths` (tokens), each bin's lengths summing to at most `budget` tokens.

    Best-fit decreasing: longest first, each into the fullest bin that still takes it. Deterministic (ties by index).
    An example longer than the budget gets a bin of its own. The distinct free spaces are at most `budget` many and are
    kept sorted, so the cost is O(n log n) comparisons for the sort and O(log budget) for each search.
    """
    if budget < 1:
        raise ValueError(f"the budget must be at least one token, not {budget}")
    if lengths and min(lengths) < 1:
        raise ValueError("every example must have at least one token")
    bins: list[list[int]] = []
    spaces: list[int] = []  # distinct free spaces of open bins, ascending
    bins_with_space: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        at = bisect_left(spaces, length)
        if at == len(spaces):
            chosen, space = len(bins), budget
            bins.append([])
        else:
            space = spaces[at]
            chosen = bins_with_space[space].pop()
            if not bins_with_space[space]:
                del bins_with_space[space], spaces[at]
        bins[chosen].append(index)
        left = space - length
        if left > 0:
            if left not in bins_with_space:
                insort(spaces, left)
                bins_with_space[left] = []
            bins_with_space[left].append(chosen)
    return bins
