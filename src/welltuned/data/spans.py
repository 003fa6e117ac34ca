"""Which characters of a rendered conversation are trained: what the model must generate, its end-of-turn included.

Three ways: {% generation %} markers in the template; renders of the conversation up to each answer, which must be
exact prefixes of the whole; or the marker strings that the user gives. The first two must agree where both work.
An answer begins where the generation prompt ends, and ends with its end-of-turn token: the whitespace that a template
writes after that token is the next turn's, is never generated, and is not trained. A template that closes a turn with
ordinary text only has that text trained whole, whitespace included, because nothing else would tell the model to stop.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

from welltuned.data.conversation import Conversation, Message
from welltuned.data.findings import without_thoughts
from welltuned.data.parts import MEND_PARTS, Parts, part_turns
from welltuned.data.speakers import Said, Span
from welltuned.data.templates import (
    Prompt,
    any_of,
    control_tokens,
    has_generation_markers,
    render_marked,
    render_texts,
    try_render_texts,
)
from welltuned.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LossOn(StrEnum):
    """Which tokens are trained. Messages of an explicit prompt never are, except under EVERYTHING."""

    ASSISTANT = "assistant"  # every assistant turn
    LAST = "last"  # the last assistant turn only
    EVERYTHING = "everything"  # the whole text, prompts too


class MaskFrom(StrEnum):
    """How the trained characters were found; the caller prints it."""

    MARKERS = "the template's generation markers"
    MARKERS_CHECKED = "the template's generation markers, checked against prefix renders"
    PREFIXES = "prefix renders of the template"
    PARTS = "the given instruction_part and response_part"
    EVERYTHING = "everything is trained"
    PLAIN = "the completion of plain text, without a chat template"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation's text, and which characters of it are trained.

    Attributes:
        text: as rendered.
        spans: the trained ones, in order and apart from each other.
        origin: of the row.
        answers: the assistant turns whose characters are known for certain, trained or not, by message index.
        starts: where these begin, in order: the ends of what would be a prompt at inference.
        said: whose characters they are, where that is known; see `speakers`.
    """

    text: str
    spans: tuple[Span, ...]
    origin: str
    answers: Mapping[int, Span] = field(default_factory=dict)
    starts: tuple[int, ...] = ()
    said: tuple[Said, ...] = ()


class Unstable(InputError):
    """The render up to an answer is no prefix of the whole, so the answer's characters are not known from it."""


class Ends:
    """The tokens with which a template may close a turn, for a quick look at the end of a text."""

    def __init__(self, tokens: Iterable[str]):
        self.tokens = frozenset(tokens)
        self.lengths = sorted({len(token) for token in self.tokens})

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(any_of(tuple(self.tokens)))

    def close(self, text: str) -> bool:
        return any(text[-length:] in self.tokens for length in self.lengths)

    def without_tokens(self, text: str) -> str:
        return self.pattern.sub(" ", text)

    def without_space_after(self, text: str, span: Span) -> Span:
        """The span without the whitespace after an end-of-turn token."""
        start, end = span
        stripped = text[start:end].rstrip()
        return (start, start + len(stripped)) if self.close(stripped) else span


