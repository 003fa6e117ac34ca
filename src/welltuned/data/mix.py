"""Which rows make an epoch of one or several datasets, and in which order: a pure function of (seed, epoch)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from welltuned.data.stream import _permutation, position_of, steps_per_epoch
from welltuned.errors import InputError


@dataclass(frozen=True, slots=True)
class Mixture:
    """How many training rows each dataset has, and how many of them an epoch takes.

    Row numbers count through the datasets in their order, as `Rows` does.
    """

    rows: tuple[int, ...]
    quotas: tuple[int, ...]
    seed: int

    @property
    def in_a_set(self) -> int:
        """How many updates in a row are made of one set of rows; only between sets may a run be saved."""
        return 1

    @property
    def epoch_rows(self) -> int:
        return sum(self.quotas)

    def steps_per_epoch(self, effective_batch: int) -> int:
        return steps_per_epoch(self.epoch_rows, effective_batch)

    def update(self, effective_batch: int, step: int) -> list[int]:
        """Row numbers of update `step` (from 0): the same at any world size and after a resume.

        An update never spans two epochs, so the last one of an epoch may be smaller.
        """
        epoch, start = position_of(self.epoch_rows, effective_batch, step)
        return [int(i) for i in epoch_order(self, epoch)[start : start + effective_batch]]


def mixture(
    rows: Sequence[int],
    seed: int,
    *,
    weights: Sequence[float] | None = None,
    counts: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> Mixture:
    """All rows of each dataset, or `counts` rows of each, or the largest epoch with shares like `weights` that repeats
    no row.

    Raises:
        InputError: not one number for each dataset, or a dataset without training rows.
    """
    for key, given in (("data_weights", weights), ("data_rows", counts)):
        if given is not None and len(given) != len(rows):
            what = f"{key} has a length of {len(given)}, and there are {len(rows)} datasets"
            raise InputError(what, where=key, mend="give one number for each")
    if len(rows) > 1 and not all(rows):
        empty = list(rows).index(0)
        where = f"dataset {empty + 1}" if names is None else names[empty]
        raise InputError("no training row of this dataset is left", where=where, mend="leave it out")
    if counts is not None:
        quotas = tuple(int(count) for count in counts)
    elif weights is not None:
        epoch = min(have / weight for have, weight in zip(rows, weights, strict=True))
        quotas = tuple(max(1, min(have, round(epoch * w))) for have, w in zip(rows, weights, strict=True))
    else:
        quotas = tuple(rows)
    return Mixture(tuple(rows), quotas, seed)


@lru_cache(maxsize=1)
def epoch_order(mixed: Mixture, epoch: int) -> NDArray[np.int64]:
    """Row numbers [epoch_rows] of an epoch, in the order in which they are trained on."""
    starts = np.cumsum([0, *mixed.rows[:-1]])
    parts = [
        start + _turns(have, quota, mixed.seed, epoch, dataset)
        for dataset, (start, have, quota) in enumerate(zip(starts, mixed.rows, mixed.quotas, strict=True))
    ]
    order = np.concatenate(parts)[_permutation(mixed.epoch_rows, mixed.seed, epoch + 1)]
    order.flags.writeable = False  # shared by the cache
    return order


def _turns(have: int, quota: int, seed: int, epoch: int, dataset: int) -> NDArray[np.int64]:
    """`quota` rows of a dataset that has `have`.

    Epochs are consecutive windows of one order that is gone through again and again. So every row gets its turn, none
    stands twice in an epoch that has room for fewer than all, and in a longer one none stands more than once more than
    any other.
    """
    if quota == have:
        return np.arange(have)
    window = (epoch * quota + np.arange(quota)) % have
    return np.sort(_permutation(have, seed, 0, dataset + 1)[window])
