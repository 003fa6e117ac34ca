"""The one way in: a recipe's data become training rows, held-out rows, a mixture, and what is to be said about them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray

from welltuned.data.audit import Audit, audit
from welltuned.data.build import Reading, RowsRead, conversations_at, read_store, unwatched
from welltuned.data.cache import Cache
from welltuned.data.conversation import Conversation, Format, Kind, Policy, Teaching
from welltuned.data.mix import Mixture, mixture
from welltuned.data.policies import (
    DEFAULT_POLICIES,
    KEPT_ORIGINS,
    Finding,
    Policies,
    bad_rows,
    sift_duplicates,
    sift_leaks,
    sift_length,
    sift_seen,
    together,
)
from welltuned.data.render import LossOn
from welltuned.data.rows import Rows, all_rows
from welltuned.data.source import Source, open_source
from welltuned.data.store import About
from welltuned.data.stream import hold_out
from welltuned.errors import InputError
from welltuned.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SEED = 3407
_ALL_OF_THEM = " pieces: nothing of them is left out, and no piece sees what is before it."
TEACHING: Mapping[str, Teaching] = MappingProxyType(
    {"dpo": Teaching.PAIRS, "orpo": Teaching.PAIRS, "reward": Teaching.PAIRS, "kto": Teaching.LABELS}
)


@dataclass(frozen=True, slots=True)
class Sources:
    """The recipe's data, opened and not yet read."""

    train: tuple[Source, ...]
    held_out: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dataset:
    """What a run trains on and is judged by.

    Attributes:
        train: training rows, those of one source after the other's.
        held_out: of the sources in `held_out_sources`, in their order.
        mixture: which training rows make an epoch.
        findings: what was found of each kind of defect, and done about it.
        chat_template: the template that rows are rendered with, which inference must use too; None for plain text.
        notes: sentences on how the data were read.
    """

    recipe: Recipe
    reading: Reading
    policies: Policies
    sources: Sources
    train: Rows
    held_out: Rows
    mixture: Mixture
    findings: Mapping[Kind, Finding]
    chat_template: str | None
    notes: tuple[str, ...]

    @property
    def formats(self) -> str:
        """The formats that the rows were in."""
        return ", ".join(dict.fromkeys(part.store.about.format_name for part in self.train.parts))

    @property
    def held_out_sources(self) -> tuple[Source, ...]:
        return self.sources.held_out or self.sources.train

    def audit(self, context: int | None = None) -> Audit:
        """Counts and sentences; `context` is the model's own length."""
        return audit(self.train, self.held_out, self.findings, context=context)

    def within(self, max_length: int) -> "Dataset":
        """The same with training rows of at most `max_length` tokens, cut or left out as the policies say.

        Documents lie in pieces then, so that nothing of them is lost.

        Raises:
            InputError: a policy makes a longer row an error, or a row loses all that it teaches.
        """
        if self._cuts_documents and len(pieces := self.train.in_pieces(max_length)) > len(self.train):
            return self._with_pieces(pieces, max_length)
        short = sift_length(self.train, max_length, self.policies)
        if not len(short.rows):
            raise InputError(f"no training row is within max_length {max_length:,}", where="max_length")
        findings = dict(self.findings)
        findings[Kind.TOO_LONG] = together(self._no_longer_too_long(), short.too_long)
        findings[Kind.UNTRAINED] = together(findings[Kind.UNTRAINED], short.untrained)
        mixed = _mixture(self.recipe, short.rows)
        return replace(self, train=short.rows, mixture=mixed, findings=MappingProxyType(findings))

    @property
    def in_pieces(self) -> bool:
        """Whether documents are trained in pieces."""
        return any(part.starts is not None for part in self.train.parts)

    @property
    def _cuts_documents(self) -> bool:
        return self.policies[Kind.TOO_LONG] is Policy.KEEP and self.reading.teaching is Teaching.ANSWERS

    def _with_pieces(self, pieces: Rows, max_length: int) -> "Dataset":
        rows = [part.index[part.starts > 0] for part in pieces.parts if part.starts is not None]
        long = sum(len(np.unique(index)) for index in rows)
        more = sum(map(len, rows)) + long
        note = f"{long:,} documents are longer than max_length {max_length:,} and are trained in {more:,}{_ALL_OF_THEM}"
        notes = (*(n for n in self.notes if not n.endswith(_ALL_OF_THEM)), note)
        return replace(self, train=pieces, mixture=_mixture(self.recipe, pieces), notes=notes)

    def _no_longer_too_long(self) -> Finding:
        """What an earlier limit found, without the rows that are still there: those are found again."""
        found, limit = self.findings[Kind.TOO_LONG], self.train.max_length
        if limit is None or not found.rows:
            return found
        there = np.flatnonzero(self.train.column("longest") > limit)
        named = {self.train.origin(int(i)) for i in there[:KEPT_ORIGINS]}
        gone = tuple(name for name in found.named if name[0] not in named)
        return replace(found, rows=found.rows - len(there), named=gone)

    def held_out_within(self, max_length: int | None) -> "Dataset":
        """The same with held-out rows of at most `max_length` tokens, and a note where some are longer."""
        if max_length is None or not len(self.held_out):
            return self
        held_out = self.held_out.in_pieces(max_length) if self._cuts_documents else self.held_out
        short = sift_length(held_out, max_length, self.policies)
        if not short.too_long.rows:
            return replace(self, held_out=short.rows)
        done = "were left out" if short.too_long.dropped else "were cut"
        note = f"{short.too_long.rows:,} held-out rows are longer than {max_length:,} tokens and {done}"
        if short.untrained.rows:
            note += f"; {short.untrained.rows:,} of them lost their whole answers and were left out"
        untrained = together(self.findings[Kind.UNTRAINED], short.untrained)
        findings = MappingProxyType({**self.findings, Kind.UNTRAINED: untrained})
        return replace(self, held_out=short.rows, findings=findings, notes=(*self.notes, note + "."))

    def held_out_conversations(self) -> "Conversations":
        """The conversations of the held-out rows, for replies to them."""
        return Conversations(self.held_out, self.held_out_sources, self.reading)


