"""What is done with rows that have a defect: an error, left out, or kept; always counted, and named by origin."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from welltuned.data.conversation import Kind, Policy
from welltuned.data.rows import Rows
from welltuned.data.store import About, kind_bit
from welltuned.data.stream import among
from welltuned.errors import InputError

KEPT_ORIGINS = 1_000  # rows of a kind that are named; their number is always complete
NEVER_KEPT = (Kind.BAD_ROW, Kind.UNTRAINED, Kind.EQUAL_PAIR)
Policies = Mapping[Kind, Policy]
Flags = NDArray[np.bool_]
Named = tuple[str, str]  # a row's origin, and what it repeats or what is wrong with it

DEFAULT_POLICIES: Policies = MappingProxyType(
    {kind: Policy.ERROR if kind in NEVER_KEPT else Policy.KEEP for kind in Kind}
)
SEEN_BY_RENDERING = (  # the gravest first, which is the one that an error names
    *(Kind.UNTRAINED, Kind.EQUAL_PAIR, Kind.END_UNTRAINED, Kind.PROMPT_DIFFERS, Kind.LOST_MESSAGE),
    *(Kind.LOST_THINKING, Kind.LOST_TOOLS, Kind.BAD_ENCODING, Kind.CONTROL_TOKEN, Kind.REPEATED_TURN, Kind.EMPTY_TURN),
)
ERROR_WORDS: Mapping[Kind, str] = MappingProxyType(
    {
        Kind.UNTRAINED: "none of the row's tokens is trained",
        Kind.TOO_LONG: "the row is longer than max_length",
        Kind.DUPLICATE: "the row repeats an earlier training row",
        Kind.LEAK: "the held-out row repeats a training row or its prompt",
        Kind.EMPTY_TURN: "the row has a blank user or system turn",
        Kind.REPEATED_TURN: "the row has the same turn twice in a row",
        Kind.CONTROL_TOKEN: "the row spells a special token in its own text",
        Kind.BAD_ENCODING: "the row has characters of a wrong encoding",
        Kind.LOST_THINKING: "the row has a thinking block that the chat template leaves out",
        Kind.LOST_MESSAGE: "the row has a message that the chat template leaves out",
        Kind.LOST_TOOLS: "the row has tools that the chat template leaves out",
        Kind.END_UNTRAINED: "the row has an answer whose end-of-turn token is not trained",
        Kind.EQUAL_PAIR: "the chosen and the rejected answer are the same tokens, so neither is to be preferred",
        Kind.PROMPT_DIFFERS: "the prompt of the chosen answer is not that of the rejected one, once rendered",
    }
)

MEND: Mapping[Kind, str] = MappingProxyType(
    {
        Kind.UNTRAINED: "see what the chat template renders",
        Kind.END_UNTRAINED: "see what the chat template writes after an answer",
        Kind.LOST_THINKING: "give a `chat_template` that keeps it",
        Kind.LOST_MESSAGE: "give a `chat_template` that writes it, or put its text into the first user message",
        Kind.LOST_TOOLS: "give a `chat_template` that writes them",
        Kind.TOO_LONG: "raise max_length",
        Kind.DUPLICATE: "take one of them out",
        Kind.LEAK: "take one of them out",
    }
)


@dataclass(frozen=True, slots=True)
class Finding:
    """The rows with one kind of defect, and what was done with them.

    Attributes:
        rows: how many there are, of `of`: training rows for DUPLICATE and TOO_LONG, held-out rows for LEAK, else both.
        dropped: how many rows were left out for it.
        named: the first 1,000 of them.
    """

    kind: Kind
    policy: Policy
    rows: int = 0
    of: int = 0
    dropped: int = 0
    named: tuple[Named, ...] = ()

    @property
    def done(self) -> str:
        if self.policy is not Policy.KEEP:
            return "left out" if self.policy is Policy.DROP else "refused"
        return "cut" if self.kind is Kind.TOO_LONG else "kept"

    def to_json(self) -> dict[str, Any]:
        return {
            "policy": str(self.policy),
            "rows": self.rows,
            "of": self.of,
            "done": self.done if self.rows else None,
            "dropped": self.dropped,
            "origins": [list(pair) if pair[1] else pair[0] for pair in self.named],
        }


def found(kind: Kind, policy: Policy, hit: Flags, name: Callable[[int], Named], dropped: int | None = None) -> Finding:
    """The finding of flagged rows [n].

    Raises:
        InputError: there are some, and the policy says that this is an error.
    """
    rows = int(hit.sum())
    named = tuple(name(int(i)) for i in np.flatnonzero(hit)[:KEPT_ORIGINS])
    if rows and policy is Policy.ERROR:
        raise refusal(kind, rows, named[0])
    if dropped is None:
        dropped = rows if policy is Policy.DROP else 0
    return Finding(kind, policy, rows, len(hit), dropped, named)


def refusal(kind: Kind, rows: int, first: Named) -> InputError:
    """The error for the first of `rows` rows of this kind."""
    what = ERROR_WORDS[kind] + (f" ({first[1]})" if first[1] else "") + (f" ({rows:,} such rows)" if rows > 1 else "")
    allowed = "drop" if kind in NEVER_KEPT else "drop or keep"
    return InputError(what, where=first[0], mend=f"{MEND.get(kind, 'mend it')}, or set on_{kind} to {allowed}")


def bad_rows(abouts: Sequence[About], policy: Policy) -> Finding:
    """The rows that could not be read as conversations; they are left out already."""
    every = [row for about in abouts for row in about.bad]
    if every and policy is Policy.ERROR:
        raise InputError(every[0].what, where=every[0].origin, mend=every[0].mend)
    rows = sum(about.bad_rows for about in abouts)
    named = tuple((row.origin, row.what) for row in every[:KEPT_ORIGINS])
    return Finding(Kind.BAD_ROW, policy, rows, rows + sum(about.rows for about in abouts), rows, named)


def sift_seen(rows: Rows, policies: Policies) -> tuple[Rows, list[Finding]]:
    """Kinds that rendering saw in single rows."""
    seen = rows.column("found")
    keep = np.ones(len(rows), bool)
    findings = []
    for kind in SEEN_BY_RENDERING:
        hit = (seen & kind_bit(kind)) != 0
        findings.append(found(kind, policies[kind], hit, lambda i: (rows.origin(i), "")))
        if policies[kind] is Policy.DROP:
            keep &= ~hit
    return (rows if keep.all() else rows.where(keep)), findings


def sift_leaks(train: Rows, held_out: Rows, policy: Policy) -> tuple[Rows, Finding]:
    """Held-out rows with the tokens of a training row, or with its prompt. DROP leaves out those training rows."""
    if not len(held_out) or not len(train):
        return train, Finding(Kind.LEAK, policy, of=len(held_out))
    same = _Matches(train.column("digest"), held_out.column("digest"))
    prompt = _Matches(train.column("prompt"), held_out.column("prompt"))

    def name(index: int) -> Named:
        first = same.first_of(index)
        return held_out.origin(index), "as " + train.origin(prompt.first_of(index) if first < 0 else first)

    repeated = same.repeated | prompt.repeated
    result = found(Kind.LEAK, policy, same.held | prompt.held, name, int(repeated.sum()) * (policy is Policy.DROP))
    return (train.where(~repeated) if result.dropped else train), result


class _Matches:
    """Training rows and held-out rows of the same number; 0 matches nothing."""

    def __init__(self, train: NDArray[np.uint64], held: NDArray[np.uint64]):
        self.repeated: Flags = among(train, held[held != 0])
        self._numbers = held
        rows = np.flatnonzero(self.repeated)
        values, at = np.unique(train[rows], return_index=True)
        self.held: Flags = among(held, values)
        self._first = dict(zip(values.tolist(), rows[at].tolist(), strict=True))

    def first_of(self, index: int) -> int:
        """The first training row that a held-out row matches, -1 for none."""
        return int(self._first.get(int(self._numbers[index]), -1))


def sift_duplicates(train: Rows, policy: Policy) -> tuple[Rows, Finding]:
    """Training rows with the tokens of an earlier one."""
    digests = train.column("digest")
    order = np.argsort(digests, kind="stable")
    repeats = np.zeros(len(order), bool)  # in sorted order: the same as the one before
    repeats[1:] = digests[order[1:]] == digests[order[:-1]]
    hit = np.zeros(len(order), bool)
    hit[order[repeats]] = True
    shown = np.flatnonzero(hit)[:KEPT_ORIGINS]
    values, at = np.unique(digests[shown], return_index=True)
    where = np.searchsorted(digests, values, sorter=order)
    firsts = dict(zip(values.tolist(), order[where].tolist(), strict=True))

    def name(index: int) -> Named:
        return train.origin(index), "as " + train.origin(int(firsts[int(digests[index])]))

    result = found(Kind.DUPLICATE, policy, hit, name)
    return (train.where(~hit) if result.dropped else train), result


@dataclass(frozen=True, slots=True)
class Shortening:
    """What a limit on the length did: the rows left, and the findings."""

    rows: Rows
    too_long: Finding
    untrained: Finding


def sift_length(rows: Rows, max_length: int, policies: Policies) -> Shortening:
    """Rows of more than `max_length` tokens are cut, left out or refused; one that loses its answers is untrained."""
    lengths = rows.column("longest")
    long = lengths > max_length

    def name(index: int) -> Named:
        return rows.origin(index), f"{int(lengths[index]):,} tokens"

    too_long = found(Kind.TOO_LONG, policies[Kind.TOO_LONG], long, name)
    keep = np.ones(len(rows), bool)
    lost = np.zeros(len(rows), bool)
    if too_long.policy is Policy.DROP:
        keep &= ~long
    elif too_long.rows:
        lost = long & (rows.column("needed") > max_length)
        keep &= ~lost
    untrained = Finding(Kind.UNTRAINED, policies[Kind.UNTRAINED], of=len(rows))
    if lost.any():
        first = int(np.argmax(lost))
        if untrained.policy is Policy.ERROR:
            count = f" ({int(lost.sum()):,} such rows)" if lost.sum() > 1 else ""
            pair = bool(rows.column("shared")[first] < rows.column("length")[first])
            loses = "an answer, or all in which its two differ" if pair else "its whole answer"
            what = f"{ERROR_WORDS[Kind.UNTRAINED]}: cut to max_length {max_length:,} it loses {loses}{count}"
            raise InputError(what, where=rows.origin(first), mend="raise max_length, or set on_untrained to drop")
        untrained = found(Kind.UNTRAINED, Policy.DROP, lost, name)
    left = rows if keep.all() else rows.where(keep)
    return Shortening(left.within(max_length), too_long, untrained)


def together(first: Finding, second: Finding) -> Finding:
    """One finding of two that looked at the same rows, one after the other."""
    named = (*first.named, *second.named)[:KEPT_ORIGINS]
    rows, dropped = first.rows + second.rows, first.dropped + second.dropped
    return replace(first, rows=rows, dropped=dropped, of=max(first.of, second.of), named=named)
