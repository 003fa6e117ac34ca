"""DatasetFacts: the numbers of a dataset that choices depend on. Built from lengths, so it knows no file format."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from welltuned.data.conversation import Format, Kind, Teaching
from welltuned.data.dataset import Dataset
from welltuned.data.rows import Rows
from welltuned.errors import InputError

SHORT_ANSWER = 2  # trained tokens: a token and the one that ends the turn
LONG_TIMES = 8  # as long as half of the rows, at least
Counts = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureFacts:
    """What one of the training datasets is of an epoch; `share` is that of the tokens."""

    name: str
    rows: int
    rows_of_epoch: int
    tokens_of_epoch: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of one part of the rows: prompts, or answers."""

    mean: float
    median: int
    p95: int
    p99: int
    max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFacts:
    """Rows and tokens are those of an epoch: every training row once, unless the recipe takes more or fewer of some.

    `length_percentiles` holds the 0th to the 100th percentile. A pair is one row with two sequences: its `tokens` are
    those of both, its length is that of the longer. A prompt to be answered by sampling is a row without a trained
    token. `prompts`, `chosen` and `rejected` are known of pairs; of prompts `prompts` and, where the rows have them,
    `answers`; `desirable_share` of rows that are marked good or bad. `very_short_rows` have hardly an answer,
    `very_long_rows` are several times as long as half of the rows.
    """

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
    very_short_rows: int = 0
    very_long_rows: int = 0
    mixture: tuple[MixtureFacts, ...] = ()
    sequences_per_row: int = 1
    prompts: Lengths | None = None
    chosen: Lengths | None = None
    rejected: Lengths | None = None
    answers: Lengths | None = None
    desirable_share: float | None = None

    @property
    def is_text(self) -> bool:
        """Whether every row is plain text to go on with: continued pretraining, not instruction tuning."""
        return self.format_name == str(Format.TEXT)

    @property
    def supervised_share(self) -> float:
        return self.supervised_tokens / self.tokens

    @property
    def length_mean(self) -> float:
        """Of a sequence; a pair has two."""
        return self.tokens / self.rows / self.sequences_per_row

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
    passes: npt.ArrayLike | None = None,
    desirable: npt.ArrayLike | None = None,
) -> DatasetFacts:
    """Tokens and trained tokens of every example, training and held out, in; facts out.

    `passes` says how often an epoch takes each training row, on average; None is once. `desirable` says which training
    rows are marked good, where rows are marked.
    """
    lengths, supervised = _counts(train_lengths), _counts(train_supervised)
    held, held_supervised = _counts(heldout_lengths), _counts(heldout_supervised)
    if lengths.size == 0:
        raise InputError("there are no training rows", where="data", mend="give a file with rows")
    if lengths.shape != supervised.shape or held.shape != held_supervised.shape:
        raise ValueError("one supervised count for every length")
    if int(supervised.sum()) == 0:
        mend = "the rows need answers; see `welltuned data FILE --model M --show 1`"
        raise InputError("no token of the training rows is trained on", where="data", mend=mend)
    times = None if passes is None else np.asarray(passes, dtype=np.float64)
    marked = None if desirable is None else np.asarray(desirable, dtype=bool)
    return DatasetFacts(
        format_name=format_name,
        rows=int(lengths.size) if times is None else round(float(times.sum())),
        heldout_rows=int(held.size),
        tokens=int(lengths.sum()) if times is None else round(float(lengths @ times)),
        supervised_tokens=int(supervised.sum()) if times is None else round(float(supervised @ times)),
        heldout_tokens=int(held.sum()),
        heldout_supervised_tokens=int(held_supervised.sum()),
        **_quantiles(lengths, times),
        unsupervised_rows=int((supervised == 0).sum()),
        duplicates=duplicates,
        heldout_overlap=heldout_overlap,
        very_short_rows=int(((supervised > 0) & (supervised <= SHORT_ANSWER)).sum()),
        very_long_rows=int((lengths > LONG_TIMES * np.median(lengths)).sum()),
        desirable_share=None if marked is None else round(float(np.average(marked, weights=times)), 4),
    )


def pair_facts(
    prompts: npt.ArrayLike,
    chosen: npt.ArrayLike,
    rejected: npt.ArrayLike,
    heldout_prompts: npt.ArrayLike,
    heldout_chosen: npt.ArrayLike,
    heldout_rejected: npt.ArrayLike,
    format_name: str,
    duplicates: int = 0,
    heldout_overlap: int = 0,
    passes: npt.ArrayLike | None = None,
) -> DatasetFacts:
    """Tokens of every pair's prompt and of both its answers, training and held out, in; facts out.

    `passes` as in `dataset_facts`.
    """
    prompt, good, bad = _counts(prompts), _counts(chosen), _counts(rejected)
    held, held_good, held_bad = _counts(heldout_prompts), _counts(heldout_chosen), _counts(heldout_rejected)
    facts = dataset_facts(
        *(2 * prompt + good + bad, good + bad, 2 * held + held_good + held_bad, held_good + held_bad),
        format_name=format_name,
        duplicates=duplicates,
        heldout_overlap=heldout_overlap,
        passes=passes,
    )
    times = None if passes is None else np.asarray(passes, dtype=np.float64)
    return replace(
        facts,
        **_quantiles(prompt + np.maximum(good, bad), times),
        sequences_per_row=2,
        prompts=lengths_of(prompt),
        chosen=lengths_of(good),
        rejected=lengths_of(bad),
    )


