"""By which columns each format is told, under which names. A table, and what it says of a row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from welltuned.data.columns import ANSWER_COLUMNS, label
from welltuned.data.conversation import Format

PROMPT_COMPLETION = (Format.PROMPT_COMPLETION, Format.PROMPT_COMPLETION_MESSAGES)
SYSTEM = "system=system|system_prompt"
INPUT = "input=input|context history"


@dataclass(frozen=True, slots=True)
class Variant:
    """One set of columns that tells a format: our name → the column that a row must have, and those it may have."""

    format: Format
    required: Mapping[str, str]
    optional: Mapping[str, tuple[str, ...]]
    weak: bool = False  # fits too much to say of a row that it is of another schema


def _variant(format: Format, required: str, optional: str = "", weak: bool = False) -> Variant:
    """Words are `name` or `name=column`; the optional ones `name=column|column`, or `name=` for a mapped one only."""
    must = {name: column or name for name, _, column in (word.partition("=") for word in required.split())}
    may = {
        name: columns if sign else name for name, sign, columns in (word.partition("=") for word in optional.split())
    }
    return Variant(format, must, {name: tuple(filter(None, columns.split("|"))) for name, columns in may.items()}, weak)


# In order of preference where several fit: the more structure a format has, the earlier.
VARIANTS = (
    _variant(Format.KTO, "messages label", f"{SYSTEM} tools"),
    _variant(Format.KTO, "messages=conversations label", f"{SYSTEM} tools"),
    _variant(Format.KTO, "prompt completion label", f"{SYSTEM} tools"),
    _variant(Format.KTO, "prompt completion=response label", f"{SYSTEM} tools"),
    _variant(Format.PREFERENCE, "chosen rejected prompt", f"{SYSTEM} tools"),
    _variant(Format.PREFERENCE, "chosen rejected prompt=question", f"{SYSTEM} tools"),
    _variant(Format.PREFERENCE, "chosen rejected prompt=instruction", f"{SYSTEM} tools {INPUT}"),
    _variant(Format.PREFERENCE, "chosen rejected prompt=query", f"{SYSTEM} tools"),
    _variant(Format.PREFERENCE, "chosen rejected prompt=input", f"{SYSTEM} tools"),
    _variant(Format.PREFERENCE, "chosen rejected prompt=messages", f"{SYSTEM} tools"),
    _variant(Format.PREFERENCE, "chosen rejected prompt=conversations", f"{SYSTEM} tools"),
    _variant(Format.PREFERENCE, "chosen rejected", f"{SYSTEM} tools"),
    _variant(Format.MESSAGES, "messages", f"{SYSTEM} tools answer="),
    _variant(Format.SHAREGPT, "conversations", f"{SYSTEM} tools answer="),
    _variant(Format.SHAREGPT, "conversations=conversation", f"{SYSTEM} tools answer="),
    _variant(Format.PROMPT_COMPLETION, "prompt completion", f"{SYSTEM} tools"),
    _variant(Format.PROMPT_COMPLETION, "prompt completion=response", f"{SYSTEM} tools"),
    _variant(Format.ALPACA, "instruction output", f"{SYSTEM} {INPUT}"),
    _variant(Format.ALPACA, "instruction output=response", f"{SYSTEM} {INPUT}"),
    _variant(Format.QUESTION_ANSWER, "question answer", SYSTEM),
    _variant(Format.QUESTION_ANSWER, "question answer=response", SYSTEM),
    _variant(Format.QUESTION_ANSWER, "question=query answer=response", SYSTEM),
    _variant(Format.QUESTION_ANSWER, "question=query answer", SYSTEM),
    _variant(Format.QUESTION_ANSWER, "question=input answer=output", SYSTEM),
    *(
        _variant(Format.PROMPT_ANSWER, f"prompt={prompt} answer={answer}", f"{SYSTEM} tools")
        for prompt in ("prompt", "problem", "question")
        for answer in ANSWER_COLUMNS
        if (prompt, answer) != ("question", "answer")
    ),
    _variant(Format.TEXT, "text"),
    _variant(Format.PROMPT_ANSWER, "prompt", f"{SYSTEM} tools", weak=True),
)
NAMES = tuple(dict.fromkeys(name for v in VARIANTS for name in (*v.required, *v.optional)))


def allowed(format: Format | None, mapping: Mapping[str, str]) -> list[Variant]:
    """The variants of a format (of all, if None) that read every mapped name and need none that is not to be read."""
    wanted = PROMPT_COMPLETION if format in PROMPT_COMPLETION else (format,)
    mapped = (_mapped(v, mapping) for v in VARIANTS if format is None or v.format in wanted)
    found = [variant for variant in mapped if variant is not None]
    return sorted(found, key=lambda v: sum(name not in v.required for name in mapping))  # what is mapped is wanted


def _mapped(variant: Variant, mapping: Mapping[str, str]) -> Variant | None:
    known = {*variant.required, *variant.optional}
    if any(name not in known if column else name in variant.required for name, column in mapping.items()):
        return None
    required = {name: mapping.get(name, column) for name, column in variant.required.items()}
    optional = {name: (mapping[name],) if name in mapping else columns for name, columns in variant.optional.items()}
    return replace(variant, required=required, optional=optional)


def fits(variant: Variant, record: Mapping[str, Any]) -> bool:
    """Whether the row alone shows that it is of this format."""
    if any(record.get(column) is None for column in variant.required.values()):
        return False
    return variant.format is not Format.KTO or label(record[variant.required["label"]]) is not None


def other_schema(record: Mapping[str, Any], format: Format, also: Sequence[Format]) -> Variant | None:
    """What a row is that lacks the columns of `format`; None if it is only incomplete, or of one of `also`."""
    return next((v for v in VARIANTS if v.format not in also and not v.weak and fits(v, record)), None)
