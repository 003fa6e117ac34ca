"""What a run would learn, to be looked at: its data read, rendered and audited as for training, some rows in full."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from welltuned.choice import Choice
from welltuned.data.audit import Audit, Severity
from welltuned.data.build import RowsRead, unwatched
from welltuned.data.conversation import Kind, Policy
from welltuned.data.dataset import policies_of, read_dataset
from welltuned.data.policies import Policies
from welltuned.data.render import Example, shortened
from welltuned.data.rows import Rows
from welltuned.data.show import Gap, Lengths, Run, choose, lengths_of, merged, runs
from welltuned.data.store import ExampleStore
from welltuned.errors import InputError
from welltuned.facts.machine import MachineFacts
from welltuned.recipe import Recipe
from welltuned.recipe.keys import NEVER_KEPT
from welltuned.training.prepare import prepare

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A row to look at.

    Attributes:
        why: why it was chosen, or what becomes of it.
        length: its tokens before it was cut to max_length.
    """

    example: Example
    why: str
    length: int

    def to_json(self, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
        return {
            "origin": self.example.origin,
            "why": self.why,
            "tokens": len(self.example.ids),
            "supervised_tokens": int(self.example.mask.sum()),
            "length": self.length,
            "found": sorted(self.example.found),
            "runs": [
                {"text": run.text, "trained": run.trained, "speaker": run.speaker.name.lower()}
                for run in merged(runs(self.example, tokenizer))
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What the data will teach.

    Attributes:
        formats: how the rows are read; `notes` say how to change that, and how rows are held out.
        max_length: the plan's; None where there is no plan, since no token of any row is trained.
        examples: the rows to look at.
        bad: rows that were asked for by origin and cannot be read: origin, and why.
    """

    formats: str
    notes: tuple[str, ...]
    audit: Audit
    lengths: Lengths
    max_length: Choice | None
    examples: tuple[Shown, ...]
    bad: tuple[tuple[str, str], ...]
    tokenizer: "PreTrainedTokenizerBase"

    @property
    def blocked(self) -> bool:
        """Whether training would refuse these data."""
        return any(problem.severity is Severity.ERROR for problem in self.audit.problems())

    def text_of(self, shown: Shown, most: int | None = None) -> list[Run | Gap]:
        """The row as runs of text; see `show.runs`."""
        return runs(shown.example, self.tokenizer, most)

    def to_json(self) -> dict[str, Any]:
        """Made of plain values.

        `rows` are the training rows, `tokens` and `supervised_tokens` theirs, `lengths` theirs before any cut; `share`
        is supervised tokens over tokens. `lengths`: min, p50, p90, p95, p99, max, and `histogram`, a list of {from, to
        (included), rows}. `by_speaker`: {tokens, trained, share}, under system, user, assistant, tool, document and
        template. `audit` is that of run.json; where its `found` has the policy error, training would refuse the data,
        and `blocked` is true. `examples`: {origin, why, tokens, supervised_tokens, length (before a cut), found (kinds
        of defect), runs}, with runs a list of {text, trained, speaker} that together are the row's text. `bad`: rows
        that were asked for and cannot be read, {origin, why}.
        """
        audit = self.audit
        return {
            "format": self.formats,
            "notes": list(self.notes),
            "blocked": self.blocked,
            "rows": audit.rows,
            "held_out_rows": audit.held_out_rows,
            "tokens": audit.tokens,
            "supervised_tokens": audit.supervised_tokens,
            "share": round(audit.share, 4),
            "max_length": None if self.max_length is None else self.max_length.value,
            "lengths": self.lengths.to_json(),
            "by_speaker": {
                speaker.name.lower(): {
                    "tokens": share.tokens,
                    "trained": share.trained,
                    "share": round(share.trained / share.tokens, 4) if share.tokens else 0.0,
                }
                for speaker, share in audit.speakers.items()
            },
            "audit": audit.to_json(),
            "examples": [shown.to_json(self.tokenizer) for shown in self.examples],
            "bad": [{"origin": origin, "why": why} for origin, why in self.bad],
        }


def inspect(
    recipe: Recipe,
    *,
    show: int = SHOWN,
    rows: Sequence[str] = (),
    machine: MachineFacts | None = None,
    progress: RowsRead = unwatched,
) -> Inspection:
    """Read, render, audit and plan as `prepare` does. What training would refuse is counted and shown.

    Args:
        show: how many rows to choose.
        rows: rows to look at instead: origins (`train.jsonl:7`), ends of origins, or the numbers in them.

    Raises:
        InputError: data that cannot be read at all, or no row of such an origin.
    """
    read = _read(recipe, machine, progress)
    train = read.train
    lengths = train.column("length")
    if rows:
        finder = _Finder(read)
        found = [finder.find(wanted) for wanted in rows]
        examples = tuple(row for row in found if isinstance(row, Shown))
        bad = tuple(row for row in found if not isinstance(row, Shown))
    else:
        chosen = choose(train, show)
        examples = tuple(Shown(example=train[i], why=why, length=int(lengths[i])) for i, why in chosen.items())
        bad = ()
    return Inspection(
        formats=read.formats,
        notes=read.notes,
        audit=read.audit,
        lengths=lengths_of(lengths),
        max_length=read.max_length,
        examples=examples,
        bad=bad,
        tokenizer=read.tokenizer,
    )


class _Read(NamedTuple):
    formats: str
    notes: tuple[str, ...]
    audit: Audit
    train: Rows
    held_out: Rows
    max_length: Choice | None
    tokenizer: "PreTrainedTokenizerBase"


def _read(recipe: Recipe, machine: MachineFacts | None, progress: RowsRead) -> _Read:
    policies = policies_of(recipe)
    lenient = {
        f"on_{k}": "drop" if f"on_{k}" in NEVER_KEPT else "keep" for k, p in policies.items() if p is Policy.ERROR
    }
    recipe = replace(recipe, policies=MappingProxyType({**recipe.policies, **lenient}))
    try:
        prepared = prepare(recipe, machine, progress)
    except InputError:
        untrained = _read_untrained(recipe, policies)
        if untrained is None:
            raise
        return untrained
    said = {problem.sentence for problem in prepared.audit.problems()}
    assert isinstance(prepared.train, Rows) and isinstance(prepared.held_out, Rows)
    return _Read(
        formats=prepared.plan.facts.dataset.format_name,
        notes=tuple(note for note in prepared.notes if note not in said),
        audit=_with_errors(prepared.audit, policies),
        train=prepared.train,
        held_out=prepared.held_out,
        max_length=prepared.plan.choices["max_length"],
        tokenizer=prepared.tokenizer,
    )


def _read_untrained(recipe: Recipe, policies: Policies) -> _Read | None:
    """Data of which no token is trained, which have no plan and are all the more worth a look; None if some is."""
    from welltuned.models.load import load_tokenizer

    kept = {**recipe.policies, f"on_{Kind.UNTRAINED}": str(Policy.KEEP)}
    try:
        tokenizer = load_tokenizer(recipe.model)
        dataset = read_dataset(replace(recipe, policies=MappingProxyType(kept)), tokenizer)
    except InputError:
        return None
    if dataset.train.column("trained").any():
        return None
    audit = _with_errors(dataset.audit(), {**policies, Kind.UNTRAINED: Policy.ERROR})
    return _Read(dataset.formats, dataset.notes, audit, dataset.train, dataset.held_out, None, tokenizer)


def _with_errors(audit: Audit, policies: Policies) -> Audit:
    """The audit with what training would refuse under the policy that says so."""
    findings = {
        kind: replace(finding, policy=Policy.ERROR) if policies[kind] is Policy.ERROR else finding
        for kind, finding in audit.findings.items()
    }
    return replace(audit, findings=MappingProxyType(findings))


class _Finder:
    """Rows by their origins, whatever became of them."""

    def __init__(self, read: _Read):
        self.read = read
        parts = [*read.train.parts, *read.held_out.parts]
        self.stores: tuple[ExampleStore, ...] = tuple(dict.fromkeys(part.store for part in parts))

    def find(self, wanted: str) -> Shown | tuple[str, str]:
        """The row of this origin, or the origin of one that cannot be read, and why."""
        for store in self.stores:
            for row in _likely(store, wanted):
                if _is(store.origin(row), wanted):
                    return self._shown(store, row)
        for origin, why in self.read.audit.findings[Kind.BAD_ROW].named:
            if _is(origin, wanted):
                return origin, why
        mend = f"origins look like {self.stores[0].origin(0)}, and its number alone will do"
        raise InputError("there is no such row", where=f"--row {wanted}", mend=mend)

    def _shown(self, store: ExampleStore, row: int) -> Shown:
        example = store[row]
        length = len(example.ids)
        for rows, why in ((self.read.train, "a training row"), (self.read.held_out, "a held-out row")):
            if any(part.store is store and np.any(part.index == row) for part in rows.parts):
                limit = rows.max_length
                return Shown(example=example if limit is None else shortened(example, limit), why=why, length=length)
        for kind, finding in self.read.audit.findings.items():
            if any(origin == example.origin for origin, _ in finding.named) and finding.policy is not Policy.KEEP:
                return Shown(example=example, why=f"{finding.done}, since on_{kind} is {finding.policy}", length=length)
        return Shown(example=example, why="left out", length=length)


def _likely(store: ExampleStore, wanted: str) -> Iterator[int]:
    """All rows, those first that are probably meant."""
    number = _number(wanted)
    if number is not None:
        yield from (row for row in (number - 1, number) if 0 <= row < len(store))
    yield from range(len(store))


def _is(origin: str, wanted: str) -> bool:
    if wanted.isdecimal():
        return _number(origin) == int(wanted)
    return origin == wanted or origin.endswith(("/" + wanted, "\\" + wanted))


def _number(origin: str) -> int | None:
    """The number at the end of train.jsonl:7, train.json[7] or train.parquet row 7."""
    digits = origin.rstrip("]")
    digits = digits[len(digits.rstrip("0123456789")) :]
    return int(digits) if digits else None
