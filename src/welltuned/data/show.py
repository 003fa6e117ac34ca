"""What a person looks at: how long the rows are, which of them to show, and each as runs of text, trained or not."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from welltuned.data.render import Example
from welltuned.data.rows import Rows
from welltuned.data.speakers import Speaker
from welltuned.data.templates import control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BINS = 12  # of a histogram whose bins are equally wide
WIDE = 16  # a longest row of more than so many medians asks for bins that double
CONTEXT = 8  # tokens decoded before a run: more than one character's bytes, and what a decoder strips from a start
EDGE = 8  # fewest tokens shown of each end of a run that is shortened
CHARACTER = 3  # tokens that the bytes of one character may still take
UNFINISHED = "\ufffd"  # what the bytes of a part of a character decode to


# ── lengths ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows of `first` to `last` tokens, both included."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of rows, before any cut. Each quantile is the length of a real row."""

    min: int
    p50: int
    p90: int
    p95: int
    p99: int
    max: int
    histogram: tuple[Bin, ...]

    def to_json(self) -> dict[str, Any]:
        bins = [{"from": b.first, "to": b.last, "rows": b.rows} for b in self.histogram]
        return {**asdict(self), "histogram": bins}


def lengths_of(lengths: NDArray[np.integer[Any]]) -> Lengths:
    """Quantiles and histogram of the lengths [n] of at least one row."""
    shares = (0, 50, 90, 95, 99, 100)
    shortest, p50, p90, p95, p99, longest = (int(n) for n in np.percentile(lengths, shares, method="higher"))
    return Lengths(shortest, p50, p90, p95, p99, longest, histogram=_histogram(lengths, p50))


