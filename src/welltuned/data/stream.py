"""Which rows are held out, and which rows make each update: pure functions of (seed, position), so a run can resume."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapreplace

import numpy as np
from numpy.typing import NDArray

# A mean loss over n rows has a standard error of its deviation / sqrt(n): 512 rows bring it to 4 % of the deviation
# between rows, and more would only cost evaluation time.
MOST_HELD_OUT = 512
FEW_ROWS = 1_000
AT_A_TIME = 2**20  # values compared at once


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Which rows are held out [n], and a sentence on what was done."""

    held_out: NDArray[np.bool_]
    sentence: str


def hold_out(
    groups: NDArray[np.uint64],
    fraction: float | None = None,
    seed: int = 0,
    *,
    owner: NDArray[np.uint16] | None = None,
    shared: str = "a prompt",
    finer: NDArray[np.uint64] | None = None,
) -> Split:
    """Hold out whole groups of rows, so that no held-out prompt is trained on.

    Args:
        groups: a number for each row [n]; rows of the same number stay on one side.
        fraction: None is 10 % of fewer than 1,000 rows, else 5 %, at most 512 rows. A given fraction is not capped.
        owner: the dataset that each row belongs to [n]; each gives its share. A group belongs to that of its first row.
        shared: what rows of a group share, for the sentence.
        finer: another number for each row [n], by which groups larger than a dataset's share of the held-out rows are
            divided: conversations that only begin alike are different ones.
    """
    if fraction is not None and not 0 <= fraction < 1:
        raise ValueError(f"the held-out fraction must be in [0, 1), not {fraction}")
    count = len(groups)
    if fraction == 0 or count < 2:
        why = "as asked" if fraction == 0 else "there is only one row" if count else "there are no rows"
        return Split(np.zeros(count, bool), f"no row is held out: {why}")
    share = fraction if fraction is not None else (0.10 if count < FEW_ROWS else 0.05)
    target = min(max(1, round(share * count)), count - 1)
    how = f"{share:.0%} of {count:,} rows"
    if fraction is None and target > MOST_HELD_OUT:
        target, how = MOST_HELD_OUT, f"capped at {MOST_HELD_OUT} of {count:,} rows"
    found = _grouped(groups, owner, target)
    divided = np.zeros(count, bool)
    if finer is not None:
        divided = _divisible(groups, finer, among(groups, groups[found.firsts[found.too_large]]))
    if finer is not None and divided.any():
        groups = np.where(divided, finer, groups)
        found = _grouped(groups, owner, target)
    held = among(groups, groups[found.firsts[_choose(found, seed)]])
    how += f"; rows that share {shared} stay on one side" if len(found.sizes) < count else ""
    if divided.any() and held[divided].any():
        how += f"; {int(divided.sum()):,} rows begin alike, and are divided by what they are asked last"
    if not held.any():
        held[_permutation(count, seed, 0)[:target]] = True
        how = f"{share:.0%} of {count:,} rows; most rows share {_one(shared)}, so held-out prompts are also trained on"
    rows = int(held.sum())
    return Split(held, f"{rows:,} {'row is' if rows == 1 else 'rows are'} held out ({how})")


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """Groups of rows by their first rows, ascending: those rows [g], sizes [g] and datasets [g], and how many rows are
    to be held out of each dataset."""

    firsts: NDArray[np.int64]
    sizes: NDArray[np.int32]
    home: NDArray[np.uint16]
    quotas: NDArray[np.int64]

    @property
    def too_large(self) -> NDArray[np.bool_]:
        """Groups that can never be held out as a whole [g]."""
        return self.sizes > self.quotas[self.home]


