"""What each format's columns say, as messages. `formats` chooses the reader and has seen that the columns are there.

`columns` is the mapping of `formats.Detected`: our name → the file's column, for the names that are read.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from welltuned.data.conversation import (
    DOCUMENT,
    Conversation,
    Format,
    Judged,
    Message,
    MixedSchema,
    NotTrained,
    Preference,
    PromptAnswer,
)
from welltuned.data.source import Row
from welltuned.data.turns import check_turns, message, messages, shown, text, tools
from welltuned.errors import InputError

Columns = Mapping[str, str]
ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "reference_answer", "reference")
LABELS = {"true": True, "1": True, "false": False, "0": False}
DIALOGUE_TURN = re.compile(r"\n\n(Human|Assistant):")  # the texts of Anthropic's HH-RLHF, and of those made like it
ONE_KIND = "make both columns texts in every row, or both lists of messages"


def read_messages(row: Row, columns: Columns) -> Conversation:
    return _chat(row, columns, "messages", Format.MESSAGES)


def read_sharegpt(row: Row, columns: Columns) -> Conversation:
    return _chat(row, columns, "conversations", Format.SHAREGPT)


def _chat(row: Row, columns: Columns, name: str, format: Format) -> Conversation:
    turns = messages(row.record[columns[name]], columns[name], row.origin)
    return Conversation(_with_system(row, columns, turns), row.origin, format, _tools(row, columns))


def read_prompt_completion(row: Row, columns: Columns) -> Conversation:
    for column in (columns["prompt"], columns["completion"]):
        if is_messages(row.record[column]):
            what = f"mixed schemas: `{shown(column)}` is a list of messages, and texts are read"
            raise MixedSchema(what, where=row.origin, mend=ONE_KIND)
    return _pair(row, columns, "prompt", "completion", Format.PROMPT_COMPLETION)


def read_prompt_completion_messages(row: Row, columns: Columns) -> Conversation:
    sides = []
    for column in (columns["prompt"], columns["completion"]):
        if isinstance(row.record[column], str):
            what = f"mixed schemas: `{shown(column)}` is a text, and lists of messages are read"
            raise MixedSchema(what, where=row.origin, mend=ONE_KIND)
        sides.append(messages(row.record[column], column, row.origin))
    prompt, completion = _with_system(row, columns, sides[0]), sides[1]
    format = Format.PROMPT_COMPLETION_MESSAGES
    return Conversation(prompt + completion, row.origin, format, _tools(row, columns), trained_from=len(prompt))


def read_question_answer(row: Row, columns: Columns) -> Conversation:
    return _pair(row, columns, "question", "answer", Format.QUESTION_ANSWER)


def read_alpaca(row: Row, columns: Columns) -> Conversation:
    turns = (*_instruction(row, columns, "instruction"), Message("assistant", _answer(row, columns["output"])))
    return Conversation(_with_system(row, columns, turns), row.origin, Format.ALPACA)


def read_text(row: Row, columns: Columns) -> Conversation:
    column = columns["text"]
    content = _text(row, column)
    if not content or content.isspace():
        raise InputError(f"`{shown(column)}` is empty", where=row.origin)
    return Conversation((Message(DOCUMENT, content),), row.origin, Format.TEXT)


def read_chosen(row: Row, columns: Columns) -> Conversation:
    return read_preference(row, columns).chosen


def read_desirable(row: Row, columns: Columns) -> Conversation:
    judged = read_judged(row, columns)
    if not judged.desirable:
        raise NotTrained("the answer is labelled undesirable", where=row.origin)
    return judged.conversation


def read_prompt_answer(row: Row, columns: Columns) -> Conversation:
    """SFT's view: the reference answer is what is trained."""
    if "answer" not in columns:
        what = f"the row has no answer: only `{shown(columns['prompt'])}` is read"
        raise InputError(what, where=row.origin, mend="name the answer's column with `--map completion=COLUMN`")
    prompt = _prompt(row, columns)
    answer = reference(row, columns["answer"])
    if not answer or answer.isspace():
        raise InputError(f"the row has no answer (`{shown(columns['answer'])}` is empty)", where=row.origin)
    turns = (*prompt, Message("assistant", answer))
    return Conversation(turns, row.origin, Format.PROMPT_ANSWER, _tools(row, columns), trained_from=len(prompt))