def rendered_spans(
    conversations: Sequence[Conversation],
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    loss_on: LossOn,
    parts: Parts | None,
    closing: str = "",
) -> tuple[list[Rendered], MaskFrom]:
    """Text and trained spans of each conversation; InputError when they cannot be known for certain. `closing` is what
    the template writes after the last turn (`templates.closing_text`)."""
    texts = render_texts(tokenizer, template, [Prompt(c, len(c.messages)) for c in conversations])
    ends = Ends(control_tokens(tokenizer))
    if loss_on is LossOn.EVERYTHING:
        parts = None
    turns = _turns(conversations, texts, tokenizer, template, parts, closing)
    known = [
        {i: ends.without_space_after(t, s) for i, s in row.items() if isinstance(s, tuple)}
        for t, row in zip(texts, turns, strict=True)
    ]
    how = MaskFrom.PREFIXES if parts is None else MaskFrom.PARTS
    if loss_on is LossOn.EVERYTHING:
        spans, how = [[(0, len(text))] for text in texts], MaskFrom.EVERYTHING
    elif parts is None and has_generation_markers(template):
        spans, how = [], MaskFrom.MARKERS_CHECKED
        for number, (conversation, text, row) in enumerate(zip(conversations, texts, known, strict=True)):
            found, answers = _marker_spans(conversation, text, row, tokenizer, template, loss_on, ends, closing)
            spans.append(found)
            if answers is not None:
                known[number], how = answers, MaskFrom.MARKERS
    else:
        spans = [
            _chosen(c, t, row, loss_on, tokenizer, template)
            for c, t, row in zip(conversations, texts, turns, strict=True)
        ]
    trained = [
        tuple(s) if how is MaskFrom.EVERYTHING else _clean(t, s, ends) for t, s in zip(texts, spans, strict=True)
    ]
    rendered = []
    for conversation, text, chosen, answers in zip(conversations, texts, trained, known, strict=True):
        require_said(conversation, text, answers, wanted(conversation, loss_on), ends)
        starts = tuple(sorted(start for start, _ in answers.values()))
        rendered.append(Rendered(text, chosen, conversation.origin, answers, starts))
    return rendered, how


def _turns(
    conversations: Sequence[Conversation],
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    parts: Parts | None,
    closing: str,
) -> Sequence[Mapping[int, Span | InputError]]:
    """Each conversation's assistant turns, by the given parts or by prefix renders."""
    if parts is None:
        return prefix_turns(conversations, texts, tokenizer, template, closing)
    return [
        part_turns(conversation, text.removesuffix(closing), parts, tokenizer, template)
        for conversation, text in zip(conversations, texts, strict=True)
    ]


def wanted(conversation: Conversation, loss_on: LossOn) -> list[int]:
    """Indices of the assistant messages that are trained: a message's own `trained` counts for more than `loss_on`."""
    messages = conversation.messages
    for message in messages:
        if message.trained and message.role != "assistant":
            what = f"a {message.role} message is marked to be trained, and only the assistant's can be"
            raise InputError(what, where=conversation.origin, mend="take its `train` or `weight` out")
    answers = [i for i, m in enumerate(messages) if m.role == "assistant" and i >= conversation.trained_from]
    last = answers[-1:]
    own = {i: messages[i].trained for i in answers}
    return [i for i in answers if own[i] or (own[i] is None and (loss_on is not LossOn.LAST or i in last))]


def require_said(
    conversation: Conversation, text: str, answers: Mapping[int, Span], indices: Sequence[int], ends: Ends
) -> None:
    """InputError where an answer's turn has nothing of the answer's text, or does not name a tool that it calls."""
    for index in indices:
        message = conversation.messages[index]
        start, end = answers.get(index, (0, 0))
        left_out = None
        if "tool_calls" in message.extra:
            names = _called(message)
            left_out = next((f"call of {n!r}" for n in names if end and text.find(n, start, end) < 0), None)
        elif start == end or text.find(message.content, start, end) >= 0:
            continue
        elif not _says(text[start:end], message.content, ends):
            left_out = "text"
        if left_out is not None:
            what = f"the chat template leaves out the {left_out} of the answer (message {index})"
            raise InputError(what, where=conversation.origin, mend="give another `chat_template`")


def _says(said: str, content: str, ends: Ends) -> bool:
    """Whether a turn says anything of a text: one of its words, or, where it has no words, anything at all."""
    answer = without_thoughts(content)
    content = answer if answer.strip() else content
    words = set(re.findall(r"\w+", ends.without_tokens(content).casefold()))
    if words:
        return not words.isdisjoint(re.findall(r"\w+", ends.without_tokens(said).casefold()))
    return bool(ends.without_tokens(said).strip()) or not ends.without_tokens(content).strip()


def _called(message: Message) -> list[str]:
    """The names of the tools that a message calls, where they are given in the usual form."""
    calls = message.extra["tool_calls"]
    functions = [c.get("function", c) for c in calls if isinstance(c, dict)] if isinstance(calls, list | tuple) else []
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    return [name for name in names if isinstance(name, str)]


