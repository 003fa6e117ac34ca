"""One function gives a conversation's token ids and its loss mask together, and whose each token is.

The template writes every special token itself, so none is added (no double BOS). One that a row's own text spells is
tokenised as text (see `control`), at inference too. Texts that are rendered without a template, documents and prompts
with completions for a base model, are taken as they are: what they spell are control tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from welltuned.data import findings
from welltuned.data.chat import Chat
from welltuned.data.control import THINKING, Hidden
from welltuned.data.conversation import Conversation, Defect, Format, Kind, Policy
from welltuned.data.fork import Fork
from welltuned.data.parts import Parts
from welltuned.data.spans import LossOn, MaskFrom, Rendered, wanted
from welltuned.data.speakers import Speaker
from welltuned.data.templates import MEND_TEMPLATE, NO_VALUES, control_tokens, resolve_chat_template
from welltuned.data.tokens import FastEncoder, SlowTokeniser, Tokenised, Tokeniser, opened, opening_ids
from welltuned.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Example",
    "LossOn",
    "MaskFrom",
    "Overlong",
    "Renderer",
    "Rendering",
    "Speaker",
    "one_per_answer",
    "render",
    "render_all",
    "render_prompt",
    "shortened",
    "trained_runs",
    "trained_texts",
]

CHUNK = 512  # conversations tokenised at a time: long enough to use all cores, short enough to bound the memory


class Overlong(StrEnum):
    """What happens to an example of more than `max_length` tokens; each is named in the result."""

    TRUNCATE = "truncate"
    DROP = "drop"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Example:
    """ids [n] int32 and mask [n] bool: mask[t] says that token t is a target. The first token never is."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    origin: str
    cut: bool = False  # shortened to max_length
    roles: NDArray[np.uint8] | None = None  # [n] whose token it is: a Speaker's value; None where not asked for
    found: frozenset[Kind] = frozenset()  # what rendering saw
    fork: Fork | None = None  # where a preference pair forks
    desirable: bool | None = None  # how an answer is judged, where it is


@dataclass(frozen=True, slots=True)
class Rendering:
    """All examples, how their masks were found, and what was cut, dropped, or tokenised in pieces."""

    examples: list[Example]
    mask_from: MaskFrom
    cut: tuple[str, ...] = ()  # origins of the examples shortened to max_length
    dropped: tuple[Defect, ...] = ()
    boundary_splits: int = 0  # examples split between prompt and answer, since inference tokenises the prompt alone


