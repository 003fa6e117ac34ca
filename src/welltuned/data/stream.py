"""Which rows are held out, and which rows make each update: pure functions of (seed, position), so a run can resume."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from welltuned.data.conversation import Conversation

# A mean loss over n rows has a standard error of its deviation / sqrt(n): 512 rows bring it to 4 % of the deviation
# between rows, and more would only cost evaluation time.
MOST_HELD_OUT = 512
FEW_ROWS = 1_000


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Indices of the rows trained on and of those held out, each ascending, and a sentence on what was done."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]
    sentence: str


def split_held_out(rows: Sequence[Conversation], fraction: float | None = None, seed: int = 0) -> HeldOut:
    """Hold out whole groups of rows that share a prompt, so that no held-out prompt is trained on.

    `fraction` None: 10 % of fewer than 1,000 rows, else 5 %, at most 512 rows. A given fraction is not capped.
    """
    if fraction is not None and not 0 <= fraction < 1:
        raise ValueError(f"the held-out fraction must be in [0, 1), not {fraction}")
    count = len(rows)
    if fraction == 0 or count < 2:
        why = "as asked" if fraction == 0 else "there is only one row" if count else "there are no rows"
        return HeldOut(tuple(range(count)), (), f"no row is held out: {why}")
    share = fraction if fraction is not None else (0.10 if count < FEW_ROWS else 0.05)
    target = min(max(1, round(share * count)), count - 1)
    how = f"{share:.0%} of {count:,} rows"
    if fraction is None and target > MOST_HELD_OUT:
        target, how = MOST_HELD_OUT, f"capped at {MOST_HELD_OUT} of {count:,} rows"
    groups: dict[Hashable, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.prompt(), []).append(index)
    held = _choose_groups(list(groups.values()), target, seed)
    how += "; rows that share a prompt stay on one side" if len(groups) < count else ""
    if not held:
        held = sorted(_permutation(count, seed, 0)[:target].tolist())
        how = f"{share:.0%} of {count:,} rows; most rows share one prompt, so held-out prompts are also trained on"
    train = sorted(set(range(count)) - set(held))
    return HeldOut(tuple(train), tuple(held), f"{len(held):,} rows are held out ({how})")


def _choose_groups(groups: list[list[int]], target: int, seed: int) -> list[int]:
    """Groups in random order while they fit into `target` rows; the smallest one if none fits; [] if that is half."""
    held: list[int] = []
    for index in _permutation(len(groups), seed, 0).tolist():
        if len(held) + len(groups[index]) <= target:
            held += groups[index]
    smallest = min(groups, key=len)
    if not held and 2 * len(smallest) <= sum(map(len, groups)):
        held = list(smallest)
    return sorted(held)


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
    if rows < 1 or effective_batch < 1 or step < 0:
        raise ValueError(f"no update {step} of {effective_batch} rows can be cut from {rows} rows")
    epoch, within = divmod(step, steps_per_epoch(rows, effective_batch))
    start = within * effective_batch
    return [int(i) for i in _permutation(rows, seed, epoch + 1)[start : start + effective_batch]]


@lru_cache(maxsize=4)
def _permutation(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Permutation [rows]. Sorting raw 64-bit draws, since numpy keeps the bit stream stable over versions, and not
    what `Generator.permutation` makes of it. Epoch 0 is the held-out split's."""
    draws = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(rows)
    order = np.argsort(draws, kind="stable").astype(np.int64)
    order.flags.writeable = False  # shared by the cache
    return order