READERS: dict[Format, Callable[[Row, Columns], Conversation]] = {
    Format.MESSAGES: read_messages,
    Format.SHAREGPT: read_sharegpt,
    Format.PROMPT_COMPLETION: read_prompt_completion,
    Format.PROMPT_COMPLETION_MESSAGES: read_prompt_completion_messages,
    Format.QUESTION_ANSWER: read_question_answer,
    Format.ALPACA: read_alpaca,
    Format.TEXT: read_text,
    Format.PREFERENCE: read_chosen,
    Format.KTO: read_desirable,
    Format.PROMPT_ANSWER: read_prompt_answer,
}


def read_preference(row: Row, columns: Columns) -> Preference:
    """Two continuations of one prompt, which is a column's, or what both have in common at their start."""
    chosen, rejected = _candidate(row, columns["chosen"]), _candidate(row, columns["rejected"])
    if chosen == rejected:
        raise InputError("`chosen` and `rejected` are the same, so neither is to be preferred", where=row.origin)
    whole = [turns[0].role != "assistant" for turns in (chosen, rejected)]
    if whole[0] != whole[1]:
        name = columns["chosen" if whole[0] else "rejected"]
        what = f"`{shown(name)}` begins with a prompt, and the other of the pair with its answer"
        raise InputError(what, where=row.origin, mend="give both with their prompt, or neither")
    if whole[0]:
        shared = _shared(row, columns, chosen, rejected)
        chosen, rejected, prompt = chosen[shared:], rejected[shared:], _with_system(row, columns, chosen[:shared])
    elif "prompt" in columns:
        prompt = _prompt(row, columns)
    else:
        what = f"the pair has no prompt: `{shown(columns['chosen'])}` begins with the answer"
        raise InputError(what, where=row.origin, mend="name the prompt's column with `--map prompt=COLUMN`")
    found = _tools(row, columns)
    both = [Conversation(prompt + t, row.origin, Format.PREFERENCE, found, len(prompt)) for t in (chosen, rejected)]
    for conversation in both:
        check_turns(conversation)
    return Preference(*both)


def _candidate(row: Row, column: str) -> tuple[Message, ...]:
    """`chosen` or `rejected`: one message, messages, the text of an answer, or that of a whole dialogue."""
    value = row.record[column]
    if isinstance(value, dict):
        return (message(value, column, row.origin),)
    if not isinstance(value, str):
        return messages(value, column, row.origin)
    return _dialogue(value, column, row.origin) or (Message("assistant", _answer(row, column)),)


def _dialogue(value: str, column: str, origin: str, open_ended: bool = False) -> tuple[Message, ...] | None:
    """The turns of "Human: ...\\n\\nAssistant: ..."; None where the text is not written so.

    An `open_ended` one is a prompt, which may end with "Assistant:" and no answer.
    """
    if not value.lstrip().startswith("Human:") or "\n\nAssistant:" not in value:
        return None
    pieces = DIALOGUE_TURN.split("\n\n" + text(value, f"`{shown(column)}`", origin).lstrip())[1:]
    said = [(who, content.strip()) for who, content in zip(pieces[::2], pieces[1::2], strict=True)]
    if open_ended and said[-1] == ("Assistant", ""):
        said.pop()
    if ("Assistant", "") in said:
        raise InputError(f"the row has an empty answer (`{shown(column)}`)", where=origin)
    return tuple(Message("user" if who == "Human" else "assistant", content) for who, content in said)


