"""Rows become conversations: the format is detected from the column names, and named, so that the caller can say it.

What is wrong with a single row is a defect with the row's origin: an error by default, or dropped and counted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from welltuned.data.source import Row
from welltuned.errors import InputError


class Policy(StrEnum):
    """What happens to a row with a defect; a dropped row is always returned by origin, never silent."""

    ERROR = "error"
    DROP = "drop"


class Format(StrEnum):
    """The formats that are understood, by the columns that tell them."""

    MESSAGES = "messages"
    SHAREGPT = "conversations"
    PROMPT_COMPLETION = "prompt/completion"
    PROMPT_COMPLETION_MESSAGES = "prompt/completion (messages)"
    QUESTION_ANSWER = "question/answer"
    INSTRUCTION = "instruction/output"


DESCRIPTION = {
    Format.MESSAGES: "chat `messages` with role and content",
    Format.SHAREGPT: "ShareGPT `conversations` with from and value",
    Format.PROMPT_COMPLETION: "`prompt` and `completion` texts; one user and one assistant message where the model has "
    "a chat template, else the two texts as they are",
    Format.PROMPT_COMPLETION_MESSAGES: "`prompt` and `completion` messages; only the completion is trained",
    Format.QUESTION_ANSWER: "`question` and `answer` texts, as one user and one assistant message",
    Format.INSTRUCTION: "`instruction`, `input` (if any, after a blank line) and `output` texts, as one user and one "
    "assistant message",
}
# In order of preference where several fit: the more structure a format has, the earlier.
REQUIRED = {
    Format.MESSAGES: ("messages",),
    Format.SHAREGPT: ("conversations",),
    Format.PROMPT_COMPLETION: ("prompt", "completion"),
    Format.QUESTION_ANSWER: ("question", "answer"),
    Format.INSTRUCTION: ("instruction", "output"),
}
OPTIONAL = {
    Format.MESSAGES: ("tools",),
    Format.SHAREGPT: ("system", "tools"),
    Format.PROMPT_COMPLETION_MESSAGES: ("tools",),
    Format.INSTRUCTION: ("input",),
}
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"}
UNDERSTOOD = "understood are: messages; conversations; prompt + completion; question + answer; instruction + output"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `extra` keeps what else the row says (name, tool_calls, reasoning_content, ...) for the template."""

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_template(self) -> dict[str, Any]:
        return {**self.extra, "role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order, at least one of them an answer. Messages before `trained_from` are prompt and never trained."""

    messages: tuple[Message, ...]
    origin: str
    format: Format = Format.MESSAGES
    tools: tuple[Mapping[str, Any], ...] | None = None
    trained_from: int = 0

    def prompt(self) -> tuple[tuple[str, str], ...]:
        """(role, content) of the turns before the first answer: rows that share it belong on one side of a split."""
        answers = (i for i, m in enumerate(self.messages) if m.role == "assistant" and i >= self.trained_from)
        return tuple((m.role, m.content) for m in self.messages[: next(answers, len(self.messages))])


@dataclass(frozen=True, slots=True)
class Defect:
    """A row that was left out, and why."""

    origin: str
    what: str


@dataclass(frozen=True, slots=True)
class Detected:
    """The format that was chosen, the other formats that the columns would allow, and the columns not read."""

    format: Format
    also: tuple[Format, ...] = ()
    ignored: tuple[str, ...] = ()

    def sentence(self) -> str:
        text = f"format: {DESCRIPTION[self.format]}"
        if self.also:
            text += f"; the columns would also fit {', '.join(self.also)}"
        return text + (f"; columns not read: {', '.join(self.ignored)}" if self.ignored else "")


@dataclass(frozen=True, slots=True)
class Conversations:
    """All conversations of a dataset, the format they were in, and the rows left out."""

    items: list[Conversation]
    detected: Detected
    dropped: tuple[Defect, ...] = ()


def to_conversations(rows: Sequence[Row], on_defect: Policy = Policy.ERROR) -> Conversations:
    """Detect the format once, then convert every row. A row of another schema is an error under either policy."""
    detected = detect_format(rows)
    items: list[Conversation] = []
    dropped: list[Defect] = []
    for row in rows:
        try:
            items.append(to_conversation(row, detected.format))
        except InputError as error:
            if on_defect is Policy.ERROR:
                raise
            dropped.append(Defect(row.origin, error.what))
    if not items:
        raise InputError(f"all {len(rows)} rows have defects ({dropped[0].what})", where=dropped[0].origin)
    return Conversations(items, detected, tuple(dropped))


def detect_format(rows: Sequence[Row]) -> Detected:
    """The format of all rows, from the first; the first row that does not fit it is an error with its origin."""
    if not rows:
        raise InputError("the dataset has no rows")
    first = rows[0]
    fits = [f for f, columns in REQUIRED.items() if all(c in first.record for c in columns)]
    if {"chosen", "rejected"} <= first.record.keys() and Format.MESSAGES not in fits:
        mend = "supervised fine-tuning needs one answer a row; " + UNDERSTOOD
        raise InputError("the rows are preference pairs (chosen, rejected)", where=first.origin, mend=mend)
    if not fits:
        found = ", ".join(first.record) or "none"
        raise InputError(f"no format is known for these columns ({found})", where=first.origin, mend=UNDERSTOOD)
    chosen, required = fits[0], REQUIRED[fits[0]]
    if chosen is Format.PROMPT_COMPLETION:
        chosen = _prompt_completion_kind(rows)
    seen: dict[str, None] = {}
    for row in rows:
        missing = [c for c in required if c not in row.record]
        if missing:
            what = f"mixed schemas: `{missing[0]}` is missing (the row has {', '.join(row.record) or 'no columns'})"
            raise InputError(what, where=row.origin, mend=f"{first.origin} and the rows after it are {chosen.value}")
        seen.update(dict.fromkeys(row.record))
    read = {*required, *OPTIONAL.get(chosen, ())}
    return Detected(chosen, tuple(fits[1:]), tuple(c for c in seen if c not in read))


def _prompt_completion_kind(rows: Sequence[Row]) -> Format:
    """Texts or messages, the same in every row; null counts as neither (it is a row's defect, found later)."""
    kinds: dict[type, str] = {}
    for row in rows:
        for column in ("prompt", "completion"):
            value = row.record.get(column)
            if isinstance(value, str | list):
                kinds.setdefault(type(value), row.origin)
        if len(kinds) > 1:
            what = "mixed schemas: some of `prompt` and `completion` are texts and some are lists of messages"
            raise InputError(what, where=row.origin, mend="use one kind throughout")
    return Format.PROMPT_COMPLETION_MESSAGES if list in kinds else Format.PROMPT_COMPLETION


def to_conversation(row: Row, format: Format | None = None) -> Conversation:
    """One row as a conversation; InputError with the row's origin when there is nothing sound to learn from it."""
    format = format or detect_format([row]).format
    conversation = _READERS[format](row)
    _check_turns(conversation)
    return conversation


def _read_messages(row: Row) -> Conversation:
    return Conversation(_messages(row, "messages"), row.origin, Format.MESSAGES, _tools(row))


def _read_sharegpt(row: Row) -> Conversation:
    messages = _messages(row, "conversations")
    system = row.record.get("system")
    if system:
        messages = (Message("system", _text(system, "`system`", row.origin)), *messages)
    return Conversation(messages, row.origin, Format.SHAREGPT, _tools(row))


def _read_prompt_completion(row: Row) -> Conversation:
    return _pair(row, Format.PROMPT_COMPLETION, row.record.get("prompt"), "prompt", "completion")


def _read_prompt_completion_messages(row: Row) -> Conversation:
    prompt, completion = _messages(row, "prompt"), _messages(row, "completion")
    format = Format.PROMPT_COMPLETION_MESSAGES
    return Conversation(prompt + completion, row.origin, format, _tools(row), trained_from=len(prompt))


def _read_question_answer(row: Row) -> Conversation:
    return _pair(row, Format.QUESTION_ANSWER, row.record.get("question"), "question", "answer")


def _read_instruction(row: Row) -> Conversation:
    instruction = _text(row.record.get("instruction"), "`instruction`", row.origin)
    extra = row.record.get("input")
    if extra:
        instruction += "\n\n" + _text(extra, "`input`", row.origin)
    return _pair(row, Format.INSTRUCTION, instruction, "instruction", "output")


_READERS: dict[Format, Callable[[Row], Conversation]] = {
    Format.MESSAGES: _read_messages,
    Format.SHAREGPT: _read_sharegpt,
    Format.PROMPT_COMPLETION: _read_prompt_completion,
    Format.PROMPT_COMPLETION_MESSAGES: _read_prompt_completion_messages,
    Format.QUESTION_ANSWER: _read_question_answer,
    Format.INSTRUCTION: _read_instruction,
}


def _pair(row: Row, format: Format, prompt: Any, prompt_name: str, answer_name: str) -> Conversation:
    question = _text(prompt, f"`{prompt_name}`", row.origin)
    answer = row.record.get(answer_name)
    if answer is None:
        raise InputError(f"the row has no answer (`{answer_name}` is null or missing)", where=row.origin)
    answer = _text(answer, f"`{answer_name}`", row.origin)
    if not answer.strip():
        raise InputError(f"the row has no answer (`{answer_name}` is empty)", where=row.origin)
    return Conversation((Message("user", question), Message("assistant", answer)), row.origin, format)


def _messages(row: Row, column: str) -> tuple[Message, ...]:
    value = row.record.get(column)
    if not isinstance(value, list) or not value:
        found = "empty" if value == [] else "null" if value is None else "not a list"
        raise InputError(f"`{column}` is {found}", where=row.origin, mend="it must be a list of messages")
    return tuple(_message(item, f"`{column}[{index}]`", row.origin) for index, item in enumerate(value))


def _message(item: Any, place: str, origin: str) -> Message:
    """A message in either spelling: role/content, or from/value. Nulls among its other fields are left out."""
    if not isinstance(item, dict):
        raise InputError(f"{place} is not an object with role and content", where=origin)
    role_key, content_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    name = item.get(role_key)
    role = SHAREGPT_ROLES.get(name, name) if isinstance(name, str) else None
    if role not in ROLES:
        known = ", ".join((*ROLES, *SHAREGPT_ROLES) if role_key == "from" else ROLES)
        raise InputError(f"{place} has the unknown role {name!r}", where=origin, mend=f"known are {known}")
    extra = {k: v for k, v in item.items() if k not in (role_key, content_key) and v is not None}
    content = item.get(content_key)
    if content is None and extra.get("tool_calls"):
        content = ""
    content = _text(content, f"the content of {place}", origin)
    if role == "assistant" and not content.strip() and not extra.get("tool_calls"):
        raise InputError(f"the row has an empty answer ({place})", where=origin)
    return Message(role, content, extra)


def _text(value: Any, place: str, origin: str) -> str:
    """A string as it is, or the text parts of a content list joined; anything else is an error."""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        kinds = {part.get("type") for part in value} - {"text"}
        if kinds:
            raise InputError(f"{place} has {sorted(map(str, kinds))[0]} content, and only text is read", where=origin)
        value = "".join(_text(part.get("text"), place, origin) for part in value)
    if not isinstance(value, str):
        found = "null" if value is None else f"of type {type(value).__name__}"
        raise InputError(f"{place} is {found}", where=origin, mend="it must be text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{place} holds half a surrogate pair, which is not text", where=origin) from error
    return value


def _tools(row: Row) -> tuple[Mapping[str, Any], ...] | None:
    tools = row.record.get("tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError("`tools` is not a list of objects", where=row.origin)
    return tuple(tools)


def _check_turns(conversation: Conversation) -> None:
    roles = [message.role for message in conversation.messages]
    if "assistant" not in roles[conversation.trained_from :]:
        raise InputError("the row has no answer (no assistant message)", where=conversation.origin)
    if roles[0] == "assistant":
        what = "the row begins with an assistant message, so there is nothing that it answers"
        raise InputError(what, where=conversation.origin, mend="put the user's message before it, or drop the row")