def _clean(text: str, spans: Sequence[Span], ends: Ends) -> tuple[Span, ...]:
    """Spans without the whitespace after an end-of-turn token, without empty ones, touching ones joined."""
    cleaned: list[Span] = []
    for span in spans:
        start, end = ends.without_space_after(text, span)
        if cleaned and cleaned[-1][1] == start:
            cleaned[-1] = (cleaned[-1][0], end)
        elif end > start:
            cleaned.append((start, end))
    return tuple(cleaned)


def prefix_turns(
    conversations: Sequence[Conversation],
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    closing: str = "",
) -> list[dict[int, Span | InputError]]:
    """The characters of every assistant turn, by message index: from the render up to it, generation prompt included,
    to the render that ends with it. Where one of these is no prefix of the whole: the reason."""
    turns = [(row, i) for row, c in enumerate(conversations) for i, m in enumerate(c.messages) if m.role == "assistant"]
    before = try_render_texts(tokenizer, template, [Prompt(conversations[r], t, True) for r, t in turns])
    inner = [(row, turn) for row, turn in turns if turn + 1 < len(conversations[row].messages)]
    rendered = try_render_texts(tokenizer, template, [Prompt(conversations[r], t + 1) for r, t in inner])
    after = dict(zip(inner, rendered, strict=True))
    found: list[dict[int, Span | InputError]] = [{} for _ in conversations]
    for (row, turn), prompt in zip(turns, before, strict=True):
        whole = texts[row]
        upto = after.get((row, turn), whole)
        upto = upto.removesuffix(closing) if isinstance(upto, str) else upto
        if isinstance(prompt, InputError):
            found[row][turn] = prompt
        elif isinstance(upto, InputError):
            found[row][turn] = upto
        elif not whole.startswith(prompt) or not whole.startswith(upto) or len(upto) < len(prompt):
            other = prompt if not whole.startswith(prompt) else upto
            what = (
                f"the chat template renders the messages before and up to answer {turn} differently when more follow "
                f"({_difference(other, whole)}), so where the answer begins and ends is not certain"
            )
            found[row][turn] = Unstable(what, where=conversations[row].origin)
        else:
            found[row][turn] = (len(prompt), len(upto))
    return found


def _chosen(
    conversation: Conversation,
    text: str,
    turns: Mapping[int, Span | InputError],
    loss_on: LossOn,
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
) -> list[Span]:
    """The spans of the wanted answers, or the reason why one of them is not known."""
    chosen = []
    for index in wanted(conversation, loss_on):
        turn = turns[index]
        if isinstance(turn, InputError):
            raise _unstable(conversation, text, index, turn, loss_on, tokenizer, template)
        chosen.append(turn)
    return chosen


def _unstable(
    conversation: Conversation,
    text: str,
    index: int,
    error: InputError,
    loss_on: LossOn,
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
) -> InputError:
    """The reason why an answer's characters are not known, with what can be done about it."""
    if not isinstance(error, Unstable):  # the template's own refusal
        return error
    bare, prompt = (try_render_texts(tokenizer, template, [Prompt(conversation, index, g)])[0] for g in (False, True))
    if isinstance(bare, str) and isinstance(prompt, str) and prompt.startswith(bare) and text.startswith(bare):
        header = prompt[len(bare) :]
        if not text.startswith(prompt):
            what = f"the generation prompt is {header!r}, and the rendered answer {index} begins otherwise"
            what += f" ({_difference(prompt, text)}), so what is trained would not be what the model is asked for"
            mend = "give a `chat_template` that writes answers as the model does"
            return InputError(what, where=conversation.origin, mend=mend)
    last = loss_on is LossOn.ASSISTANT and len(wanted(conversation, loss_on)) > 1
    mend = MEND_PARTS + (", or train on the last turn only (`loss_on: last`)" if last else "")
    return InputError(error.what, where=conversation.origin, mend=mend)