class Renderer:
    """Conversations to examples: ids, mask, roles and what was found, for one tokenizer and one dataset.

    Attributes:
        template: the chat template; None where texts are taken as they are.
        mask_from: how the trained tokens were found, after the first call.
        boundary_splits: rows tokenised in pieces, since inference tokenises the prompt alone.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        loss_on: LossOn = LossOn.ASSISTANT,
        instruction_part: str | None = None,
        response_part: str | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] = NO_VALUES,
    ):
        self.parts = _parts(instruction_part, response_part)
        self.template = resolve_chat_template(tokenizer, chat_template, chat_template_kwargs)
        if self.parts is not None and self.template is None:
            raise InputError("`instruction_part` and `response_part` need a chat template", mend=MEND_TEMPLATE)
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.mask_from: MaskFrom | None = None
        self.tokeniser = _tokeniser(tokenizer)
        closing = {index for text, index in control_tokens(tokenizer).items() if not THINKING.search(text)}
        self.ends = frozenset(closing if tokenizer.eos_token_id is None else {*closing, tokenizer.eos_token_id})
        self.chat = None if self.template is None else Chat(tokenizer, self.template)

    @property
    def boundary_splits(self) -> int:
        twin = self.chat.twin if self.chat is not None else None
        return self.tokeniser.boundary_splits + (twin.boundary_splits if twin is not None else 0)

    def __call__(self, conversations: Sequence[Conversation]) -> list[Example]:
        """One example for each conversation, in order; InputError with the origin of one that cannot be rendered."""
        examples: list[Example] = []
        for first in range(0, len(conversations), CHUNK):
            examples += self._chunk(conversations[first : first + CHUNK])
        return examples

    def prompt(self, conversation: Conversation) -> list[int]:
        """As `render_prompt`, for whoever asks more than once: what rows with control tokens need is built once."""
        if self.chat is None:
            return _plain_prompt(conversation, self.tokenizer, self.tokeniser)
        hidden, row = self.chat.prompt(conversation)
        return self._tokenised([row], [hidden])[0].ids.tolist()

    def _chunk(self, conversations: Sequence[Conversation]) -> list[Example]:
        chats = [i for i, c in enumerate(conversations) if self.chat is not None and c.format is not Format.TEXT]
        texts = sorted(set(range(len(conversations))) - set(chats))
        examples = dict(zip(texts, self._texts([conversations[i] for i in texts]), strict=True))
        examples |= dict(zip(chats, self._chats([conversations[i] for i in chats]), strict=True))
        return [examples[i] for i in range(len(conversations))]

    def _chats(self, conversations: Sequence[Conversation]) -> Iterator[Example]:
        if self.chat is None or not conversations:
            return
        hidden = [self.chat.guard.hide(c) for c in conversations]
        shown = [c if h is None else h.conversation for c, h in zip(conversations, hidden, strict=True)]
        rows, how = self.chat.rows(shown, self.loss_on, self.parts)
        self.mask_from = MaskFrom.MARKERS if MaskFrom.MARKERS in (self.mask_from, how) else how
        for conversation, row, spelled in zip(conversations, rows, hidden, strict=True):
            if spelled is not None:
                self.chat.guard.require_harmless(conversation, spelled, row.text)
        tokenised = self._tokenised(rows, hidden)
        for conversation, row, spelled, tokens in zip(shown, rows, hidden, tokenised, strict=True):
            self._require_one_start(tokens, row.origin)
            found = {Kind.CONTROL_TOKEN} if spelled is not None else set()
            trained = wanted(conversation, self.loss_on)
            if findings.loses_thinking(conversation, row.text, row.answers, trained):
                found.add(Kind.LOST_THINKING)
            if findings.loses_message(conversation, row.text):
                found.add(Kind.LOST_MESSAGE)
            if conversation.tools and findings.loses_tools(conversation, row.text, self.chat.template):
                found.add(Kind.LOST_TOOLS)
            yield self._example(conversation, tokens, found)

    def _texts(self, conversations: Sequence[Conversation]) -> Iterator[Example]:
        """The text and an end token, with the start token once if the tokenizer adds one by itself."""
        if not conversations:
            return
        end = self.tokenizer.eos_token_id
        if end is None:
            raise InputError("the tokenizer has no end token, so the model would never learn to stop")
        rows = [_plain_text(c, self.loss_on) for c in conversations]
        documents = all(c.format is Format.TEXT for c in conversations)
        self.mask_from = self.mask_from or (MaskFrom.EVERYTHING if documents else MaskFrom.PLAIN)
        opening = opening_ids(self.tokenizer)
        for conversation, row, (ids, mask, roles) in zip(conversations, rows, self.tokeniser.rows(rows), strict=True):
            added = len(ids)
            ids = opened(ids, opening)
            added = len(ids) - added
            mask = np.concatenate([np.zeros(added, bool), mask])
            roles = np.concatenate([np.zeros(added, np.uint8), roles])
            if ids[-1] != end:
                ids, mask = np.append(ids, np.int32(end)), np.append(mask, bool(row.spans))
                roles = np.append(roles, np.uint8(row.said[-1][2] if row.said else 0))
            yield self._example(conversation, Tokenised(ids, mask, roles), set())

    def _example(self, conversation: Conversation, tokens: Tokenised, found: set[Kind]) -> Example:
        tokens.mask[:1] = False  # nothing comes before the first token that it could be predicted from
        found.update(findings.in_messages(conversation))
        found.update(findings.in_tokens(tokens.ids, tokens.mask, self.ends, self.loss_on is LossOn.EVERYTHING))
        return Example(tokens.ids, tokens.mask, conversation.origin, roles=tokens.roles, found=frozenset(found))

    def _tokenised(self, rows: Sequence[Rendered], hidden: Sequence[Hidden | None]) -> list[Tokenised]:
        plain = self.tokeniser.rows([row for row, spelled in zip(rows, hidden, strict=True) if spelled is None])
        if len(plain) == len(rows) or self.chat is None:
            return plain
        own = self.chat.tokenised([(r, h) for r, h in zip(rows, hidden, strict=True) if h is not None])
        tokens, plain_tokens = iter(own), iter(plain)
        return [next(plain_tokens) if spelled is None else next(tokens) for spelled in hidden]

    def _require_one_start(self, tokens: Tokenised, origin: str) -> None:
        start = self.tokenizer.bos_token_id
        if start is not None and len(tokens.ids) > 1 and tokens.ids[0] == start == tokens.ids[1]:
            what = f"the chat template writes the start token {self.tokenizer.bos_token!r} twice"
            raise InputError(what, where=origin, mend="take one out of the template, and give that as `chat_template`")


def render(
    conversation: Conversation,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    loss_on: LossOn = LossOn.ASSISTANT,
    max_length: int | None = None,
    instruction_part: str | None = None,
    response_part: str | None = None,
    chat_template: str | None = None,
) -> Example:
    """Ids and mask of one conversation; see `render_all`, of which this is the case of one row."""
    return render_all(
        [conversation],
        tokenizer,
        loss_on=loss_on,
        max_length=max_length,
        instruction_part=instruction_part,
        response_part=response_part,
        chat_template=chat_template,
    ).examples[0]


def render_all(
    conversations: Sequence[Conversation],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    loss_on: LossOn = LossOn.ASSISTANT,
    max_length: int | None = None,
    overlong: Overlong = Overlong.TRUNCATE,
    on_defect: Policy = Policy.ERROR,
    instruction_part: str | None = None,
    response_part: str | None = None,
    chat_template: str | None = None,
) -> Rendering:
    """Ids and masks of all conversations, in order; the rows left out are named in the result.

    `chat_template` is a file, an inline template, `chatml`, or None for the tokenizer's own. A row none of whose tokens
    is trained (cut before its answer, say) is a defect: an error, or dropped under `on_defect`.
    """
    if max_length is not None and max_length < 2:
        raise InputError(f"max_length is {max_length}, and a token is learned from the one before it", mend="give more")
    renderer = Renderer(
        tokenizer,
        loss_on=loss_on,
        instruction_part=instruction_part,
        response_part=response_part,
        chat_template=chat_template,
    )
    kept, dropped = _shorten(renderer(conversations), max_length, overlong, on_defect)
    cut = tuple(e.origin for e in kept if e.cut)
    return Rendering(kept, renderer.mask_from or MaskFrom.PREFIXES, cut, dropped, renderer.boundary_splits)


def render_prompt(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase", template: str | None) -> list[int]:
    """Ids of what the model is given at inference, up to where it begins to answer: as in training.

    `template` is the jinja text; None for plain text, which gets the start token if the tokenizer adds one by itself.
    """
    if template is None:
        return _plain_prompt(conversation, tokenizer, _tokeniser(tokenizer))
    return Renderer(tokenizer, chat_template=template).prompt(conversation)


def shortened(example: Example, max_length: int) -> Example:
    """The example's first `max_length` tokens, of a pair those of each sequence; itself where it is not longer."""
    if len(example.ids) <= max_length:
        return example
    keep, fork = np.arange(len(example.ids)) < max_length, None
    if example.fork is not None:
        keep, fork = example.fork.cut(len(example.ids), max_length)
        if keep.all():
            return example
    mask = example.mask[keep]
    return replace(
        example,
        ids=example.ids[keep],
        mask=mask,
        cut=True,
        roles=None if example.roles is None else example.roles[keep],
        found=example.found if mask.any() else example.found | {Kind.UNTRAINED},
        fork=fork,
    )