def prompt_facts(
    prompts: npt.ArrayLike,
    heldout_prompts: npt.ArrayLike,
    format_name: str,
    answers: npt.ArrayLike | None = None,
    duplicates: int = 0,
    heldout_overlap: int = 0,
) -> DatasetFacts:
    """Tokens of every prompt to be answered by sampling, and of the rows' own answers where they have some."""
    prompt, held = _counts(prompts), _counts(heldout_prompts)
    known = _counts(()) if answers is None else _counts(answers)
    facts = dataset_facts(
        *(prompt, np.ones_like(prompt), held, np.zeros_like(held)),
        format_name=format_name,
        duplicates=duplicates,
        heldout_overlap=heldout_overlap,
    )
    return replace(
        facts,
        supervised_tokens=0,
        very_short_rows=0,
        prompts=lengths_of(prompt),
        answers=lengths_of(known) if known.size else None,
    )


def lengths_of(values: npt.ArrayLike) -> Lengths:
    """The quantiles of at least one length, each that of a real row."""
    lengths = _counts(values)
    median, p95, p99, longest = (int(v) for v in np.percentile(lengths, [50, 95, 99, 100], method="higher"))
    return Lengths(mean=round(float(lengths.mean()), 1), median=median, p95=p95, p99=p99, max=longest)


def facts_of(dataset: Dataset) -> DatasetFacts:
    """The facts of the data that a recipe named, as they are before any cut."""
    train, held, mixed = dataset.train, dataset.held_out, dataset.mixture
    even = mixed.quotas == mixed.rows
    lengths = train.column("length")
    times = np.array(mixed.quotas) / np.maximum(mixed.rows, 1)
    left = {kind: dataset.findings[kind].rows - dataset.findings[kind].dropped for kind in (Kind.DUPLICATE, Kind.LEAK)}
    counted: dict[str, Any] = {
        "format_name": dataset.formats,
        "duplicates": left[Kind.DUPLICATE],
        "heldout_overlap": 0 if dataset.findings[Kind.LEAK].dropped else left[Kind.LEAK],
        "passes": None if even else times[train.owner()],
    }
    if dataset.reading.teaching is Teaching.PAIRS:
        facts = pair_facts(*_forks(train), *_forks(held), **counted)
    else:
        labels = train.column("label")
        facts = dataset_facts(
            lengths,
            train.column("trained"),
            held.column("length") if len(held) else (),
            held.column("trained") if len(held) else (),
            desirable=labels > 0 if dataset.reading.teaching is Teaching.LABELS else None,
            **counted,
        )
    if len(mixed.rows) == 1 and even:
        return facts
    tokens = np.bincount(train.owner(), weights=lengths, minlength=len(times)) * times
    return replace(
        facts,
        mixture=tuple(
            MixtureFacts(
                name=name,
                rows=have,
                rows_of_epoch=quota,
                tokens_of_epoch=round(n),
                share=round(n / float(tokens.sum()), 4),
            )
            for name, have, quota, n in zip(
                dataset.recipe.datasets, mixed.rows, mixed.quotas, tokens.tolist(), strict=True
            )
        ),
    )


def _forks(rows: Rows) -> tuple[Counts, Counts, Counts]:
    """Tokens of every pair's prompt, of its chosen answer and of its rejected one."""
    if not len(rows):
        return _counts(()), _counts(()), _counts(())
    shared, second, whole = (_counts(rows.column(name)) for name in ("shared", "second", "length"))
    return shared, second - shared, whole - second


def _quantiles(lengths: Counts, times: npt.NDArray[np.float64] | None) -> dict[str, Any]:
    percentiles = tuple(int(value) for value in _percentiles(lengths, times))
    names = {"length_min": 0, "length_median": 50, "length_p95": 95, "length_p99": 99, "length_max": 100}
    return {name: percentiles[at] for name, at in names.items()} | {"length_percentiles": percentiles}


def _percentiles(lengths: Counts, times: npt.NDArray[np.float64] | None) -> Counts:
    """Each is the length of a real row, so that a limit set at it cuts nothing below it."""
    if times is None:
        return np.percentile(lengths, np.arange(101), method="higher").astype(int)
    order = np.argsort(lengths, kind="stable")
    weight = np.cumsum(times[order])
    at = np.searchsorted(weight, np.arange(101) / 100 * weight[-1], "left")
    return lengths[order][np.minimum(at, len(order) - 1)]


def _counts(values: npt.ArrayLike) -> Counts:
    return np.asarray(values, dtype=np.int64).reshape(-1)