def _shared(row: Row, columns: Columns, chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> int:
    """How many messages both begin with; InputError unless those are a prompt that two different answers follow."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise InputError("`chosen` and `rejected` do not begin with the same prompt", where=row.origin)
    if shared in (len(chosen), len(rejected)):
        short = columns["chosen" if shared == len(chosen) else "rejected"]
        what = f"`{shown(short)}` ends where the other goes on, so it has no answer of its own"
        raise InputError(what, where=row.origin)
    asking = next((turns[shared].role for turns in (chosen, rejected) if turns[shared].role != "assistant"), None)
    if asking is not None:
        what = f"`chosen` and `rejected` first differ in a {asking} message, so their prompts differ"
        raise InputError(what, where=row.origin, mend="the two must answer the same prompt")
    if "prompt" in columns and not _is_in(row, columns, chosen[:shared]):
        what = f"`{shown(columns['prompt'])}` is not in what `chosen` and `rejected` begin with"
        mend = "take the prompt out of the pair, or set `--map prompt=`, and its column is not read"
        raise InputError(what, where=row.origin, mend=mend)
    return shared


def _is_in(row: Row, columns: Columns, shared: tuple[Message, ...]) -> bool:
    """Whether the prompt's column only repeats what chosen and rejected begin with."""
    without_system = {name: column for name, column in columns.items() if name != "system"}
    said = [(turn.role, turn.content.strip()) for turn in _prompt(row, without_system)]
    begun = [(turn.role, turn.content.strip()) for turn in shared]
    # One text may be any turn. Messages may go on with the chosen answer, as in UltraFeedback.
    return (len(said) == 1 and said[0] in begun) or begun[-len(said) :] == said or said[: len(begun)] == begun


def read_judged(row: Row, columns: Columns) -> Judged:
    """A conversation and its label. What is judged is the answer to the last question."""
    desirable = label(row.record[columns["label"]])
    if desirable is None:
        what = f"the label `{shown(columns['label'])}` is neither true nor false"
        raise InputError(what, where=row.origin, mend="write true or false (or 1 or 0)")
    if "messages" in columns:
        turns = _with_system(row, columns, messages(row.record[columns["messages"]], columns["messages"], row.origin))
        asked = _asked(turns)
    else:
        prompt = _prompt(row, columns)
        turns, asked = prompt + _completion(row, columns["completion"]), len(prompt)
    conversation = Conversation(turns, row.origin, Format.KTO, _tools(row, columns), trained_from=asked)
    check_turns(conversation)
    return Judged(conversation, desirable)


def label(value: Any) -> bool | None:
    """True or false as JSON and CSV spell them; None for anything else."""
    if isinstance(value, str):
        return LABELS.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def read_prompt(row: Row, conversation: Conversation, columns: Columns) -> PromptAnswer:
    """The turns up to the last question, and the answer to it: the last one given, or a column of its own."""
    asked = _asked(conversation.messages)
    prompt, rest = conversation.messages[:asked], conversation.messages[asked:]
    if not prompt:
        raise InputError("the row has no prompt", where=row.origin)
    answer = next((turn.content for turn in reversed(rest) if turn.role == "assistant"), None)
    if answer is None:
        names = (columns["answer"],) if "answer" in columns else ANSWER_COLUMNS
        column = next((name for name in names if row.record.get(name) is not None), None)
        answer = None if column is None else reference(row, column)
    return PromptAnswer(prompt, answer, row.record, row.origin, conversation.tools)


def _asked(turns: tuple[Message, ...]) -> int:
    """How many messages there are up to the last one that the assistant, with its tools, has to answer."""
    asking = (i for i in range(len(turns), 0, -1) if turns[i - 1].role in ("user", "system", "developer"))
    return next(asking, 0)


def read_prompt_only(row: Row, columns: Columns) -> PromptAnswer:
    answer = reference(row, columns["answer"]) if "answer" in columns else None
    return PromptAnswer(_prompt(row, columns), answer, row.record, row.origin, _tools(row, columns))


def reference(row: Row, column: str) -> str:
    """A reference answer: a text, or a number as it is written."""
    value = row.record[column]
    if isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300:
        return str(value)
    return _text(row, column)


def is_messages(value: Any) -> bool:
    """Whether a list is one of messages, rather than of a text's parts."""
    return isinstance(value, list) and any(isinstance(v, dict) and ("role" in v or "from" in v) for v in value)


def _pair(row: Row, columns: Columns, question: str, answer: str, format: Format) -> Conversation:
    turns = (Message("user", _text(row, columns[question])), Message("assistant", _answer(row, columns[answer])))
    return Conversation(_with_system(row, columns, turns), row.origin, format, _tools(row, columns))


def _answer(row: Row, column: str) -> str:
    answer = _text(row, column)
    if not answer or answer.isspace():
        raise InputError(f"the row has no answer (`{shown(column)}` is empty)", where=row.origin)
    return answer


def _text(row: Row, column: str) -> str:
    value = row.record[column]
    if isinstance(value, str) and value.isascii():  # most texts: no place to be put into words
        return value
    return text(value, f"`{shown(column)}`", row.origin)


def _completion(row: Row, column: str) -> tuple[Message, ...]:
    """An answer: a text, one message, or messages."""
    value = row.record[column]
    if isinstance(value, dict):
        return (message(value, column, row.origin),)
    if is_messages(value):
        return messages(value, column, row.origin)
    return (Message("assistant", _answer(row, column)),)


def _prompt(row: Row, columns: Columns) -> tuple[Message, ...]:
    """A prompt: a text, a dialogue's text, messages, or an instruction with its input; the system's text before it."""
    column = columns["prompt"]
    value = row.record[column]
    if is_messages(value) or value == []:
        turns = messages(value, column, row.origin)
    else:
        dialogue = _dialogue(value, column, row.origin, open_ended=True) if isinstance(value, str) else None
        turns = dialogue or _instruction(row, columns, "prompt")
    return _with_system(row, columns, turns)


def _instruction(row: Row, columns: Columns, name: str) -> tuple[Message, ...]:
    """The turns of `history`, then the instruction, with the input after a blank line if there is any."""
    asked = _text(row, columns[name])
    if "input" in columns and row.record.get(columns["input"]):
        asked += "\n\n" + _text(row, columns["input"])
    if "history" not in columns or not (history := row.record.get(columns["history"])):
        return (Message("user", asked),)
    return (*_history(history, shown(columns["history"]), row.origin), Message("user", asked))


def _history(value: Any, column: str, origin: str) -> list[Message]:
    """Questions and answers before the instruction, each answer trained like any other."""
    if not isinstance(value, list) or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in value):
        mend = 'write [["question", "answer"], ...]'
        raise InputError(f"`{column}` is not a list of pairs", where=origin, mend=mend)
    turns: list[Message] = []
    for index, (asked, answered) in enumerate(value):
        question = text(asked, f"the question of `{column}[{index}]`", origin)
        answer = text(answered, f"the answer of `{column}[{index}]`", origin)
        if not answer.strip():
            raise InputError(f"the row has an empty answer (`{column}[{index}]`)", where=origin)
        turns += [Message("user", question), Message("assistant", answer)]
    return turns


def _with_system(row: Row, columns: Columns, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The system column's text as the first message, unless the turns begin with the same one already."""
    column = columns.get("system")
    if column is None or not row.record.get(column):
        return turns
    system = _text(row, column)
    if turns[0].role != "system":
        return (Message("system", system), *turns)
    if turns[0].content != system:
        what = f"the row has two system messages, and the one in `{shown(column)}` is another"
        mend = "keep one of them, or set `--map system=`, and the column is not read"
        raise InputError(what, where=row.origin, mend=mend)
    return turns


def _tools(row: Row, columns: Columns) -> tuple[Mapping[str, Any], ...] | None:
    column = columns.get("tools")
    return None if column is None else tools(row.record.get(column), column, row.origin)
