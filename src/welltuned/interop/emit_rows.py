"""The user's rows for another tool: what they are, and the Python that brings them into the form it trains on."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import Any

from welltuned.data.conversation import Conversation, Format
from welltuned.data.dataset import reading_of
from welltuned.data.files import FileKind
from welltuned.data.formats import Detected, detect, to_conversation
from welltuned.data.hub import HubSource
from welltuned.data.source import STDIN, FileSource, Row, open_source
from welltuned.data.templates import CHATML, CHATML_NAME
from welltuned.data.turns import SHAREGPT_ROLES
from welltuned.errors import InputError, WelltunedError
from welltuned.recipe import Method, Recipe

SAMPLE = 1_000  # rows that are looked at, as many as the format is detected from
LOADERS = {
    FileKind.JSONL: ("json", {}),
    FileKind.JSON: ("json", {}),
    FileKind.CSV: ("csv", {}),
    FileKind.TSV: ("csv", {"sep": "\t"}),
    FileKind.PARQUET: ("parquet", {}),
    FileKind.ARROW: ("arrow", {}),
}


class Shape(StrEnum):
    """The columns that rows are given: those that TRL's trainers take."""

    TEXT = "text"
    PLAIN = "prompt and completion, texts"
    PAIR = "prompt and completion, messages"
    CHAT = "messages"
    PREFERENCE = "prompt, chosen and rejected"
    JUDGED = "prompt, completion and label"
    PROMPT = "prompt and answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One dataset, as far as its first rows show it.

    Attributes:
        spec: what the user wrote.
        files: the files, empty for a hub dataset.
        loading: the arguments of `datasets.load_dataset` that read it.
        nested: some value that is read is a message or a list of them, not a text.
        several: some conversation has more than one answer, or does not end with one.
        whole: `chosen` and `rejected` begin with their prompt.
        spelling: how messages name their speakers: `role` (system, user, assistant), `from` (system, human, gpt), or
            neither throughout.
        written: the names whose columns hold JSON in a text.
        extras: fields of messages beside role and content.
    """

    spec: str
    files: tuple[str, ...]
    loading: Mapping[str, Any]
    detected: Detected
    nested: bool
    several: bool
    whole: bool
    spelling: str
    written: frozenset[str]
    extras: frozenset[str]

    def column(self, name: str) -> str | None:
        """The file's column for one of our names, None where it is not read."""
        return self.detected.mapping.get(name)


def look_at(recipe: Recipe, specs: Sequence[str], *, hub_options: bool = True) -> tuple[Look, ...]:
    """Open and recognise datasets of the recipe; `hub_options` says whether its subset and split belong to them."""
    return tuple(_look(recipe, spec, hub_options) for spec in specs)


def _look(recipe: Recipe, spec: str, hub_options: bool) -> Look:
    if spec == STDIN:
        mend = "write the rows to a file, and name that"
        raise InputError("another tool cannot read this command's stdin", where="data", mend=mend)
    source = open_source(spec, *((recipe.subset, recipe.split) if hub_options else ()))
    rows = list(islice(source.rows(), SAMPLE))
    reading = reading_of(recipe)
    detected = detect(rows, format=reading.format, mapping=reading.mapping)
    if any(_is_dialogue(rows[0].record.get(column)) for column in detected.mapping.values()):
        mend = "write its turns as messages first"
        raise InputError("dialogues in one text (Human: ... Assistant: ...) are not emitted", where=spec, mend=mend)
    talks = [talk for row in rows if (talk := _conversation(row, detected)) is not None]
    first = rows[0].record
    turns = [message for talk in talks for message in talk.messages]
    chosen = first.get(detected.mapping.get("chosen", ""))
    written = frozenset(name for name, column in detected.mapping.items() if _is_json(first.get(column), name))
    loading: dict[str, Any] = {}
    files: tuple[str, ...] = ()
    if isinstance(source, FileSource):
        files = tuple(str(file.path) for file in source.files)
        loader, options = LOADERS[source.files[0].kind]
        loading = {"path": loader, "data_files": list(files), **options, "split": "train"}
    elif isinstance(source, HubSource):
        subset = {"name": recipe.subset} if recipe.subset and hub_options else {}
        loading = {"path": spec, **subset, "split": source.split}
    return Look(
        spec=spec,
        files=files,
        loading=loading,
        detected=detected,
        nested=any(isinstance(row.record.get(c), list | dict) for row in rows for c in detected.mapping.values())
        or bool(written),
        several=any(_several(talk) for talk in talks),
        whole=isinstance(chosen, list) and bool(chosen) and chosen[0].get("role", chosen[0].get("from")) not in _ANSWER,
        spelling=_spelling(rows, detected),
        written=written,
        extras=frozenset(key for turn in turns for key in turn.extra)
        | {"train" for turn in turns if turn.trained is not None},
    )


