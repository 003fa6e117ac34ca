"""Rows become conversations: the format is detected from the columns, and said, with how to change the choice.

A format is chosen once for all rows of a source. A single row that cannot be read is an InputError with its origin,
which the caller may drop and count; a row of another schema is a MixedSchema, which nobody drops.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from types import MappingProxyType

from welltuned.data import columns as readers
from welltuned.data.conversation import (
    Conversation,
    Defect,
    Format,
    Judged,
    MixedSchema,
    NotTrained,
    Policy,
    Preference,
    PromptAnswer,
    Teaching,
)
from welltuned.data.source import Row
from welltuned.data.turns import check_turns, kind, shown, shown_all, text
from welltuned.data.variants import NAMES, VARIANTS, Variant, allowed, fits, other_schema
from welltuned.errors import InputError

__all__ = [
    "Conversations",
    "Detected",
    "Format",
    "Judged",
    "MixedSchema",
    "NotTrained",
    "Preference",
    "PromptAnswer",
    "detect",
    "to_conversation",
    "to_conversations",
    "to_judged",
    "to_preference",
    "to_prompt",
]

SAMPLE = 1000  # rows from which the format is detected
NO_MAPPING: Mapping[str, str] = MappingProxyType({})
DESCRIPTION = {
    Format.MESSAGES: "chat `messages` with role and content",
    Format.SHAREGPT: "ShareGPT `conversations` with from and value",
    Format.PROMPT_COMPLETION: "`prompt` and `completion` texts; one user and one assistant message where the model has "
    "a chat template, else the two texts as they are",
    Format.PROMPT_COMPLETION_MESSAGES: "`prompt` and `completion` messages; only the completion is trained",
    Format.QUESTION_ANSWER: "`question` and `answer` texts, as one user and one assistant message",
    Format.ALPACA: "Alpaca's `instruction`, `input` (if any, after a blank line) and `output`, as one user and one "
    "assistant message",
    Format.TEXT: "plain `text`, all of it trained, without a chat template: continued pretraining",
    Format.PREFERENCE: "preference pairs, `chosen` and `rejected`",
    Format.KTO: "answers with a `label`",
    Format.PROMPT_ANSWER: "`prompt` and a reference `answer`, which supervised fine-tuning trains",
}
UNDERSTOOD = (
    "understood are: messages; conversations; prompt + completion; instruction + output; question + answer; "
    "prompt + answer; text; chosen + rejected; and messages or prompt + completion with a label"
)
ANSWERS = ("completion", "answer", "output")
TAUGHT = {  # what is made of rows that hold more than the method needs
    (Format.PREFERENCE, Teaching.ANSWERS): "; supervised fine-tuning trains the chosen answers",
    (Format.KTO, Teaching.ANSWERS): "; supervised fine-tuning trains those that are labelled true",
    (Format.PREFERENCE, Teaching.LABELS): "; the chosen answers count as desirable, the rejected ones as undesirable",
}


@dataclass(frozen=True, slots=True)
class Detected:
    """What was chosen for all rows of a source.

    Attributes:
        format: how the rows are read.
        also: the other formats that the columns would allow.
        ignored: the columns that are not read, as far as the first rows show.
        mapping: our name → the file's column, for every name that is read.
        required: the columns that a row must have.
        first: the origin of the first row that has them.
    """

    format: Format
    also: tuple[Format, ...] = ()
    ignored: tuple[str, ...] = ()
    mapping: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    first: str = ""

    def sentence(self, teaching: Teaching = Teaching.ANSWERS) -> str:
        """The choice, the others, and how to change it."""
        no_answer = self.format is Format.PROMPT_ANSWER and "answer" not in self.mapping
        said = f"format: {'`prompt` alone, without answers' if no_answer else DESCRIPTION[self.format]}"
        said += TAUGHT.get((self.format, teaching), "")
        renamed = [f"{name} from `{shown(column)}`" for name, column in self.mapping.items() if column != name]
        said += f" ({', '.join(renamed)})" if renamed else ""
        if self.also:
            said += f"; the columns would also fit {', '.join(self.also)} (`--set format={self.also[0]}`)"
        if self.ignored:
            said += f"; columns not read: {shown_all(self.ignored)} (`--map NAME=COLUMN` reads one)"
        return said


def detect(rows: Sequence[Row], *, format: Format | None = None, mapping: Mapping[str, str] = NO_MAPPING) -> Detected:
    """The format of all rows, from the first of them; InputError where there is none that they fit.

    The first row that fits any format decides, by its columns: a column that is null in all the rows looked at does
    not count. `format` allows only that one; `mapping` (our name → column) only those that read all its names, and an
    empty column there means that the name is not read.
    """
    sample = rows[:SAMPLE]
    if not sample:
        raise InputError("the dataset has no rows")
    columns = tuple(dict.fromkeys(column for row in sample for column in row.record))
    _check_mapping(mapping, columns)
    candidates = allowed(format, mapping)
    if not candidates:
        raise InputError(_no_reader(format, mapping), where="map")
    shown_by = {id(c): row for c in candidates if (row := _first_fit(c, sample)) is not None}
    for row in sample:
        fitting = [c for c in candidates if id(c) in shown_by and row.record.keys() >= {*c.required.values()}]
        if fitting:
            found = _chosen(fitting, shown_by[id(fitting[0])], columns, mapping)
            if format is Format.PROMPT_COMPLETION_MESSAGES and found.format is not format:
                what = f"format={format} reads lists of messages, and the columns hold texts"
                raise InputError(what, where=found.first, mend=f"set format={found.format}")
            return found
    raise _no_fit(candidates, sample, columns, format)


def _check_mapping(mapping: Mapping[str, str], columns: Sequence[str]) -> None:
    for name, column in mapping.items():
        where = f"map: {shown(name)}={shown(column)}"
        if name not in NAMES:
            close = get_close_matches(name, NAMES, n=1)
            mend = f"did you mean `{close[0]}`?" if close else f"names are {', '.join(NAMES)}"
            raise InputError(f"`{shown(name)}` is no name that is read", where=where, mend=mend)
        if column and column not in columns:
            close = get_close_matches(column, columns, n=1)
            mend = f"did you mean `{shown(close[0])}`? " if close else ""
            mend += f"the columns are {shown_all(columns)}"
            raise InputError(f"there is no column `{shown(column)}`", where=where, mend=mend)


def _first_fit(variant: Variant, rows: Iterable[Row]) -> Row | None:
    return next((row for row in rows if fits(variant, row.record)), None)


def _chosen(fitting: Sequence[Variant], row: Row, columns: Sequence[str], mapping: Mapping[str, str]) -> Detected:
    """The first of the fitting variants, with the optional columns that there are; `row` is the first that fits it."""
    variant = fitting[0]
    format = variant.format
    if format is Format.PROMPT_COMPLETION and _has_messages(variant, row):
        format = Format.PROMPT_COMPLETION_MESSAGES
    read = dict(variant.required)
    for name, possible in variant.optional.items():
        free = columns if name in mapping else [column for column in columns if column not in read.values()]
        found = next((column for column in possible if column in free), None)
        if found is not None:
            read[name] = found
    also = dict.fromkeys(v.format for v in fitting if v.format is not variant.format and not v.weak)
    ignored = tuple(column for column in columns if column not in read.values())
    return Detected(format, tuple(also), ignored, read, tuple(variant.required.values()), row.origin)


def _has_messages(variant: Variant, row: Row) -> bool:
    return any(readers.is_messages(row.record[column]) for column in variant.required.values())


def _no_reader(format: Format | None, mapping: Mapping[str, str]) -> str:
    names = " and ".join(f"`{name}`" for name, column in mapping.items() if column)
    left = " and ".join(f"`{name}`" for name, column in mapping.items() if not column)
    which = f"format={format}" if format else "no format"
    if left:
        return f"{which} can{'not' if format else ''} be read without {left}"
    return f"{which} does not read {names}" if format else f"no format reads {names} together"


def _no_fit(
    candidates: Sequence[Variant], sample: Sequence[Row], columns: Sequence[str], format: Format | None
) -> InputError:
    """Why no format fits: a column of the one asked for is missing, or null throughout, or nothing is known."""
    origin = sample[0].origin
    found = shown_all(columns) or "none"
    by_missing = sorted(candidates, key=lambda v: sum(column not in columns for column in v.required.values()))
    nearest = by_missing[0]
    missing = [name for name, column in nearest.required.items() if column not in columns]
    if not missing:
        return _unusable(nearest, sample)
    if format is None and len(candidates) == len(VARIANTS):
        mend = UNDERSTOOD + "; or name them: `--map prompt=COLUMN --map completion=COLUMN`"
        return InputError(f"no format is known for these columns ({found})", where=origin, mend=mend)
    absent = " and ".join(f"`{name}`" for name in missing)
    what = f"{'format=' if format else ''}{nearest.format} needs {absent}, and the columns are {found}"
    mend = "name the column" + "s"[: len(missing) - 1] + ": " + " ".join(f"`--map {name}=COLUMN`" for name in missing)
    return InputError(what, where=origin, mend=mend)


def _unusable(variant: Variant, sample: Sequence[Row]) -> InputError:
    """The columns are there, and no row has a value in all of them (or a label that is one)."""
    origin = sample[0].origin
    rows = f"the first {len(sample):,} rows" if len(sample) == SAMPLE else f"the {len(sample):,} rows"
    rows = rows if len(sample) > 1 else "the one row"
    for name, column in variant.required.items():
        values = [row.record.get(column) for row in sample]
        if all(value is None for value in values):
            mend = f"name another with `--map {name}=COLUMN`"
            return InputError(f"`{shown(column)}` is null in {rows}", where=origin, mend=mend)
        if name == "label" and not any(readers.label(value) is not None for value in values):
            what = f"the label `{shown(column)}` is neither true nor false in {rows}"
            return InputError(what, where=origin, mend="write true or false (or 1 or 0)")
    names = " and ".join(f"`{shown(column)}`" for column in variant.required.values())
    return InputError(f"none of {rows} has values in {names}", where=origin)


def to_conversation(row: Row, detected: Detected, group_by: str | None = None) -> Conversation:
    """SFT's view of a row: a preference's chosen answer, a desirable one, a prompt's reference answer.

    Raises:
        MixedSchema: the row's columns are those of another format.
        NotTrained: the row is sound, and its answer is labelled undesirable.
        InputError: there is nothing sound to learn from the row; the origin is named.
    """
    _check_columns(row, detected)
    conversation = readers.READERS[detected.format](row, detected.mapping)
    if detected.format is not Format.TEXT:
        check_turns(conversation)
    return conversation if group_by is None else replace(conversation, group=_group(row, group_by))


def to_preference(row: Row, detected: Detected, group_by: str | None = None) -> Preference:
    """A pair of answers to one prompt; InputError as for `to_conversation`."""
    _require(detected, Format.PREFERENCE, "preference pairs (chosen, rejected)")
    _check_columns(row, detected)
    found = readers.read_preference(row, detected.mapping)
    if group_by is None:
        return found
    group = _group(row, group_by)
    return Preference(*(replace(answer, group=group) for answer in (found.chosen, found.rejected)))


def to_judged(row: Row, detected: Detected, group_by: str | None = None) -> Judged:
    """An answer and whether it is desirable; InputError as for `to_conversation`."""
    _require(detected, Format.KTO, "answers with a label")
    _check_columns(row, detected)
    found = readers.read_judged(row, detected.mapping)
    if group_by is None:
        return found
    return replace(found, conversation=replace(found.conversation, group=_group(row, group_by)))


def to_prompt(row: Row, detected: Detected) -> PromptAnswer:
    """A prompt and the answer that a reward compares with, from any format that has prompts.

    The answer is the last one of the conversation, if it answers the last question; else a column's (`answer`,
    `solution`, `ground_truth`, `reference_answer`, `reference`, or what is mapped to `answer`); else None.
    """
    if detected.format is Format.TEXT:
        mend = "name the prompt's column with `--map prompt=COLUMN`"
        raise InputError("the rows are plain texts, and there are no prompts in them", where=detected.first, mend=mend)
    _check_columns(row, detected)
    columns = detected.mapping
    if detected.format is Format.PROMPT_ANSWER:
        return readers.read_prompt_only(row, columns)
    if detected.format is Format.KTO:
        judged = readers.read_judged(row, columns)
        found = readers.read_prompt(row, judged.conversation, columns)
        return found if judged.desirable else replace(found, answer=None)
    read = row
    if detected.format is Format.QUESTION_ANSWER:  # whose answer may be a number here
        read = Row({**row.record, columns["answer"]: readers.reference(row, columns["answer"])}, row.origin)
    return readers.read_prompt(row, readers.READERS[detected.format](read, columns), columns)


def _require(detected: Detected, format: Format, what: str) -> None:
    if detected.format is not format:
        mend = f"{format} needs {what}: name the columns with `--map`, or set `format={format}`"
        raise MixedSchema(f"the rows are {detected.format}", where=detected.first, mend=mend)


def _check_columns(row: Row, detected: Detected) -> None:
    record = row.record
    for column in detected.required:
        if record.get(column) is None:
            raise _absent(row, detected, column)


def _absent(row: Row, detected: Detected, column: str) -> InputError:
    """A required column is null or missing: the row is of another schema if it fits another format by itself."""
    record = row.record
    state = "null" if column in record else "missing"
    if (other := other_schema(record, detected.format, detected.also)) is not None:
        names = ", ".join(other.required.values())
        what = f"mixed schemas: `{shown(column)}` is {state}, and the row has the columns of {other.format} ({names})"
        mend = f"{detected.first} and the rows like it are {detected.format}; put the two into files of their own"
        return MixedSchema(what, where=row.origin, mend=mend)
    name = next((name for name, read in detected.mapping.items() if read == column), column)
    what = f"`{shown(column)}` is {state}"
    if state == "missing":
        what += f" (the row has {shown_all(record) or 'no columns'})"
    return InputError(f"the row has no answer: {what}" if name in ANSWERS else what, where=row.origin)


def _group(row: Row, column: str) -> str:
    value = row.record.get(column)
    if isinstance(value, bool | int | float):
        value = repr(value) if -1e300 < value < 1e300 else None
    if not isinstance(value, str):
        found = kind(value) if column in row.record else "missing"
        mend = f"the row's columns are {shown_all(row.record)}" if found == "missing" else "it must be text or a number"
        raise InputError(f"the group `{shown(column)}` is {found}", where=row.origin, mend=mend)
    return text(value, f"`{shown(column)}`", row.origin)


@dataclass(frozen=True, slots=True)
class Conversations:
    """All conversations of a dataset, the format they were in, the rows left out, and how many were not to train."""

    items: list[Conversation]
    detected: Detected
    dropped: tuple[Defect, ...] = ()
    not_trained: int = 0


def to_conversations(rows: Sequence[Row], on_defect: Policy = Policy.ERROR) -> Conversations:
    """Detect the format once, then convert every row. A row of another schema is an error under any policy."""
    detected = detect(rows)
    items: list[Conversation] = []
    dropped: list[Defect] = []
    not_trained = 0
    for row in rows:
        try:
            items.append(to_conversation(row, detected))
        except NotTrained:
            not_trained += 1
        except InputError as error:
            if on_defect is not Policy.DROP or isinstance(error, MixedSchema):
                raise
            dropped.append(Defect(row.origin, error.what))
    if not items:
        why, where = (dropped[0].what, dropped[0].origin) if dropped else ("none is to train", rows[0].origin)
        raise InputError(f"all {len(rows)} rows have defects ({why})", where=where)
    return Conversations(items, detected, tuple(dropped), not_trained)