def one_per_answer(conversation: Conversation, loss_on: LossOn = LossOn.ASSISTANT) -> list[Conversation]:
    """A conversation for each trained answer, which ends with it and trains nothing else.

    For templates that render a turn differently once others follow (Qwen 3 leaves out earlier thinking): every answer
    is then trained just as it is generated.
    """
    return [
        replace(conversation, messages=conversation.messages[: index + 1], trained_from=index)
        for index in wanted(conversation, loss_on)
    ]


def trained_texts(example: Example, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The text of each trained run of tokens, special tokens shown: what the model learns to say."""
    return [str(tokenizer.decode(example.ids[a:b].tolist())) for a, b in trained_runs(example.mask)]


def trained_runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Token ranges [start, end) in which every token is trained."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _shorten(
    examples: Sequence[Example], max_length: int | None, overlong: Overlong, on_defect: Policy
) -> tuple[list[Example], tuple[Defect, ...]]:
    """Examples within max_length and with something to learn; the others as defects, or as an InputError."""
    kept: list[Example] = []
    dropped: list[Defect] = []
    for example in examples:
        length = len(example.ids)
        if max_length is not None and length > max_length:
            what = f"the row has {length:,} tokens, more than max_length {max_length:,}"
            if overlong is Overlong.ERROR:
                raise InputError(what, where=example.origin, mend="raise max_length, or choose to truncate or drop")
            if overlong is Overlong.DROP:
                dropped.append(Defect(example.origin, what))
                continue
            example = shortened(example, max_length)
        if not example.mask.any():
            what = "none of the row's tokens is trained"
            what += f": cut to max_length {max_length:,} it loses its whole answer" if example.cut else ""
            if on_defect is Policy.ERROR:
                mend = "raise max_length, or drop such rows" if example.cut else "see what the chat template renders"
                raise InputError(what, where=example.origin, mend=mend)
            dropped.append(Defect(example.origin, what))
            continue
        kept.append(example)
    return kept, tuple(dropped)


def _tokeniser(tokenizer: "PreTrainedTokenizerBase") -> Tokeniser | SlowTokeniser:
    return Tokeniser(FastEncoder(tokenizer)) if tokenizer.is_fast else SlowTokeniser(tokenizer)


def _plain_prompt(
    conversation: Conversation, tokenizer: "PreTrainedTokenizerBase", tokeniser: Tokeniser | SlowTokeniser
) -> list[int]:
    ids = np.array(tokeniser.ids("".join(message.content for message in conversation.messages)), np.int32)
    return [int(i) for i in opened(ids, opening_ids(tokenizer))]


def _parts(instruction: str | None, response: str | None) -> Parts | None:
    if (instruction is None) != (response is None):
        missing = "instruction_part" if instruction is None else "response_part"
        raise InputError(f"`{missing}` is missing", mend="give both parts, or neither")
    if instruction is None or response is None:
        return None
    if not instruction or not response:
        raise InputError("`instruction_part` and `response_part` must not be empty")
    return Parts(instruction, response)


def _plain_text(conversation: Conversation, loss_on: LossOn) -> Rendered:
    """A document, trained whole; or a prompt and its completion, as they are."""
    if conversation.format is Format.TEXT:
        [document] = conversation.messages
        end = len(document.content)
        spans = ((0, end),) if document.trained is not False and end else ()
        return Rendered(document.content, spans, conversation.origin, said=((0, end, int(Speaker.DOCUMENT)),))
    if conversation.format is not Format.PROMPT_COMPLETION:
        what = f"the tokenizer has no chat template, and the data are {conversation.format.value}"
        raise InputError(what, where=conversation.origin, mend=MEND_TEMPLATE)
    prompt, completion = conversation.messages
    between, end = len(prompt.content), len(prompt.content) + len(completion.content)
    start = 0 if loss_on is LossOn.EVERYTHING else between
    spans = () if completion.trained is False else ((start, end),)
    said = ((0, between, int(Speaker.USER)), (between, end, int(Speaker.ASSISTANT)))
    text = prompt.content + completion.content
    return Rendered(text, spans, conversation.origin, starts=(between,), said=said)
