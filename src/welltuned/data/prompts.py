"""Prompts to sample from: a recipe's data as prompts, reference answers and the rows' own columns.

Rewards may ask for any column, so rows are kept as they are, in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from welltuned.data import findings as seen_in
from welltuned.data.audit import Audit
from welltuned.data.build import Reading
from welltuned.data.conversation import Conversation, Format, Kind, Message, MixedSchema, Policy, PromptAnswer
from welltuned.data.dataset import DEFAULT_SEED, Sources, policies_of, reading_of
from welltuned.data.formats import SAMPLE, Detected, detect, to_prompt
from welltuned.data.mix import Mixture, mixture
from welltuned.data.policies import KEPT_ORIGINS, Finding, Named, Policies, found
from welltuned.data.render import Renderer
from welltuned.data.source import Row, Source
from welltuned.data.store import digest
from welltuned.data.stream import among, hold_out
from welltuned.errors import InputError
from welltuned.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SEEN = (  # in single prompts, the gravest first
    *(Kind.LOST_MESSAGE, Kind.LOST_TOOLS, Kind.BAD_ENCODING, Kind.CONTROL_TOKEN, Kind.REPEATED_TURN, Kind.EMPTY_TURN),
)


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """ids [n] end where the assistant begins; `answer` is what a reward may compare with, None without one."""

    ids: NDArray[np.int32]
    messages: tuple[Message, ...]
    answer: str | None
    answer_tokens: int
    row: Mapping[str, Any]
    origin: str
    group: int  # of what keeps prompts on one side of the held-out split
    found: frozenset[Kind] = frozenset()


@dataclass(frozen=True, slots=True)
class GroupMixture(Mixture):
    """A mixture of prompts, asked in completions: `group` of each, and `iterations` updates of the same prompts."""

    group: int = 1
    iterations: int = 1

    @property
    def in_a_set(self) -> int:
        """A set's completions are those of the policy before its first update, which no checkpoint within it knows."""
        return self.iterations

    def steps_per_epoch(self, effective_batch: int) -> int:
        return self.iterations * Mixture.steps_per_epoch(self, effective_batch // self.group)

    def update(self, effective_batch: int, step: int) -> list[int]:
        return Mixture.update(self, effective_batch // self.group, step // self.iterations)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompts:
    """What a run samples from and is judged by.

    Attributes:
        findings: what was found of each kind of defect, and done about it.
        chat_template: the template that prompts are rendered with; None for plain text.
        columns: of the rows, in their order.
    """

    recipe: Recipe
    policies: Policies
    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    mixture: Mixture
    findings: Mapping[Kind, Finding]
    chat_template: str | None
    formats: str
    columns: tuple[str, ...]
    notes: tuple[str, ...]

    def audit(self) -> Audit:
        return Audit(
            rows=len(self.train),
            held_out_rows=len(self.held_out),
            tokens=sum(len(p.ids) for p in self.train),
            supervised_tokens=0,
            end_trained=0,
            speakers={},
            findings=self.findings,
        )

    def within(self, longest: int, room: str) -> "Prompts":
        """The same without prompts of more than `longest` tokens, which `on_too_long: drop` leaves out.

        Raises:
            InputError: there is such a prompt and no policy drops it: a prompt cannot be cut. `room` says why so long.
        """
        every = (*self.train, *self.held_out)
        long = [p for p in every if len(p.ids) > longest]
        policy = self.policies[Kind.TOO_LONG]
        if long and policy is not Policy.DROP:
            what = f"the prompt has {len(long[0].ids):,} tokens, and {room} leaves it {max(longest, 0):,}"
            more = f" ({len(long):,} such prompts)" if len(long) > 1 else ""
            raise InputError(what + more, where=long[0].origin, mend="shorten it, or set on_too_long to drop")
        if not long:
            return self
        train, held_out = (tuple(p for p in part if len(p.ids) <= longest) for part in (self.train, self.held_out))
        if not train:
            raise InputError(f"no training prompt is within {longest:,} tokens", where=self.recipe.datasets[0])
        sizes = _sizes(self.mixture.rows, [len(p.ids) <= longest for p in self.train])
        named = tuple((p.origin, "") for p in long)
        finding = Finding(Kind.TOO_LONG, policy, len(long), len(every), len(long), named)
        findings = MappingProxyType({**self.findings, Kind.TOO_LONG: finding})
        return replace(self, train=train, held_out=held_out, mixture=_mixed(self.recipe, sizes), findings=findings)


def _sizes(rows: Sequence[int], keep: Sequence[bool]) -> list[int]:
    """Rows of each dataset that are kept."""
    ends = np.cumsum(rows).tolist()
    return [sum(keep[end - n : end]) for n, end in zip(rows, ends, strict=True)]


def _mixed(recipe: Recipe, sizes: Sequence[int]) -> Mixture:
    seed = recipe.hyperparameters.get("seed", DEFAULT_SEED)
    return mixture(sizes, seed, weights=recipe.data_weights, counts=recipe.data_rows, names=recipe.datasets)


def read_prompts(recipe: Recipe, tokenizer: "PreTrainedTokenizerBase", sources: Sources) -> Prompts:
    """Read, render and split, by the recipe.

    Raises:
        InputError: data that cannot be read, or a defect whose policy is error.
    """
    reading, policies = reading_of(recipe), policies_of(recipe)
    reader = _Reader(reading, reading.renderer(tokenizer), tokenizer, policies[Kind.BAD_ROW])
    every = [list(reader.prompts(source)) for source in (*sources.train, *sources.held_out)]
    rows, owner = [p for part in every for p in part], np.repeat(np.arange(len(every)), [len(p) for p in every])
    bad = Finding(Kind.BAD_ROW, policies[Kind.BAD_ROW], len(reader.bad), len(rows) + len(reader.bad), len(reader.bad))
    findings, keep = _sifted(rows, policies)
    findings[Kind.BAD_ROW] = replace(bad, named=tuple(reader.bad[:KEPT_ORIGINS]))
    if not keep.any():
        raise InputError("no prompt is left", where=recipe.datasets[0], mend="see the policies of the recipe")
    asked = np.array([_number(p.ids.tobytes()) for p in rows], np.uint64)
    held, sentence = _held_out(recipe, rows, asked, owner, keep, len(sources.train))
    findings[Kind.LEAK], repeated = _leaks(rows, asked, keep & ~held, keep & held, policies[Kind.LEAK])
    trained = keep & ~held & ~repeated
    if not trained.any():
        raise InputError("no training prompt is left", where=recipe.datasets[0])
    sizes = [int(trained[owner == i].sum()) for i in range(len(sources.train))]
    notes = [*reader.notes, *(s.note for s in (*sources.train, *sources.held_out) if s.note), sentence]
    return Prompts(
        recipe=recipe,
        policies=policies,
        train=tuple(rows[i] for i in np.flatnonzero(trained)),
        held_out=tuple(rows[i] for i in np.flatnonzero(keep & held)),
        mixture=_mixed(recipe, sizes),
        findings=MappingProxyType(findings),
        chat_template=reader.renderer.template,
        formats=", ".join(dict.fromkeys(reader.formats)),
        columns=tuple(dict.fromkeys(column for p in rows for column in p.row)),
        notes=tuple(notes),
    )


def _sifted(rows: Sequence[Prompt], policies: Policies) -> tuple[dict[Kind, Finding], NDArray[np.bool_]]:
    """What is found in prompts, and which of them stay [n]."""
    findings = {kind: Finding(kind, policies[kind], of=len(rows)) for kind in Kind}
    keep = np.ones(len(rows), bool)
    flags = {kind: np.array([kind in p.found for p in rows], bool) for kind in SEEN}
    for kind, hit in {**flags, Kind.DUPLICATE: _repeated(rows)}.items():
        findings[kind] = found(kind, policies[kind], hit, lambda i: (rows[i].origin, ""))
        keep &= ~hit if policies[kind] is Policy.DROP else True
    return findings, keep


def _held_out(
    recipe: Recipe,
    rows: Sequence[Prompt],
    asked: NDArray[np.uint64],
    owner: NDArray[np.int64],
    keep: NDArray[np.bool_],
    datasets: int,
) -> tuple[NDArray[np.bool_], str]:
    """Which rows are held out [n], and a sentence."""
    if recipe.eval_data is not None:
        held = owner >= datasets
        return held, f"Held out: the {int((held & keep).sum()):,} prompts of {', '.join(recipe.eval_datasets)}."
    index = np.flatnonzero(keep)
    groups = np.array([rows[i].group for i in index.tolist()], np.uint64)
    seed = recipe.hyperparameters.get("seed", DEFAULT_SEED)
    split = hold_out(
        groups,
        recipe.eval_fraction,
        seed,
        owner=owner[index].astype(np.uint16),
        shared="a prompt" if recipe.group_by is None else f"the same `{recipe.group_by}`",
        finer=asked[index] if recipe.group_by is None else None,
    )
    held = np.zeros(len(rows), bool)
    held[index[split.held_out]] = True
    return held, split.sentence


def _leaks(
    rows: Sequence[Prompt],
    asked: NDArray[np.uint64],
    trained: NDArray[np.bool_],
    held: NDArray[np.bool_],
    policy: Policy,
) -> tuple[Finding, NDArray[np.bool_]]:
    """Held-out prompts that are trained on too, and which training rows [n] are left out for it."""
    firsts: dict[int, int] = {}
    for i in np.flatnonzero(trained).tolist():
        firsts.setdefault(int(asked[i]), i)
    index = np.flatnonzero(held)
    hit = among(asked[index], asked[trained])
    repeated = trained & among(asked, asked[held]) & (policy is Policy.DROP)

    def name(at: int) -> Named:
        row = int(index[at])
        return rows[row].origin, "as " + rows[firsts[int(asked[row])]].origin

    return found(Kind.LEAK, policy, hit, name, int(repeated.sum())), repeated


def _repeated(rows: Sequence[Prompt]) -> NDArray[np.bool_]:
    """Which rows have the prompt and the answer of an earlier one [n]."""
    told: set[tuple[bytes, str | None]] = set()
    again = np.zeros(len(rows), bool)
    for i, prompt in enumerate(rows):
        key = prompt.ids.tobytes(), prompt.answer
        again[i] = key in told
        told.add(key)
    return again


class _Reader:
    """Rows of sources become prompts; what cannot be read is refused, or left out and named in `bad`."""

    def __init__(self, reading: Reading, renderer: Renderer, tokenizer: "PreTrainedTokenizerBase", on_bad_row: Policy):
        self.reading, self.renderer, self.tokenizer, self.on_bad_row = reading, renderer, tokenizer, on_bad_row
        self.bad: list[Named] = []
        self.formats: list[str] = []
        self.notes: list[str] = []

    def prompts(self, source: Source) -> Iterator[Prompt]:
        rows = list(source.rows(self._refuse))
        if not rows:
            raise InputError("no row can be read", where=source.name, mend="see what is wrong with on_bad_row: error")
        detected = detect(rows[:SAMPLE], format=self.reading.format, mapping=self.reading.mapping)
        self.formats.append(str(detected.format))
        read = "; rewards may ask for every column (`--set format=…` and `--map` change what is a prompt or an answer)"
        self.notes.append(f"{source.name}: {detected.format} rows, whose prompts are answered by sampling{read}")
        for row in rows:
            try:
                yield self._prompt(row, detected)
            except MixedSchema:
                raise
            except InputError as error:
                self._refuse(error)

    def _refuse(self, error: InputError) -> None:
        if self.on_bad_row is Policy.ERROR:
            raise error
        self.bad.append((str(error.where), error.what))

    def _prompt(self, row: Row, detected: Detected) -> Prompt:
        asked: PromptAnswer = to_prompt(row, detected)
        conversation = Conversation(asked.messages, row.origin, Format.PROMPT_ANSWER, asked.tools)
        ids = np.array(self.renderer.prompt(conversation), np.int32)
        if not len(ids):
            raise InputError("the row has no prompt", where=row.origin)
        group: object = conversation.prompt()
        if self.reading.group_by is not None:
            group = _column(row, self.reading.group_by)
        return Prompt(
            ids=ids,
            messages=asked.messages,
            answer=asked.answer,
            answer_tokens=0
            if asked.answer is None
            else 1 + len(self.tokenizer.encode(asked.answer, add_special_tokens=False)),
            row=row.record,
            origin=row.origin,
            group=_number(repr(group).encode("utf-8", "surrogatepass")),
            found=self._seen(conversation),
        )

    def _seen(self, conversation: Conversation) -> frozenset[Kind]:
        """Defects that a person should hear of, of the texts and of what the template makes of them."""
        found = set(seen_in.in_messages(conversation))
        if self.renderer.chat is None:
            return frozenset(found)
        hidden, rendered = self.renderer.chat.prompt(conversation)
        if hidden is not None:
            found.add(Kind.CONTROL_TOKEN)
        shown = conversation if hidden is None else hidden.conversation
        if seen_in.loses_message(shown, rendered.text):
            found.add(Kind.LOST_MESSAGE)
        if shown.tools and seen_in.loses_tools(shown, rendered.text, self.renderer.chat.template):
            found.add(Kind.LOST_TOOLS)
        return frozenset(found)


def _number(data: bytes) -> int:
    return int.from_bytes(digest(data), "little")


def _column(row: Row, name: str) -> object:
    value = row.record.get(name)
    if not isinstance(value, str | int | float | bool):
        what = f"the group `{name}` is {'missing' if name not in row.record else 'no text or number'}"
        raise InputError(what, where=row.origin, mend=f"the row's columns are {', '.join(row.record)}")
    return value
