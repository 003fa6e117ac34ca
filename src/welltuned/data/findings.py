"""What rendering sees in a row that a person should hear of. Each is a kind of defect; the recipe says what then."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from welltuned.data.conversation import Conversation, Kind, Message
from welltuned.data.speakers import Span

REASONING = ("reasoning_content", "thinking", "reasoning")  # the names of a message's field, as transformers knows them
_THOUGHT = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)
_UNOPENED = re.compile(r"\A((?:(?!<think>).)*?)</think>", re.DOTALL)  # where the prompt has opened the block
# U+FFFD, NUL, C1 controls; UTF-8 read as Latin-1 or Windows-1252: é as Ã©, ’ as â€™, ° as Â°, emoji as ðŸ..., a BOM.
# Letters that do stand before such a sign (Portuguese Ã before a space or a quotation mark) are no sign of it.
_BROKEN = re.compile(
    "[\ufffd\x00\x80-\x9f]|Ã[\xa1-\xaa\xac-\xba\xbc-\xbf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u2030]"
    "|â€|Â[\xa1-\xaa\xac-\xba\xbc-\xbf]|ðŸ|ï»¿|ï¿½"
)


def in_messages(conversation: Conversation) -> Iterator[Kind]:
    """Defects of the row's own texts, whatever the template makes of them."""
    before: Message | None = None
    for message in conversation.messages:
        if message.role in ("user", "system", "developer") and not message.content.strip():
            yield Kind.EMPTY_TURN
        if before is not None and _turn(before) == _turn(message):
            yield Kind.REPEATED_TURN
        before = message
        if broken(message.content) or (message.extra and any(map(broken, _thoughts(message)))):
            yield Kind.BAD_ENCODING


def _turn(message: Message) -> tuple[str, str, Mapping[str, Any]]:
    return message.role, message.content, message.extra


def broken(text: str) -> bool:
    """Whether a text looks as if it was decoded with the wrong encoding, or is no text."""
    if text.isascii():
        return "\x00" in text
    return _BROKEN.search(text) is not None


def loses_thinking(conversation: Conversation, text: str, answers: Mapping[int, Span], wanted: Sequence[int]) -> bool:
    """Whether some thinking of a trained answer, or what it says beside its tool calls, is not in the rendered text.

    That the thinking of turns that are not trained is left out is no loss: inference leaves it out there too.
    """
    for index in wanted:
        message = conversation.messages[index]
        if not message.extra and "think>" not in message.content:
            continue
        said = list(_thoughts(message))
        if message.extra.get("tool_calls"):
            said.append(without_thoughts(message.content))
        start, end = answers.get(index, (0, len(text)))
        if any(text.find(piece.strip(), start, end) < 0 for piece in said):
            return True
    return False


def loses_tools(conversation: Conversation, text: str, template: str) -> bool:
    """Whether the template never asks for tools, or the text leaves out the name of one that the row defines.

    A name alone would not do: a call of the tool has it too.
    """
    if "tools" not in template:
        return bool(conversation.tools)
    for tool in conversation.tools or ():
        function = tool.get("function")
        name = function.get("name") if isinstance(function, dict) else tool.get("name")
        if isinstance(name, str) and name not in text:
            return True
    return False


def loses_message(conversation: Conversation, text: str) -> bool:
    """Whether a system or user message is not in the rendered text (Mistral's templates drop the system message where
    the last turn is an answer)."""
    return any(
        m.role in ("system", "developer", "user") and m.content.strip() not in text for m in conversation.messages
    )


def without_thoughts(content: str) -> str:
    return _THOUGHT.sub("", _UNOPENED.sub("", content)) if "think>" in content else content


def _thoughts(message: Message) -> Iterator[str]:
    for name in REASONING:
        value = message.extra.get(name)
        if isinstance(value, str):
            yield value
    if "think>" in message.content:
        unopened = _UNOPENED.match(message.content)
        if unopened:
            yield unopened[1]
        yield from _THOUGHT.findall(message.content)


def in_tokens(ids: NDArray[np.int32], mask: NDArray[np.bool_], ends: frozenset[int], whole: bool) -> Iterator[Kind]:
    """Whether nothing is trained, or an answer ends without a token of `ends`: no trained run's last two tokens are
    one (a newline may follow it). Where the `whole` text is trained, it is its last four tokens."""
    stops = np.flatnonzero(mask & ~np.append(mask[1:], False)).tolist()
    if not stops:
        yield Kind.UNTRAINED
    for stop in stops[-1:] if whole else stops:
        if ends.isdisjoint(ids[max(stop - (3 if whole else 1), 0) : stop + 1].tolist()):
            yield Kind.END_UNTRAINED
            return