def _histogram(lengths: NDArray[np.integer[Any]], median: int) -> tuple[Bin, ...]:
    shortest, longest = int(lengths.min()), int(lengths.max())
    if longest > WIDE * max(median, 1):
        first = 1 << max(shortest, 1).bit_length() - 1
        edges = [first << i for i in range((longest // first).bit_length() + 1)]
    else:
        step = _round_number((longest - shortest + 1) / BINS)
        edges = list(range(shortest // step * step, longest + step + 1, step))
    counts, _ = np.histogram(lengths, edges)
    bins = [Bin(a, b - 1, int(n)) for a, b, n in zip(edges, edges[1:], counts, strict=False)]
    while len(bins) > 1 and not bins[-1].rows:
        bins.pop()
    return tuple(bins)


def _round_number(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is not below `least`."""
    size = 1
    while True:
        for number in (size, 2 * size, 5 * size):
            if number >= least:
                return number
        size *= 10


# ── which rows ───────────────────────────────────────────────────────────────────────────────────────────────────────


def choose(rows: Rows, count: int) -> dict[int, str]:
    """`count` row numbers and why each was chosen: the first, a middling one, the longest, then some spread evenly."""
    lengths = rows.column("length")
    order = np.argsort(lengths, kind="stable")
    chosen: dict[int, str] = {}
    for index, why in (
        (0, "the first row"),
        (int(order[(len(order) - 1) // 2]), "of median length"),
        (int(np.argmax(lengths)), "the longest row"),
    ):
        if len(chosen) < count:
            chosen[index] = f"{chosen[index]}, {why}" if index in chosen else why
    more = min(count, len(rows)) - len(chosen)
    if more > 0:
        others = np.setdiff1d(np.arange(len(rows)), list(chosen))
        spread = (np.arange(more) * 2 + 1) * len(others) // (2 * more)
        chosen |= {int(index): "one of those spread over the dataset" for index in others[spread]}
    return chosen


# ── a row's text ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Side(StrEnum):
    """Which answer of a pair a text belongs to; the prompt, and a row that is no pair, belong to neither."""

    NEITHER = ""
    CHOSEN = "chosen"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring tokens that are alike: their text, and whether it is trained. A control token is a run by itself."""

    text: str
    trained: bool
    speaker: Speaker
    control: bool = False
    side: Side = Side.NEITHER


@dataclass(frozen=True, slots=True)
class Gap:
    """Tokens that are not shown, and how many of them are trained."""

    tokens: int
    trained: int


def runs(example: Example, tokenizer: "PreTrainedTokenizerBase", most: int | None = None) -> list[Run | Gap]:
    """The row's text, in order.

    Args:
        most: about how many tokens to show; of longer rows the middles of runs are left out, and of very many runs
            those in the middle. The first and the last trained run always show their ends.
    """
    controls = frozenset(control_tokens(tokenizer).values())
    ids = example.ids.tolist()
    roles = example.roles if example.roles is not None else np.zeros(len(ids), np.uint8)
    pieces = [Piece(a, b) for a, b in _alike(example, roles, controls)]
    if most is not None and len(ids) > most:
        pieces = _shortened(pieces, example.mask, most, lambda a, b: _text(tokenizer, ids, a, b))
    shown: list[Run | Gap] = []
    for start, stop, left_out in pieces:
        if left_out:
            shown.append(Gap(stop - start, int(example.mask[start:stop].sum())))
        else:
            speaker, trained = Speaker(int(roles[start])), bool(example.mask[start])
            text, side = _text(tokenizer, ids, start, stop), side_of(example, start)
            shown.append(Run(text, trained, speaker, ids[start] in controls, side))
    return shown


def merged(shown: Sequence[Run | Gap]) -> list[Run]:
    """Runs of equal speaker that are alike trained or not, control tokens among them."""
    found: list[Run] = []
    for run in shown:
        if isinstance(run, Gap):
            continue
        before = found[-1] if found else None
        if before and (before.trained, before.speaker, before.side) == (run.trained, run.speaker, run.side):
            found[-1] = replace(before, text=before.text + run.text)
        else:
            found.append(replace(run, control=False))
    return found


def side_of(example: Example, token: int) -> Side:
    if example.fork is None or token < example.fork.shared:
        return Side.NEITHER
    return Side.CHOSEN if token < example.fork.second else Side.REJECTED


def _alike(example: Example, roles: NDArray[np.uint8], controls: frozenset[int]) -> Iterator[tuple[int, int]]:
    """Token ranges [start, stop) of equal speaker and mask; each control token is one of its own."""
    if not len(example.ids):
        return
    control = np.isin(example.ids, list(controls))
    state = roles.astype(np.int16) * 2 + example.mask
    forks = [at for at in example.fork or () if at > 0]
    breaks = np.flatnonzero((state[1:] != state[:-1]) | control[1:] | control[:-1]) + 1
    breaks = np.union1d(breaks, np.array(forks, breaks.dtype))
    yield from zip([0, *breaks.tolist()], [*breaks.tolist(), len(example.ids)], strict=True)


class Piece(NamedTuple):
    """A range of tokens [start, stop), to be shown or left out."""

    start: int
    stop: int
    left_out: bool = False


def _shortened(
    pieces: Sequence[Piece], mask: NDArray[np.bool_], most: int, text: Callable[[int, int], str]
) -> list[Piece]:
    """The same ranges with gaps in them, so that about `most` tokens are left."""
    edge = max(most // 2, EDGE)
    while edge > EDGE and sum(min(stop - start, 2 * edge) for start, stop, _ in pieces) > most:
        edge = max(edge * 3 // 4, EDGE)
    sizes = [min(stop - start, 2 * edge) for start, stop, _ in pieces]
    keep = _kept(sizes, [bool(mask[start]) for start, _, _ in pieces], most)
    found: list[Piece] = []
    for piece, stays in zip(pieces, keep, strict=True):
        if not stays and found and found[-1].left_out:
            found[-1] = Piece(found[-1].start, piece.stop, True)
        elif not stays:
            found.append(Piece(piece.start, piece.stop, True))
        else:
            found += _ends(piece, edge, text)
    return found


def _kept(sizes: Sequence[int], trained: Sequence[bool], most: int) -> list[bool]:
    """Which pieces stay: those from both ends within `most`, and the first and the last trained one."""
    before, after = np.cumsum(sizes), np.cumsum(sizes[::-1])[::-1]
    keep = (before <= most // 2) | (after <= most // 2) if before[-1] > most else np.ones(len(sizes), bool)
    for index in np.flatnonzero(trained)[[0, -1]] if any(trained) else ():
        keep[max(index - 1, 0) : index + 2] = True
    return [bool(k) for k in keep]


def _ends(piece: Piece, edge: int, text: Callable[[int, int], str]) -> list[Piece]:
    """The first and the last `edge` tokens with a gap between them, which begins and ends between characters."""
    start, stop, _ = piece
    first, last = start + edge, stop - edge
    for _ in range(CHARACTER):
        first += first < last and text(start, first).endswith(UNFINISHED)
        last -= first < last and text(last, stop).startswith(UNFINISHED)
    worth = last - first >= EDGE  # else the words about them would take more room than the tokens
    return [Piece(start, first), Piece(first, last, True), Piece(last, stop)] if worth else [piece]


def _text(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], start: int, stop: int) -> str:
    """The tokens' text as it is within the row's. Some decoders take a space from the start of whatever they get.

    What is decoded begins between two characters: after a part of one, byte-fallback decoders lose those that follow.
    """
    for context in range(max(0, start - CONTEXT), max(0, start - CONTEXT - CHARACTER) - 1, -1):
        before, whole = (_decoded(tokenizer, ids[context:end]) for end in (start, stop))
        if whole.startswith(before) and not before.startswith(UNFINISHED):
            return whole[len(before) :]
    return _decoded(tokenizer, ids[start:stop])


def _decoded(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