def _divisible(groups: NDArray[np.uint64], finer: NDArray[np.uint64], wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The wanted rows whose group holds more than one finer one [n]."""
    _, firsts, group = np.unique(groups[wanted], return_index=True, return_inverse=True)
    own = finer[wanted]
    several = np.zeros(len(firsts), bool)
    several[group[own != own[firsts][group]]] = True
    result = wanted.copy()
    result[wanted] = several[group]
    return result


def _grouped(groups: NDArray[np.uint64], owner: NDArray[np.uint16] | None, target: int) -> _Groups:
    firsts, sizes = _in_order(groups)
    home = np.zeros(len(sizes), np.uint16) if owner is None else owner[firsts]
    quotas = _quotas(np.bincount(home, weights=sizes).astype(np.float64), target)
    return _Groups(firsts, sizes, home, np.array(quotas, np.int64))


def _choose(found: _Groups, seed: int) -> NDArray[np.bool_]:
    """The groups that are held out [g]."""
    chosen = np.zeros(len(found.sizes), bool)
    for dataset, quota in enumerate(found.quotas.tolist()):
        mine = np.flatnonzero(found.home == dataset)
        chosen[mine[_choose_groups(found.sizes[mine], quota, seed)]] = True
    return chosen


def _one(shared: str) -> str:
    return "one" + shared.removeprefix("a") if shared.startswith("a ") else shared


def among(values: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each value [n] is one of `wanted`: np.isin, which takes a minute and a gigabyte for ten million."""
    found = np.zeros(len(values), bool)
    sought = np.sort(wanted)
    for start in range(0, len(values) if len(sought) else 0, AT_A_TIME):
        part = values[start : start + AT_A_TIME]
        at = np.minimum(np.searchsorted(sought, part), len(sought) - 1)
        found[start : start + AT_A_TIME] = sought[at] == part
    return found


def _in_order(groups: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The groups by their first rows: those rows [g] ascending, and the groups' sizes [g]."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    firsts = order[starts]  # the earliest of each group, since the sort is stable
    del order, ordered
    sizes = np.diff(starts, append=len(groups)).astype(np.int32)
    del starts
    by_first = np.argsort(firsts)
    return firsts[by_first], sizes[by_first]


def _quotas(rows: NDArray[np.float64], target: int) -> list[int]:
    """`target` rows divided among datasets by their sizes: at least one of each that can spare it, largest rest first.

    The remainders go to the larger ones, so that the sum is `target` wherever there are not more datasets than that.
    """
    exact = rows * target / rows.sum()
    quotas = np.maximum(np.floor(exact), (rows > 1).astype(float))
    for index in np.argsort(np.floor(exact) - exact, kind="stable"):
        if quotas.sum() < target and quotas[index] < rows[index]:
            quotas[index] += 1
    return [int(q) for q in quotas]


def _choose_groups(sizes: NDArray[np.int32], target: int, seed: int) -> NDArray[np.int64]:
    """Groups in random order while they fit into `target` rows; the smallest one if none fits; none if that is half."""
    if not len(sizes) or not target:
        return np.empty(0, np.int64)
    held: list[int] = []
    left = target
    for index in _permutation(len(sizes), seed, 0):
        size = int(sizes[index])
        if size <= left:
            held.append(int(index))
            left -= size
            if not left:
                break
    smallest = int(np.argmin(sizes))
    if not held and 2 * sizes[smallest] <= sizes.sum():
        held = [smallest]
    return np.array(held, np.int64)


def steps_per_epoch(rows: int, effective_batch: int) -> int:
    return math.ceil(rows / effective_batch)


def steps_per_run(rows: int, effective_batch: int, epochs: float) -> int:
    """Updates in `epochs` passes (a fraction is allowed), at least 1; a smaller last batch counts as an update."""
    return max(1, math.ceil(steps_per_epoch(rows, effective_batch) * epochs - 1e-9))


def update_indices(rows: int, seed: int, effective_batch: int, step: int) -> list[int]:
    """Indices of the rows of update `step` (from 0): a pure function, the same at any world size and after a resume.

    Each epoch is a permutation of its own, cut into effective batches. An update never spans two epochs, so the last
    one of an epoch is smaller when `effective_batch` does not divide `rows`: every row is seen exactly once an epoch.
    """
    epoch, start = position_of(rows, effective_batch, step)
    return [int(i) for i in _permutation(rows, seed, epoch + 1)[start : start + effective_batch]]


def position_of(rows: int, effective_batch: int, step: int) -> tuple[int, int]:
    """The epoch that an update belongs to, and how many of its rows come before it: with the seed, all of the state."""
    if rows < 1 or effective_batch < 1 or step < 0:
        raise ValueError(f"no update {step} of {effective_batch} rows can be cut from {rows} rows")
    epoch, within = divmod(step, steps_per_epoch(rows, effective_batch))
    return epoch, within * effective_batch


def balanced_shares(tokens: Sequence[int], world: int) -> list[list[int]]:
    """Which rows of an update each of `world` processes takes, for rows of so many tokens: ascending indices.

    The longest first, each to the process that has the fewest tokens; ties by number. A process may have none.

    >>> balanced_shares([5, 1, 4, 2], 2)
    [[0, 1], [2, 3]]
    """
    shares: list[list[int]] = [[] for _ in range(world)]
    loads = [(0, rank) for rank in range(world)]  # a heap: the least loaded first
    for index in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        load, rank = loads[0]
        shares[rank].append(index)
        heapreplace(loads, (load + tokens[index], rank))
    return [sorted(share) for share in shares]


@lru_cache(maxsize=2)
def _permutation(rows: int, seed: int, epoch: int, dataset: int = 0) -> NDArray[np.int64]:
    """Permutation [rows]. Sorting raw 64-bit draws, since numpy keeps the bit stream stable over versions, and not
    what `Generator.permutation` makes of it. Epoch 0 is the held-out split's, and with a dataset's number (from 1) the
    order in which that dataset's rows get their turn."""
    name = (seed, epoch, dataset) if dataset else (seed, epoch)
    draws = np.random.PCG64(np.random.SeedSequence(name)).random_raw(rows)
    order = np.argsort(draws, kind="stable").astype(np.int64, copy=False)
    order.flags.writeable = False  # shared by the cache
    return order
