"""Which characters of a rendered conversation are trained: what the model must generate, its end-of-turn included.

Three ways: {% generation %} markers in the template; renders of the conversation up to each answer, which must be
exact prefixes of the whole; or the marker strings that the user gives. The first two must agree where both work.
An answer begins where the generation prompt ends, and ends with its end-of-turn token: the whitespace that a template
writes after that token is the next turn's, is never generated, and is not trained. A template that closes a turn with
ordinary text only has that text trained whole, whitespace included, because nothing else would tell the model to stop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from welltuned.data.conversation import Conversation, Message
from welltuned.data.templates import Prompt, control_tokens, has_generation_markers, render_marked, render_texts
from welltuned.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # characters [start, end)
MEND_PARTS = "give `instruction_part` and `response_part` (the texts that open a user's and the model's turn)"


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
class Parts:
    """The strings that open a user's turn and the model's turn in the rendered text."""

    instruction: str
    response: str


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation's text, and the spans of it that are trained, in order and apart from each other."""

    text: str
    spans: tuple[Span, ...]
    origin: str


def rendered_spans(
    conversations: Sequence[Conversation],
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    loss_on: LossOn,
    parts: Parts | None,
) -> tuple[list[Rendered], MaskFrom]:
    """Text and trained spans of each conversation; InputError when they cannot be known for certain."""
    texts = render_texts(tokenizer, template, [Prompt(c, len(c.messages)) for c in conversations])
    ends = tuple(control_tokens(tokenizer))
    if loss_on is LossOn.EVERYTHING:
        found, how = [[(0, len(text))] for text in texts], MaskFrom.EVERYTHING
        return [Rendered(t, tuple(s), c.origin) for t, s, c in zip(texts, found, conversations, strict=True)], how
    if parts is not None:
        found = [
            _part_spans(c, text, parts, loss_on, tokenizer, template)
            for c, text in zip(conversations, texts, strict=True)
        ]
        how = MaskFrom.PARTS
    elif has_generation_markers(template):
        found, how = _marker_spans(conversations, texts, tokenizer, template, loss_on, ends)
    else:
        found, how = [], MaskFrom.PREFIXES
        prefixes = _prefix_spans(conversations, texts, tokenizer, template, loss_on)
        for conversation, spans in zip(conversations, prefixes, strict=True):
            if isinstance(spans, str):
                mend = MEND_PARTS + (", or train on the last turn only" if loss_on is LossOn.ASSISTANT else "")
                raise InputError(spans, where=conversation.origin, mend=mend)
            found.append(spans)
    cleaned = [_clean(text, spans, ends) for text, spans in zip(texts, found, strict=True)]
    return [Rendered(t, s, c.origin) for t, s, c in zip(texts, cleaned, conversations, strict=True)], how


def _wanted(conversation: Conversation, loss_on: LossOn) -> list[int]:
    """Indices of the assistant messages that are trained."""
    answers = [
        i for i, m in enumerate(conversation.messages) if m.role == "assistant" and i >= conversation.trained_from
    ]
    return answers[-1:] if loss_on is LossOn.LAST else answers


def _clean(text: str, spans: Sequence[Span], ends: tuple[str, ...]) -> tuple[Span, ...]:
    """Spans without the whitespace after an end-of-turn token, without empty ones, touching ones joined."""
    cleaned: list[Span] = []
    for start, end in spans:
        stripped = text[start:end].rstrip()
        if stripped.endswith(ends):
            end = start + len(stripped)
        if cleaned and cleaned[-1][1] == start:
            cleaned[-1] = (cleaned[-1][0], end)
        elif end > start:
            cleaned.append((start, end))
    return tuple(cleaned)


def _prefix_spans(
    conversations: Sequence[Conversation],
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    loss_on: LossOn,
) -> list[list[Span] | str]:
    """Spans from renders up to each answer; a sentence in their place where a render is no prefix of the whole."""
    wanted = [(row, turn) for row, c in enumerate(conversations) for turn in _wanted(c, loss_on)]
    before = render_texts(tokenizer, template, [Prompt(conversations[r], t, generation_prompt=True) for r, t in wanted])
    inner = [(row, turn) for row, turn in wanted if turn + 1 < len(conversations[row].messages)]
    after = dict(
        zip(inner, render_texts(tokenizer, template, [Prompt(conversations[r], t + 1) for r, t in inner]), strict=True)
    )
    found: list[list[Span] | str] = [[] for _ in conversations]
    for (row, turn), prompt in zip(wanted, before, strict=True):
        whole, spans = texts[row], found[row]
        turn_text = after.get((row, turn), whole)
        if isinstance(spans, str):
            continue
        if not whole.startswith(prompt) or not whole.startswith(turn_text) or len(turn_text) < len(prompt):
            other = prompt if not whole.startswith(prompt) else turn_text
            found[row] = (
                f"the chat template renders the messages before and up to answer {turn} differently when more follow "
                f"({_difference(other, whole)}), so where the answer begins and ends is not certain"
            )
        else:
            spans.append((len(prompt), len(turn_text)))
    return found


