"""Whose text is whose: the characters of a rendered conversation that are its messages' own, and not the template's.

A template is asked once with placeholders in the place of the messages, and what it writes between them is known. Each
row's text is then walked along it. Where that does not fit (a template that rewrites a message) the messages are
searched for in order. An answer whose span is known is the assistant's with all that it generates,
its end-of-turn token included.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from enum import IntEnum
from typing import TYPE_CHECKING

from welltuned.data.conversation import DOCUMENT, Conversation, Message
from welltuned.data.templates import Prompt, try_render_texts
from welltuned.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # characters [start, end)
Said = tuple[int, int, int]  # start, end, a Speaker's value
Literals = list[tuple[str, int]]  # what a template writes, and the index of the message that follows; -1 at the end
PLACEHOLDER = "\ufdd4{}\ufdd5"  # noncharacters of Unicode, which no text should hold and no template looks for
_SLOT = re.compile("\ufdd4(\\d+)\ufdd5")


class Speaker(IntEnum):
    """Whose token it is; three bits hold it."""

    TEMPLATE = 0
    SYSTEM = 1
    USER = 2
    ASSISTANT = 3
    TOOL = 4
    DOCUMENT = 5


SPEAKERS = {
    "system": Speaker.SYSTEM,
    "developer": Speaker.SYSTEM,
    "user": Speaker.USER,
    "assistant": Speaker.ASSISTANT,
    "tool": Speaker.TOOL,
    "function": Speaker.TOOL,
    "ipython": Speaker.TOOL,
    DOCUMENT: Speaker.DOCUMENT,
}


class Speakers:
    """Finds who says what, for one template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str):
        self.tokenizer = tokenizer
        self.template = template
        self.known: dict[tuple[tuple[str, bool], ...], Literals | None] = {}  # by the messages' roles

    def spans(self, conversation: Conversation, text: str, answers: Mapping[int, Span]) -> dict[int, Span]:
        """The characters of each message, by its index, as far as they are found; `answers` are those known already."""
        spans = self._walk(conversation, text)
        if spans is None:
            spans = _search(conversation.messages, text, answers)
        return {**spans, **answers}

    def _walk(self, conversation: Conversation, text: str) -> dict[int, Span] | None:
        """Each message's characters, when the text is what the template writes for such roles, filled in."""
        literals = self._literals(conversation)
        if literals is None:
            return None
        spans: dict[int, Span] = {}
        at = 0
        for number, (literal, index) in enumerate(literals):
            if not text.startswith(literal, at):
                return None
            at += len(literal)
            if index < 0:
                return spans if at == len(text) else None
            content, following = conversation.messages[index].content, literals[number + 1][0]
            for written in (content, content.strip(), content.lstrip(), content.rstrip()):
                end = at + len(written)
                if text.startswith(written, at) and text.startswith(following, end):
                    spans[index] = (at, end)
                    at = end
                    break
            else:
                return None
        return None

    def _literals(self, conversation: Conversation) -> Literals | None:
        """What the template writes around such messages; None if it does not write each of them once.

        Known from then on for messages that are no more than their text; tool calls and the like are asked each time.
        """
        if conversation.tools is not None or any(m.extra for m in conversation.messages):
            return self._ask(conversation)
        shape = tuple((m.role, bool(m.content)) for m in conversation.messages)
        if shape not in self.known:
            if len(self.known) >= 1000:
                self.known.clear()
            self.known[shape] = self._ask(conversation)
        return self.known[shape]

    def _ask(self, conversation: Conversation) -> Literals | None:
        messages = tuple(
            replace(m, content=PLACEHOLDER.format(i)) if m.content else m for i, m in enumerate(conversation.messages)
        )
        probe = replace(conversation, messages=messages)
        [text] = try_render_texts(self.tokenizer, self.template, [Prompt(probe, len(messages))])
        if isinstance(text, InputError):
            return None
        pieces = _SLOT.split(text)
        indices = [int(i) for i in pieces[1::2]]
        if sorted(indices) != [i for i, m in enumerate(messages) if m.content]:
            return None
        return list(zip(pieces[::2], [*indices, -1], strict=True))


def who_says(conversation: Conversation, spans: Mapping[int, Span]) -> tuple[Said, ...]:
    """The messages' characters with their speakers, in order and apart from each other."""
    said: list[Said] = []
    for (start, end), index in sorted((span, index) for index, span in spans.items()):
        speaker = SPEAKERS.get(conversation.messages[index].role, Speaker.TEMPLATE)
        if start < end and (not said or said[-1][1] <= start):
            said.append((start, end, int(speaker)))
    return tuple(said)


def _search(messages: tuple[Message, ...], text: str, answers: Mapping[int, Span]) -> dict[int, Span]:
    """The first occurrence of each message after the one before it, and before the next answer that is known."""
    spans: dict[int, Span] = {}
    at = 0
    for index, message in enumerate(messages):
        if index in answers:
            at = answers[index][1]
            continue
        limit = min((start for i, (start, _) in answers.items() if i > index), default=len(text))
        for written in (message.content, message.content.strip()):
            start = text.find(written, at, limit)
            if start >= 0 and written.strip():
                at = start + len(written)
                spans[index] = (start, at)
                break
    return spans
