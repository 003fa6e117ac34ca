"""What the data will teach, counted before any training: who says how much of it, what is trained, cut, repeated."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from welltuned.data.conversation import Kind, Policy
from welltuned.data.policies import Finding, Named
from welltuned.data.rows import Rows
from welltuned.data.speakers import Speaker
from welltuned.data.store import kind_bit

SHOWN = 5  # origins quoted in a sentence; `Finding` holds more
LENGTH_STEP = 8  # lengths that are proposed are multiples of it, as those that the plan chooses
QUANTILES = (95.0, 99.0, 99.9, 100.0)


class Severity(StrEnum):
    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Problem:
    """A sentence for the user; the weightier ones (to 100) come first among the plan's warnings."""

    severity: Severity
    sentence: str
    weight: float


@dataclass(frozen=True, slots=True)
class Share:
    """Tokens of one speaker in the training rows, and how many of them are trained."""

    tokens: int
    trained: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """A longer max_length: how many training rows it would cut, and the tokens of an epoch against those of now."""

    max_length: int
    rows_cut: int
    tokens_times: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What max_length does to the training rows that are longer: `lose` lose some of their trained tokens.

    `proposals` are longer limits, from the quantiles of the lengths, none beyond the model's context.
    """

    max_length: int
    rows: int
    lose: int
    tokens: int
    longest: int
    context: int | None = None
    proposals: tuple[Proposal, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Counts over the training rows as they will be trained on, each once, and what was found in all of the rows."""

    rows: int
    held_out_rows: int
    tokens: int
    supervised_tokens: int
    end_trained: int  # rows in which every answer that was not cut ends with a trained end-of-turn token
    speakers: Mapping[Speaker, Share]
    findings: Mapping[Kind, Finding]
    cut: Cut | None = None

    @property
    def share(self) -> float:
        """Supervised tokens over all tokens."""
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "held_out_rows": self.held_out_rows,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "share": round(self.share, 4),
            "end_trained": self.end_trained,
            "speakers": {
                speaker.name.lower(): {"tokens": share.tokens, "trained": share.trained}
                for speaker, share in self.speakers.items()
            },
            "cut": None if self.cut is None else _cut_to_json(self.cut),
            "found": {str(kind): finding.to_json() for kind, finding in self.findings.items()},
            "problems": [{"severity": str(p.severity), "sentence": p.sentence} for p in self.problems()],
        }

    def problems(self) -> list[Problem]:
        """One sentence for each kind of problem found, the gravest first."""
        cut = [kind for kind in (Kind.TOO_LONG,) if self.findings[kind].policy is Policy.KEEP]  # `Cut` says more
        found = [_problem(finding) for kind, finding in self.findings.items() if finding.rows and kind not in cut]
        if self.cut is not None and self.cut.rows and cut:
            found.append(Problem(Severity.WARNING, cut_sentence(self.cut), 80))
        return sorted(found, key=lambda problem: -problem.weight)


def audit(train: Rows, held_out: Rows, findings: Mapping[Kind, Finding], *, context: int | None = None) -> Audit:
    """Count the training rows, and add what was found while rows were chosen; `context` is the model's length."""
    marks = train.tally()
    seen = train.column("found")
    ends = int(((seen & (kind_bit(Kind.UNTRAINED) | kind_bit(Kind.END_UNTRAINED))) == 0).sum())
    return Audit(
        rows=len(train),
        held_out_rows=len(held_out),
        tokens=int(marks.sum()),
        supervised_tokens=int(marks[1::2].sum()),
        end_trained=ends,
        speakers=MappingProxyType(
            {
                speaker: Share(int(marks[2 * speaker] + marks[2 * speaker + 1]), int(marks[2 * speaker + 1]))
                for speaker in Speaker
            }
        ),
        findings=MappingProxyType(dict(findings)),
        cut=_cut(train, int(marks.sum()), context),
    )


def _cut(train: Rows, tokens: int, context: int | None) -> Cut | None:
    limit, lengths = train.max_length, train.column("longest")
    if limit is None or not len(lengths) or int(lengths.max()) <= limit:
        return None
    long = lengths > limit
    return Cut(
        max_length=limit,
        rows=int(long.sum()),
        lose=int((long & (train.column("last") >= limit)).sum()),
        tokens=int(train.column("length").sum(dtype=np.int64)) - tokens,
        longest=int(lengths.max()),
        context=context,
        proposals=propose(lengths, limit, tokens, context, train.kept),
    )