def _difference(one: str, other: str) -> str:
    """The first place at which two texts part, as a short quotation of both."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"{one[max(0, at - 10) : at + 20]!r} against {other[max(0, at - 10) : at + 20]!r}"


def _marker_spans(
    conversations: Sequence[Conversation],
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    loss_on: LossOn,
    ends: tuple[str, ...],
) -> tuple[list[list[Span]], MaskFrom]:
    """Spans inside {% generation %} blocks, each equal to what prefix renders say, where those are possible."""
    found: list[list[Span]] = []
    checked = True
    prefixes = _prefix_spans(conversations, texts, tokenizer, template, loss_on)
    for conversation, text, prefix in zip(conversations, texts, prefixes, strict=True):
        marked_text, marked = render_marked(tokenizer, template, conversation)
        if marked_text != text:
            what = f"the template renders differently with its markers tracked ({_difference(marked_text, text)})"
            raise InputError(what, where=conversation.origin, mend=MEND_PARTS)
        marked = _without_header(conversation, text, marked, tokenizer, template)
        spans = _select(conversation, marked, loss_on, "generation blocks", prefix)
        if isinstance(prefix, str):
            checked = False
        elif _clean(text, spans, ends) != _clean(text, prefix, ends):
            ours, theirs = (_quote(text, _clean(text, s, ends)) for s in (spans, prefix))
            what = f"the template's generation markers cover {ours}, and an answer at inference would be {theirs}"
            raise InputError(what, where=conversation.origin, mend="mend the template's markers, or " + MEND_PARTS)
        found.append(spans)
    return found, MaskFrom.MARKERS_CHECKED if checked else MaskFrom.MARKERS


def _without_header(
    conversation: Conversation, text: str, spans: list[Span], tokenizer: "PreTrainedTokenizerBase", template: str
) -> list[Span]:
    """Some templates (SmolLM3's) mark the generation prompt too; the model is given that, and never generates it."""
    prompt = render_texts(tokenizer, template, [Prompt(conversation, len(conversation.messages), True)])[0]
    header = prompt.removeprefix(text) if prompt.startswith(text) else ""
    return [(s + len(header) if header and text.startswith(header, s) else s, e) for s, e in spans]


def _select(
    conversation: Conversation, spans: list[Span], loss_on: LossOn, name: str, prefix: list[Span] | str = ""
) -> list[Span]:
    """The spans of the wanted answers, when there is one span for each assistant message or all are wanted."""
    answers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    wanted = _wanted(conversation, loss_on)
    if len(spans) == len(answers):
        return [span for index, span in zip(answers, spans, strict=True) if index in wanted]
    if wanted == answers and name == "generation blocks":  # a block may be split: reasoning, then content
        return spans
    if not isinstance(prefix, str):
        return [(s, e) for s, e in spans if any(s >= a and e <= b for a, b in prefix)]
    what = f"the rendered row has {len(spans)} {name} for {len(answers)} assistant messages"
    raise InputError(what, where=conversation.origin, mend=MEND_PARTS)


def _quote(text: str, spans: Sequence[Span]) -> str:
    """The beginning and the end of what the spans cover, short enough for one line."""
    pieces = [text[start:end] for start, end in spans]
    return ", ".join(repr(p if len(p) <= 50 else f"{p[:20]} ... {p[-20:]}") for p in pieces[:2]) or "nothing"


def _part_spans(
    conversation: Conversation,
    text: str,
    parts: Parts,
    loss_on: LossOn,
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
) -> list[Span]:
    """What follows each response part, up to the next instruction or response part, one for each assistant message."""
    origin = conversation.origin
    users = any(message.role == "user" for message in conversation.messages)
    for name, part, needed in (("response", parts.response, True), ("instruction", parts.instruction, users)):
        if needed and part not in text:
            what = f"`{name}_part` {part!r} does not occur in the rendered row, which begins {text[:120]!r}"
            raise InputError(what, where=origin, mend="copy it from the rendered row, newlines included")
    spans = _between(text, parts)
    answers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    if len(spans) != len(answers):
        what = f"`response_part` occurs {len(spans)} times for {len(answers)} assistant messages"
        raise InputError(what, where=origin, mend="give a longer part, or drop the row if its own text holds the part")
    if any(m.role not in ("user", "assistant") for m in conversation.messages[answers[0] :]):
        _check_other_roles(conversation, parts, tokenizer, template)
    return _select(conversation, spans, loss_on, "response parts")


def _between(text: str, parts: Parts) -> list[Span]:
    spans: list[Span] = []
    at = text.find(parts.response)
    while at >= 0:
        start = at + len(parts.response)
        following = text.find(parts.response, start)
        stops = [i for i in (text.find(parts.instruction, start), following) if i >= 0]
        spans.append((start, min(stops, default=len(text))))
        at = following
    return spans


def _check_other_roles(
    conversation: Conversation, parts: Parts, tokenizer: "PreTrainedTokenizerBase", template: str
) -> None:
    """Tool and system turns after an answer must not fall into a trained span: seen by rendering placeholder texts."""
    marks = {i: f"placeholder{i}turn" for i, m in enumerate(conversation.messages) if m.role != "assistant"}
    messages = tuple(
        Message(m.role, marks[i], m.extra) if i in marks else m for i, m in enumerate(conversation.messages)
    )
    probe = replace(conversation, messages=messages)
    text = render_texts(tokenizer, template, [Prompt(probe, len(messages))])[0]
    trained = "".join(text[start:end] for start, end in _between(text, parts))
    for index, mark in marks.items():
        if mark in trained:
            what = f"with these parts the {messages[index].role} turn (message {index}) would be trained as an answer"
            raise InputError(what, where=conversation.origin, mend="give an `instruction_part` that opens it too")