class Conversations(Sequence[Conversation]):
    """The conversations behind rows, read from their sources when the first one is asked for."""

    def __init__(self, rows: Rows, sources: Sequence[Source], reading: Reading):
        self._rows, self._sources, self._reading = rows, sources, reading

    @cached_property
    def _read(self) -> tuple[Conversation, ...]:
        return tuple(self._each())

    def _each(self) -> Iterator[Conversation]:
        for part, source in zip(self._rows.parts, self._sources, strict=True):
            if len(part.index):
                numbers = part.store.column("row")[part.index].tolist()  # a document's once for each of its pieces
                different = list(dict.fromkeys(numbers))
                found = dict(zip(different, conversations_at(source, self._reading, different), strict=True))
                yield from (found[number] for number in numbers)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Conversation, ...]: ...
    def __getitem__(self, index: int | slice) -> Conversation | tuple[Conversation, ...]:
        return self._read[index]


def open_sources(recipe: Recipe) -> Sources:
    """Find the recipe's data, before anything slow is done for them."""
    train = tuple(open_source(spec, recipe.subset, recipe.split) for spec in recipe.datasets)
    return Sources(train, tuple(open_source(spec) for spec in recipe.eval_datasets))


def read_dataset(
    recipe: Recipe,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sources: Sources | None = None,
    embedding: int | None = None,
    cache: Cache | None = None,
    progress: RowsRead = unwatched,
) -> Dataset:
    """Read, render, choose and split, by the recipe.

    Args:
        embedding: the number of tokens that the model knows.

    Raises:
        InputError: data that cannot be read, or a defect whose policy is error.
    """
    sources, cache = sources or open_sources(recipe), cache or Cache()
    reading, policies = reading_of(recipe), policies_of(recipe)
    every = (*sources.train, *sources.held_out)
    stores = [read_store(source, tokenizer, reading, policies[Kind.BAD_ROW], cache, progress) for source in every]
    if embedding is not None:
        for store in stores:
            _check_vocabulary(store.about, embedding)
    findings = {Kind.BAD_ROW: bad_rows([store.about for store in stores], policies[Kind.BAD_ROW])}
    rows, seen = sift_seen(all_rows(stores), policies)
    findings |= {finding.kind: finding for finding in seen}
    train, held_out, sentence = _split(recipe, rows, len(sources.train))
    if not len(train):
        raise InputError("no training row is left", where=recipe.datasets[0], mend="see the policies of the recipe")
    if reading.teaching is Teaching.LABELS:
        _require_both_labels(train, recipe.datasets[0])
    train, findings[Kind.LEAK] = sift_leaks(train, held_out, policies[Kind.LEAK])
    train, findings[Kind.DUPLICATE] = sift_duplicates(train, policies[Kind.DUPLICATE])
    findings[Kind.TOO_LONG] = Finding(Kind.TOO_LONG, policies[Kind.TOO_LONG], of=len(train))
    mixed = _mixture(recipe, train)
    notes = [*_source_notes(every, [s.about for s in stores]), sentence, *_mixture_notes(recipe, mixed), *cache.notes]
    return Dataset(
        recipe=recipe,
        reading=reading,
        policies=policies,
        sources=sources,
        train=train,
        held_out=held_out,
        mixture=mixed,
        findings=MappingProxyType({kind: findings[kind] for kind in Kind}),
        chat_template=reading.renderer(tokenizer).template,
        notes=tuple(notes),
    )


