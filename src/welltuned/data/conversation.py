"""The types between a row and its tokens: messages, conversations, defects. `formats` reads rows into them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from welltuned.errors import InputError


class Policy(StrEnum):
    """What happens to a row with a defect; a dropped row is always counted by its origin, never silent."""

    ERROR = "error"
    DROP = "drop"
    KEEP = "keep"


class Kind(StrEnum):
    """The kinds of defect. Each has a recipe key `on_<kind>` that holds a Policy."""

    BAD_ROW = "bad_row"  # cannot be read as a conversation: no answer, null, wrong type, unknown role (no KEEP)
    UNTRAINED = "untrained"  # no token is trained (no KEEP)
    TOO_LONG = "too_long"  # longer than max_length: KEEP means cut to max_length
    DUPLICATE = "duplicate"  # the same tokens as an earlier training row
    LEAK = "leak"  # a held-out row repeats a training row or its prompt; DROP drops the training rows
    EMPTY_TURN = "empty_turn"  # a blank user or system turn
    REPEATED_TURN = "repeated_turn"  # two equal turns of one role, next to each other
    CONTROL_TOKEN = "control_token"  # a special token spelled in a row's own text
    BAD_ENCODING = "bad_encoding"  # U+FFFD, NUL, C1 controls, or typical mojibake in a text
    LOST_THINKING = "lost_thinking"  # a thinking block that the template leaves out
    LOST_MESSAGE = "lost_message"  # a system or user message that the template leaves out
    LOST_TOOLS = "lost_tools"  # the definitions of its tools, left out by the template
    END_UNTRAINED = "end_untrained"  # an uncut answer ends without a trained end-of-turn token
    EQUAL_PAIR = "equal_pair"  # chosen and rejected are the same tokens, so neither is to be preferred (no KEEP)
    PROMPT_DIFFERS = "prompt_differs"  # the template writes the prompt of a pair's two answers differently


class Teaching(StrEnum):
    """What a method learns from: one answer a row, two of which one is preferred, or one that is judged."""

    ANSWERS = "answers"
    PAIRS = "pairs"
    LABELS = "labels"


class Format(StrEnum):
    """The formats that are understood; `formats.DESCRIPTION` has a sentence for each."""

    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    PROMPT_COMPLETION = "prompt/completion"
    PROMPT_COMPLETION_MESSAGES = "prompt/completion/messages"
    QUESTION_ANSWER = "question/answer"
    ALPACA = "alpaca"
    TEXT = "text"
    PREFERENCE = "preference"
    KTO = "kto"
    PROMPT_ANSWER = "prompt/answer"


class MixedSchema(InputError):
    """A row has the columns of another format than the rows before it. No policy drops it: it may be half the file."""


class NotTrained(InputError):
    """A sound row that supervised fine-tuning leaves out: an answer marked undesirable. Counted, and no defect."""


DOCUMENT = "document"  # the role of a whole text; no file can write it
_NOTHING: dict[str, Any] = {}  # shared by all messages without extra fields: a dict of its own would double a message


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: system, developer, user, assistant, tool, function, ipython, or DOCUMENT for the text of a TEXT row.
        content: its text.
        extra: what else the row says (name, tool_calls, reasoning_content, ...), for the template.
        trained: whether it is trained, from the message's own `train` or `weight`; None: as `loss_on` says.
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    trained: bool | None = None

    def to_template(self) -> dict[str, Any]:
        return {**self.extra, "role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order, at least one of them an answer. Messages before `trained_from` are prompt and never trained.

    `group` is the text of the column that the recipe's `group_by` names, None without one.
    """

    messages: tuple[Message, ...]
    origin: str
    format: Format = Format.MESSAGES
    tools: tuple[Mapping[str, Any], ...] | None = None
    trained_from: int = 0
    group: str | None = None

    def prompt(self) -> tuple[tuple[str, str], ...]:
        """(role, content) of the turns before the first answer: rows that share it belong on one side of a split."""
        answers = (i for i, m in enumerate(self.messages) if m.role == "assistant" and i >= self.trained_from)
        return tuple((m.role, m.content) for m in self.messages[: next(answers, len(self.messages))])


@dataclass(frozen=True, slots=True)
class Preference:
    """Two continuations of one prompt: the same messages up to `trained_from`, which is equal in both."""

    chosen: Conversation
    rejected: Conversation


@dataclass(frozen=True, slots=True)
class Judged:
    """A conversation whose answer, from `trained_from` on, is to be made likelier (desirable) or not."""

    conversation: Conversation
    desirable: bool


@dataclass(frozen=True, slots=True)
class PromptAnswer:
    """A prompt to sample from, the answer that a reward compares with (None without one), and the row's columns."""

    messages: tuple[Message, ...]
    answer: str | None
    record: Mapping[str, Any]
    origin: str = ""
    tools: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True)
class Defect:
    """A row with something wrong in it: where, what, and of which kind."""

    origin: str
    what: str
    kind: Kind = Kind.BAD_ROW