_ANSWER = frozenset({"assistant", *(name for name, role in SHAREGPT_ROLES.items() if role == "assistant")})


def _conversation(row: Row, detected: Detected) -> Conversation | None:
    try:
        return to_conversation(row, detected)
    except WelltunedError:  # a row that the plan has counted already, or that has no answer to train
        return None


_SPELLINGS = {"role": {"system", "user", "assistant"}, "from": {"system", "human", "gpt"}}


def _spelling(rows: Sequence[Row], detected: Detected) -> str:
    columns = [column for name, column in detected.mapping.items() if name in ("messages", "conversations")]
    turns = [turn for row in rows for column in columns for turn in _list(row.record.get(column))]
    fits = (key for key, names in _SPELLINGS.items() if all(turn.get(key) in names for turn in turns))
    return next(fits, "") if turns else ""


def _list(value: Any) -> list[Any]:
    return [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def _several(talk: Conversation) -> bool:
    answers = [message.role == "assistant" for message in talk.messages[talk.trained_from :]]
    return sum(answers) != 1 or not answers[-1]


def _is_json(value: Any, name: str) -> bool:
    """Whether messages or tools are written as JSON in a text, as a CSV file must."""
    if name not in {"messages", "conversations", "tools"} or not isinstance(value, str):
        return False
    try:
        return isinstance(json.loads(value), list)
    except ValueError:
        return False


def shape_of(recipe: Recipe, looks: Sequence[Look], chat: bool) -> Shape:
    """What the rows become; `chat` says whether the model has a chat template to write messages with."""
    if recipe.method in (Method.DPO, Method.ORPO, Method.REWARD):
        return Shape.PREFERENCE
    if recipe.method is not Method.SFT:
        return Shape.JUDGED if recipe.method is Method.KTO else Shape.PROMPT
    texts = {look.detected.format is Format.TEXT for look in looks}
    if len(texts) > 1:
        mend = "train them one after the other, or write the texts as messages"
        raise InputError("plain texts and conversations cannot be mixed in one dataset there", where="data", mend=mend)
    if True in texts:
        return Shape.TEXT
    if not chat:
        return Shape.PLAIN
    loss_on = loss_of(recipe)
    several = any(look.several for look in looks)
    return Shape.CHAT if loss_on == "everything" or (several and loss_on != "last") else Shape.PAIR


def loss_of(recipe: Recipe) -> str:
    return str(reading_of(recipe).loss_on)


# ── the code ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_TEXTS = '''\
def messages(value, role):
    """A text as a list of one message."""
    return [{"role": role, "content": str(value)}]
'''
_MESSAGES = '''\
ROLES = {roles}


def messages(value, role):
    """A text, a message or a list of messages, as a list of {{role, content}}."""
    if not isinstance(value, list | dict):
        return [{{"role": role, "content": str(value)}}]
    turns = [value] if isinstance(value, dict) else value
    plain = [turn if "role" in turn else {{"role": turn["from"], "content": turn["value"]}} for turn in turns]
    known = [{{key: value for key, value in turn.items() if value is not None}} for turn in plain]
    return [{{**turn, "role": ROLES.get(turn["role"], turn["role"])}} for turn in known]
'''


def rows_code(looks: Sequence[Look], shape: Shape, loss_on: str) -> str:
    """`messages` and, for each dataset, `to_row_N(record)`: one row, or None where SFT has nothing to learn from it."""
    nested = any(look.nested for look in looks)
    roles = ",\n".join(f"    {json.dumps(name)}: {json.dumps(role)}" for name, role in SHAREGPT_ROLES.items())
    code = _MESSAGES.format(roles=f"{{\n{roles},\n}}") if nested else _TEXTS
    return "\n\n".join(
        [
            *([] if shape is Shape.TEXT else [code]),
            *(_to_row(look, index, shape, loss_on) for index, look in enumerate(looks)),
        ]
    )


def _to_row(look: Look, index: int, shape: Shape, loss_on: str) -> str:
    lines = [f"def to_row_{index}(record):", f'    """{look.detected.format} → {shape}."""']
    body = _SHAPED[shape](look) if shape in _SHAPED else _supervised(look, shape, loss_on)
    return "\n".join([*lines, *(f"    {line}" for line in body)]) + "\n"


def _field(look: Look, name: str) -> str:
    column = look.column(name)
    assert column is not None, name
    text = f"record[{json.dumps(column, ensure_ascii=False)}]"
    return f"json.loads({text})" if name in look.written else text


def _optional(look: Look, name: str) -> str | None:
    column = look.column(name)
    return None if column is None else f"record.get({json.dumps(column, ensure_ascii=False)})"


def _asked(look: Look, name: str) -> list[str]:
    """`turns`: the prompt, with what belongs before it: history, an instruction's input, a system message."""
    lines = [f'turns = messages({_field(look, name)}, "user")']
    if (extra := _optional(look, "input")) is not None:
        lines += [f"if {extra}:", f'    turns[-1]["content"] += "\\n\\n" + {extra}']
    if (history := _optional(look, "history")) is not None:
        lines += [
            f"for question, answer in reversed({history} or []):",
            '    turns = messages(question, "user") + messages(answer, "assistant") + turns',
        ]
    return lines


def _system(look: Look) -> list[str]:
    if (system := _optional(look, "system")) is None:
        return []
    return [f'if {system} and turns[0]["role"] != "system":', f'    turns = messages({system}, "system") + turns']


def _tools(look: Look) -> str:
    return "" if look.column("tools") is None else f', "tools": {_field(look, "tools")}'


_NAMES = {
    Format.PROMPT_COMPLETION: ("prompt", "completion"),
    Format.PROMPT_COMPLETION_MESSAGES: ("prompt", "completion"),
    Format.QUESTION_ANSWER: ("question", "answer"),
    Format.ALPACA: ("instruction", "output"),
    Format.PROMPT_ANSWER: ("prompt", "answer"),
}


def _supervised(look: Look, shape: Shape, loss_on: str) -> list[str]:
    if shape is Shape.TEXT:
        return [f'return {{"text": {_field(look, "text")}}}']
    lines = [*_conversation_lines(look), *_system(look)]
    if shape is Shape.CHAT:
        return [*lines, f'return {{"messages": turns{_tools(look)}}}']
    if loss_on == "assistant" and look.nested:
        lines += [
            'if [turn["role"] for turn in turns].count("assistant") != 1 or turns[-1]["role"] != "assistant":',
            '    raise ValueError(f"one answer, at the end, was expected: {record}")',
        ]
    if shape is Shape.PLAIN:
        return [*lines, 'return {"prompt": turns[0]["content"], "completion": turns[-1]["content"]}']
    return [*lines, f'return {{"prompt": turns[:-1], "completion": turns[-1:]{_tools(look)}}}']


def _conversation_lines(look: Look) -> list[str]:
    """`turns`: the whole conversation that supervised fine-tuning trains."""
    format = look.detected.format
    if format in (Format.MESSAGES, Format.SHAREGPT):
        name = "messages" if format is Format.MESSAGES else "conversations"
        return [f'turns = messages({_field(look, name)}, "user")']
    if format is Format.PREFERENCE:
        chosen = f'messages({_field(look, "chosen")}, "assistant")'
        return [f"turns = {chosen}"] if look.whole else [*_asked(look, "prompt"), f"turns += {chosen}"]
    if format is Format.KTO:
        skip = [f"if {_field(look, 'label')} not in {_TRUE}:", "    return None  # an undesirable answer"]
        if look.column("messages") is not None:
            return [*skip, f'turns = messages({_field(look, "messages")}, "user")']
        return [*skip, *_asked(look, "prompt"), f'turns += messages({_field(look, "completion")}, "assistant")']
    question, answer = _NAMES[format]
    return [*_asked(look, question), f'turns += messages({_field(look, answer)}, "assistant")']


_TRUE = '(True, 1, "true", "True", "1")'


def _preference(look: Look) -> list[str]:
    _require(look, Format.PREFERENCE, "preference pairs (chosen, rejected)")
    chosen, rejected = (f'messages({_field(look, name)}, "assistant")' for name in ("chosen", "rejected"))
    if not look.whole:
        pair = f'return {{"prompt": turns, "chosen": {chosen}, "rejected": {rejected}}}'
        return [*_asked(look, "prompt"), *_system(look), pair]
    return [
        f"turns, rejected = {chosen}, {rejected}",
        "shared = next(i for i, (a, b) in enumerate(zip(turns, rejected)) if a != b)",
        "turns, chosen, rejected = turns[:shared], turns[shared:], rejected[shared:]",
        *_system(look),
        'return {"prompt": turns, "chosen": chosen, "rejected": rejected}',
    ]


def _judged(look: Look) -> list[str]:
    _require(look, Format.KTO, "answers with a label")
    if look.column("messages") is not None:
        lines = [f'turns = messages({_field(look, "messages")}, "user")', *_system(look)]
        return [*lines, f'return {{"prompt": turns[:-1], "completion": turns[-1:], "label": {_label(look)}}}']
    completion = f'messages({_field(look, "completion")}, "assistant")'
    row = f'return {{"prompt": turns, "completion": {completion}, "label": {_label(look)}}}'
    return [*_asked(look, "prompt"), *_system(look), row]


def _label(look: Look) -> str:
    return f"{_field(look, 'label')} in {_TRUE}"


def _prompted(look: Look) -> list[str]:
    format = look.detected.format
    if format not in _NAMES:
        mend = "name the columns with `--map prompt=COLUMN --map answer=COLUMN`"
        raise InputError(f"{format} rows are not written as prompts and answers", where=look.spec, mend=mend)
    question, answer = _NAMES[format]
    found = f"str({_field(look, answer)})" if look.column(answer) is not None else "None"
    return [*_asked(look, question), *_system(look), f'return {{"prompt": turns, "answer": {found}}}']


_SHAPED: Mapping[Shape, Callable[[Look], list[str]]] = {
    Shape.PREFERENCE: _preference,
    Shape.JUDGED: _judged,
    Shape.PROMPT: _prompted,
}


def _require(look: Look, format: Format, what: str) -> None:
    if look.detected.format is not format:
        where = look.spec
        raise InputError(f"the rows are {look.detected.format}, and {what} are needed", where=where)


def template_code(spec: str) -> str:
    """The recipe's chat template as a Python expression: its text, or the file that holds it."""
    if spec == CHATML_NAME:
        return json.dumps(CHATML)
    if "{{" in spec or "{%" in spec:
        return json.dumps(spec, ensure_ascii=False)
    return f'open({json.dumps(spec, ensure_ascii=False)}, encoding="utf-8").read()'


def template_text(spec: str) -> str:
    """What Axolotl takes: the template's text, or the file that holds it."""
    return CHATML if spec == CHATML_NAME else spec
