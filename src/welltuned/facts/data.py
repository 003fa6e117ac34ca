"""DatasetFacts: the numbers of a dataset that choices depend on. Built from lengths, so it knows no file format."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from welltuned.errors import InputError

Counts = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFacts:
    """Tokens are counted over the training rows, once. `length_percentiles` holds the 0th to the 100th percentile."""

    format_name: str
    rows: int
    heldout_rows: int
    tokens: int
    supervised_tokens: int
    heldout_tokens: int
    heldout_supervised_tokens: int
    length_min: int
    length_median: int
    length_p95: int
    length_p99: int
    length_max: int
    length_percentiles: tuple[int, ...]
    unsupervised_rows: int = 0
    duplicates: int = 0
    heldout_overlap: int = 0

    @property
    def supervised_share(self) -> float:
        return self.supervised_tokens / self.tokens

    @property
    def length_mean(self) -> float:
        return self.tokens / self.rows

    def share_longer_than(self, length: int) -> float:
        """Share of the training rows that `length` would cut, to a percent."""
        return sum(1 for percentile in self.length_percentiles[1:] if percentile > length) / 100


def dataset_facts(
    train_lengths: npt.ArrayLike,
    train_supervised: npt.ArrayLike,
    heldout_lengths: npt.ArrayLike,
    heldout_supervised: npt.ArrayLike,
    format_name: str,
    duplicates: int = 0,
    heldout_overlap: int = 0,
) -> DatasetFacts:
    """Tokens and trained tokens of every example, training and held out, in; facts out."""
    lengths, supervised = _counts(train_lengths), _counts(train_supervised)
    held, held_supervised = _counts(heldout_lengths), _counts(heldout_supervised)
    if lengths.size == 0:
        raise InputError("there are no training rows", where="data", mend="give a file with rows")
    if lengths.shape != supervised.shape or held.shape != held_supervised.shape:
        raise ValueError("one supervised count for every length")
    if int(supervised.sum()) == 0:
        mend = "the rows need answers; see `welltuned data FILE --model M --show 1`"
        raise InputError("no token of the training rows is trained on", where="data", mend=mend)
    # "higher": a percentile is the length of a real row, so that a limit set at it cuts nothing below it
    percentiles = np.percentile(lengths, np.arange(101), method="higher").astype(int)
    return DatasetFacts(
        format_name=format_name,
        rows=int(lengths.size),
        heldout_rows=int(held.size),
        tokens=int(lengths.sum()),
        supervised_tokens=int(supervised.sum()),
        heldout_tokens=int(held.sum()),
        heldout_supervised_tokens=int(held_supervised.sum()),
        length_min=int(percentiles[0]),
        length_median=int(percentiles[50]),
        length_p95=int(percentiles[95]),
        length_p99=int(percentiles[99]),
        length_max=int(percentiles[100]),
        length_percentiles=tuple(int(value) for value in percentiles),
        unsupervised_rows=int((supervised == 0).sum()),
        duplicates=duplicates,
        heldout_overlap=heldout_overlap,
    )


def _counts(values: npt.ArrayLike) -> Counts:
    return np.asarray(values, dtype=np.int64).reshape(-1)