def reading_of(recipe: Recipe) -> Reading:
    """The recipe's keys about reading and rendering, as this room names them."""
    loss_on = LossOn(recipe.loss_on or LossOn.ASSISTANT)
    if recipe.hyperparameters.get("assistant_only_loss") is False:
        loss_on = LossOn.EVERYTHING
    return Reading(
        teaching=TEACHING.get(recipe.method, Teaching.ANSWERS),
        format=_format(recipe.format),
        mapping=dict(_pair(pair) for pair in recipe.map or ()),
        group_by=recipe.group_by,
        loss_on=loss_on,
        instruction_part=recipe.instruction_part,
        response_part=recipe.response_part,
        chat_template=recipe.chat_template,
        chat_template_kwargs=dict(recipe.chat_template_kwargs or {}),
    )


def _require_both_labels(train: Rows, where: str) -> None:
    labels = train.column("label")
    if labels.min() == labels.max():
        kind, other = ("desirable", "undesirable") if labels[0] else ("undesirable", "desirable")
        what = f"all {len(train):,} training rows are labelled {kind}, and kto learns from how the two kinds differ"
        raise InputError(what, where=where, mend=f"add rows labelled {other}" + ", or use sft" * int(labels[0]))


def policies_of(recipe: Recipe) -> Policies:
    """The policy of every kind of defect: the recipe's, or the default."""
    given = {kind: recipe.policies.get(f"on_{kind}", policy) for kind, policy in DEFAULT_POLICIES.items()}
    return MappingProxyType({kind: Policy(policy) for kind, policy in given.items()})


def _pair(text: str) -> tuple[str, str]:
    ours, _, theirs = text.partition("=")
    return ours.strip(), theirs.strip()


def _format(name: str | None) -> Format | None:
    if name is None:
        return None
    names = [str(member) for member in Format]
    if name in names:
        return Format(name)
    close = get_close_matches(name, names, n=1)
    mend = f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}"
    raise InputError(f"unknown format '{name}'", where="format", mend=mend)


def _check_vocabulary(about: About, embedding: int) -> None:
    """By the tokens that the rows use: Gemma 3 1B's own tokenizer has one more than its embedding, an image's."""
    if about.largest_id >= embedding:
        what = f"the row has token {about.largest_id}, and the model's embedding ends with {embedding - 1}"
        raise InputError(what, where=about.largest_id_origin, mend="use the tokenizer that belongs to the model")


def _split(recipe: Recipe, rows: Rows, datasets: int) -> tuple[Rows, Rows, str]:
    """Training rows, held-out rows, and a sentence."""
    if recipe.eval_data is not None:
        train, held_out = (replace(rows, parts=p) for p in (rows.parts[:datasets], rows.parts[datasets:]))
        if not len(held_out):
            raise InputError("no held-out row is left", where=recipe.eval_datasets[0], mend="see the recipe's policies")
        return train, held_out, f"Held out: the {len(held_out):,} rows of {', '.join(recipe.eval_datasets)}."
    split = hold_out(
        rows.column("group"),
        recipe.eval_fraction,
        recipe.hyperparameters.get("seed", DEFAULT_SEED),
        owner=rows.owner(),
        shared="a prompt" if recipe.group_by is None else f"the same `{recipe.group_by}`",
        finer=_asked_last(rows) if recipe.group_by is None else None,
    )
    return rows.where(~split.held_out), rows.where(split.held_out), split.sentence


def _asked_last(rows: Rows) -> NDArray[np.uint64]:
    """A number for each row [n]: what stands before its last answer; where nothing does, all of it."""
    asked = rows.column("prompt")
    return np.where(asked != 0, asked, rows.column("digest"))


def _mixture(recipe: Recipe, train: Rows) -> Mixture:
    seed = recipe.hyperparameters.get("seed", DEFAULT_SEED)
    return mixture(train.sizes(), seed, weights=recipe.data_weights, counts=recipe.data_rows, names=recipe.datasets)


def _source_notes(sources: Sequence[Source], abouts: Sequence[About]) -> Iterator[str]:
    sentences = {about.format_sentence for about in abouts}
    if len(sentences) == 1:
        yield from sentences
    for source, about in zip(sources, abouts, strict=True):
        name = f"{source.name}: " if len(sources) > 1 else ""
        if len(sentences) > 1:
            yield name + about.format_sentence
        if source.note is not None:
            yield name + source.note
        if source.skipped:
            yield f"{name}files that are not data were skipped: {', '.join(source.skipped)}"
        if about.not_trained:
            yield f"{name}{about.not_trained:,} rows are left out, since their answers are labelled as undesirable"
    how = dict.fromkeys(about.mask_from for about in abouts)
    yield f"Trained tokens are found from {' and '.join(how)}."


def _mixture_notes(recipe: Recipe, mixed: Mixture) -> Iterator[str]:
    if len(mixed.rows) > 1 or mixed.quotas != mixed.rows:
        parts = [
            f"{quota:,} of {have:,} rows of {name}" + (" (repeated)" if quota > have else "")
            for name, have, quota in zip(recipe.datasets, mixed.rows, mixed.quotas, strict=True)
        ]
        yield f"An epoch takes {', '.join(parts)}."
