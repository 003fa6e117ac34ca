"""Where the model's turns are, by the strings that the user says open a turn: for templates that defeat all else."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from welltuned.data.conversation import Conversation, Message
from welltuned.data.speakers import Span
from welltuned.data.templates import Prompt, render_texts
from welltuned.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEND_PARTS = "give `instruction_part` and `response_part` (the texts that open a user's and the model's turn)"


@dataclass(frozen=True, slots=True)
class Parts:
    """The strings that open a user's turn and the model's turn in the rendered text."""

    instruction: str
    response: str


def part_turns(
    conversation: Conversation, text: str, parts: Parts, tokenizer: "PreTrainedTokenizerBase", template: str
) -> dict[int, Span]:
    """What follows each response part, up to the next instruction or response part, by assistant message."""
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
    return dict(zip(answers, spans, strict=True))


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