def _difference(one: str, other: str) -> str:
    """The first place at which two texts part, as a short quotation of both."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"{one[max(0, at - 10) : at + 20]!r} against {other[max(0, at - 10) : at + 20]!r}"


def _marker_spans(
    conversation: Conversation,
    text: str,
    known: Mapping[int, Span],
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    loss_on: LossOn,
    ends: Ends,
    closing: str,
) -> tuple[list[Span], dict[int, Span] | None]:
    """The wanted spans inside {% generation %} blocks, which must equal what prefix renders say, where those are
    `known`. Where they are not: also all answers' spans, as far as the blocks tell."""
    marked_text, marked = render_marked(tokenizer, template, conversation)
    if marked_text != text:
        what = f"the template renders differently with its markers tracked ({_difference(marked_text, text)})"
        raise InputError(what, where=conversation.origin, mend=MEND_PARTS)
    limit = len(text.removesuffix(closing))
    marked = [(start, min(end, limit)) for start, end in marked if start < limit]
    marked = _without_header(conversation, text, marked, known, tokenizer, template, ends)
    indices = wanted(conversation, loss_on)
    checkable = all(i in known for i in indices)
    prefix = [known[i] for i in indices] if checkable else None
    spans = _select(conversation, marked, loss_on, "generation blocks", prefix)
    if prefix is None:
        answers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
        told = dict(zip(answers, marked, strict=True)) if len(answers) == len(marked) else {}
        return spans, {i: ends.without_space_after(text, span) for i, span in told.items()}
    if _clean(text, spans, ends) != _clean(text, prefix, ends):
        ours, theirs = (_quote(text, _clean(text, s, ends)) for s in (spans, prefix))
        what = f"the template's generation markers cover {ours}, and an answer at inference would be {theirs}"
        raise InputError(what, where=conversation.origin, mend="mend the template's markers, or " + MEND_PARTS)
    return spans, None


def _without_header(
    conversation: Conversation,
    text: str,
    spans: Sequence[Span],
    known: Mapping[int, Span],
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    ends: Ends,
) -> list[Span]:
    """Some templates mark the generation prompt too (SmolLM3's) or its end (a newline, <think>). The model is given
    that and never generates it. Where an answer's beginning is not `known`: without the generation prompt that the
    block begins with, whole or up to one of its control tokens."""
    whole, *bare = try_render_texts(
        tokenizer,
        template,
        [Prompt(conversation, len(conversation.messages), True), *(Prompt(conversation, i) for i in known)],
    )
    header = whole.removeprefix(text) if isinstance(whole, str) and whole.startswith(text) else ""
    prompts = [(len(b), p) for b, (p, _) in zip(bare, known.values(), strict=True) if isinstance(b, str)]
    header = header or next((text[b:p] for b, p in prompts if b < p), "")
    tokens = [header[: match.end()] for match in ends.pattern.finditer(header)]
    trimmed = []
    for start, end in spans:
        given = next((p for b, p in prompts if b <= start < p <= end), None)
        if given is None:
            written = (part for part in (header, *reversed(tokens)) if part and text.startswith(part, start, end))
            given = start + len(next(written, ""))
        trimmed.append((given, end))
    return trimmed


def _select(
    conversation: Conversation, spans: list[Span], loss_on: LossOn, name: str, prefix: Sequence[Span] | None
) -> list[Span]:
    """The spans of the wanted answers, when there is one span for each assistant message or all are wanted."""
    answers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    indices = wanted(conversation, loss_on)
    if len(spans) == len(answers):
        return [span for index, span in zip(answers, spans, strict=True) if index in indices]
    if indices == answers:  # a block may be split: reasoning, then content
        return spans
    if prefix is not None:
        return [(s, e) for s, e in spans if any(s >= a and e <= b for a, b in prefix)]
    what = f"the rendered row has {len(spans)} {name} for {len(answers)} assistant messages"
    raise InputError(what, where=conversation.origin, mend=MEND_PARTS)


def _quote(text: str, spans: Sequence[Span]) -> str:
    """The beginning and the end of what the spans cover, short enough for one line."""
    pieces = [text[start:end] for start, end in spans]
    return ", ".join(repr(p if len(p) <= 50 else f"{p[:20]} ... {p[-20:]}") for p in pieces[:2]) or "nothing"