def propose(
    lengths: NDArray[np.integer[Any]],
    max_length: int,
    tokens: int,
    context: int | None,
    kept: Callable[[int], NDArray[np.integer[Any]]] | None = None,
) -> tuple[Proposal, ...]:
    """Longer limits: the shortest quantile that cuts fewer rows, and the one that cuts none; `tokens` are those of now.

    None is beyond the model's context, which stands in for what is longer. `kept` says how many tokens a limit leaves
    of each row; unset, a row is one sequence.
    """
    kept = kept or (lambda limit: np.minimum(lengths, limit))
    found: dict[int, Proposal] = {}
    wanted = [math.ceil(int(n) / LENGTH_STEP) * LENGTH_STEP for n in np.percentile(lengths, QUANTILES, method="higher")]
    longer = [n if context is None else min(n, context) for n in wanted]
    for length in [n for n in longer if n > max_length]:
        left = int(kept(length).sum(dtype=np.int64))
        found[length] = Proposal(length, int((lengths > length).sum()), left / max(tokens, 1))
    return tuple(p for n, p in found.items() if n in (min(found), max(found)))


def cut_sentence(cut: Cut) -> str:
    """What max_length cuts off, what would cut less, and what that costs."""
    bound = f" (the model's context is {cut.context:,})" if cut.max_length == cut.context else ""
    loss = f"{cut.lose:,} of them lose trained tokens" if cut.lose else "none of them loses a trained token"
    text = f"{cut.rows:,} training rows are longer than max_length {cut.max_length:,}{bound} and were cut"
    text += f": {loss}"
    for proposal in cut.proposals:
        cuts = f"cut {proposal.rows_cut:,}" if proposal.rows_cut else "cut none"
        text += f"; {proposal.max_length:,} would {cuts}, for {proposal.tokens_times - 1:.1%} more tokens"
    return text if cut.proposals else text + f"; the longest has {cut.longest:,} tokens"


_WORDS: Mapping[Kind, tuple[float, str]] = MappingProxyType(
    {
        Kind.TOO_LONG: (79, "are longer than max_length"),
        Kind.BAD_ROW: (76, "cannot be read as conversations"),
        Kind.UNTRAINED: (72, "have no trained token, so they teach nothing"),
        Kind.END_UNTRAINED: (
            *(78, "have an answer whose end-of-turn token is not trained, so the model may not learn to stop"),
        ),
        Kind.LOST_THINKING: (68, "have a thinking block that the chat template leaves out, so it is not learned"),
        Kind.LOST_MESSAGE: (77, "have a system or user message that the chat template leaves out of the text"),
        Kind.LOST_TOOLS: (67, "have tools that the chat template leaves out: the model learns calls of unseen tools"),
        Kind.LEAK: (65, "are also found in the training data (they repeat a training row or the prompt of its last "
                        "answer): the held-out loss will flatter the run"),
        Kind.BAD_ENCODING: (50, "have characters of a wrong encoding, such as Ã© for é, which the model would learn"),
        Kind.CONTROL_TOKEN: (40, "spell a special token in their own text; it is read as text, never as that token"),
        Kind.EQUAL_PAIR: (70, "have a chosen answer that is the rejected one too, token for token"),
        Kind.PROMPT_DIFFERS: (45, "have a prompt that the template writes differently for each of their two answers, "
                                  "so that less of it is shared, and the two are not compared on equal terms"),
        Kind.REPEATED_TURN: (30, "have the same turn twice in a row"),
        Kind.DUPLICATE: (25, "repeat an earlier training row exactly: what stands twice counts twice"),
        Kind.EMPTY_TURN: (14, "have a blank user or system turn"),
    }
)  # fmt: skip


_OF_TRAINING = (Kind.DUPLICATE, Kind.TOO_LONG)


def _problem(finding: Finding) -> Problem:
    weight, words = _WORDS[finding.kind]
    refused = finding.policy is Policy.ERROR  # only in a view of the data: whoever trains was stopped by it
    rows = "held-out rows" if finding.kind is Kind.LEAK else "training rows" if finding.kind in _OF_TRAINING else "rows"
    what = "; the training rows are left out" if finding.kind is Kind.LEAK else "; left out"
    done = "; training refuses them" if refused else what if finding.policy is Policy.DROP else "; kept"
    few = finding.kind in (Kind.DUPLICATE, Kind.EMPTY_TURN) and 100 * finding.rows <= finding.of
    key = f"on_{finding.kind}" + (" is error" if refused else "")
    sentence = f"{finding.rows:,} of {finding.of:,} {rows} {words}{done} ({key}): {_some(finding)}"
    if refused:
        return Problem(Severity.ERROR, sentence, weight + 100)
    return Problem(Severity.NOTE if few else Severity.WARNING, sentence, weight - 5 * few)


def _some(finding: Finding) -> str:
    names: Sequence[Named] = finding.named[:SHOWN]
    rest = finding.rows - len(names)
    shown = ", ".join(origin + (f" ({beside})" if beside else "") for origin, beside in names)
    return shown + (f" and {rest:,} more" if rest > 0 else "")


def _cut_to_json(cut: Cut) -> dict[str, Any]:
    return {
        "max_length": cut.max_length,
        "rows": cut.rows,
        "rows_losing_trained_tokens": cut.lose,
        "tokens": cut.tokens,
        "longest": cut.longest,
        "proposals": [
            {"max_length": p.max_length, "rows_cut": p.rows_cut, "tokens_times": round(p.tokens_times, 4)}
            for p in cut.proposals
        ],
    }
