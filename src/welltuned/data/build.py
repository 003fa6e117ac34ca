"""A source becomes a store: its rows are read, rendered and appended some hundred at a time, or found in the cache."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from welltuned.data.cache import Cache, cache_key
from welltuned.data.conversation import Conversation, Format, MixedSchema, NotTrained, Policy, Teaching
from welltuned.data.formats import Detected, detect, to_conversation, to_judged, to_preference
from welltuned.data.pairs import joined
from welltuned.data.readers import Refuse
from welltuned.data.render import Example, LossOn, Renderer
from welltuned.data.source import Row, Source
from welltuned.data.store import KEPT_DEFECTS, BadRow, ExampleStore, StoreWriter, digest
from welltuned.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 1_000  # rows from which the format is detected
CHUNK_ROWS = 512  # long enough to use all cores
CHUNK_CHARACTERS = 2**20  # short enough to bound the memory: a token's offsets cost a hundred times its id
SMALLEST_CACHED = 10**6  # bytes; less than this is tokenised in a second
RowsRead = Callable[[str, int], None]
"""Told the name of a source and how many of its rows are rendered, as they are."""


def unwatched(_: str, __: int) -> None:
    """For callers that do not watch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How rows are read and rendered: with source and tokenizer, all that a store depends on."""

    teaching: Teaching = Teaching.ANSWERS
    format: Format | None = None
    mapping: Mapping[str, str] = field(default_factory=dict)
    group_by: str | None = None
    loss_on: LossOn = LossOn.ASSISTANT
    instruction_part: str | None = None
    response_part: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def renderer(self, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
        return Renderer(
            tokenizer,
            loss_on=self.loss_on,
            instruction_part=self.instruction_part,
            response_part=self.response_part,
            chat_template=self.chat_template,
            chat_template_kwargs=self.chat_template_kwargs,
        )


def read_store(
    source: Source,
    tokenizer: "PreTrainedTokenizerBase",
    reading: Reading,
    on_bad_row: Policy = Policy.ERROR,
    cache: Cache | None = None,
    progress: RowsRead = unwatched,
) -> ExampleStore:
    """All examples of a source, in order. Rows that cannot be read are left out and listed, or an error.

    Raises:
        InputError: no format fits, a row of another schema, a template that cannot be used, a bad row under ERROR.
    """

    if 0 < source.size < SMALLEST_CACHED:
        return _built(StoreWriter(), source, tokenizer, reading, on_bad_row, progress).store()
    cache = cache or Cache()
    # The template itself counts, its values included, not where it was found.
    options = {**asdict(reading), "chat_template": None, "chat_template_kwargs": None}
    template = reading.renderer(tokenizer).template
    key = cache_key(source.fingerprint(), source.name, tokenizer, template, options)
    store = cache.find(key)
    if store is None:
        built = _built(cache.begin(), source, tokenizer, reading, on_bad_row, progress)
        store = cache.publish(key, built)
    return store


def conversations_at(source: Source, reading: Reading, rows: Sequence[int]) -> list[Conversation]:
    """The conversations of ascending row numbers, read once more from the source."""
    wanted = set(rows)
    found = []
    for number, row, detected in _rows(source, reading, lambda _: None):  # told of when the store was built
        if number in wanted:
            found.append(_read(row, detected, reading)[0].conversation)
            if len(found) == len(wanted):
                break
    return found


def _rows(source: Source, reading: Reading, refuse: Refuse) -> Iterator[tuple[int, Row, Detected]]:
    """Each row with its number among those that can be read, and the format that the first ones are in."""
    first: list[Row | InputError] = []  # in the file's order, so that the first bad one is the first that is told of
    sampling = True
    rows = iter(source.rows(lambda error: first.append(error) if sampling else refuse(error)))
    for row in islice(rows, SAMPLE):
        first.append(row)
    sampling = False
    sample = [row for row in first if isinstance(row, Row)]
    detected = detect(sample, format=reading.format, mapping=reading.mapping) if sample else None
    number = -1
    for item in chain(first, rows):
        if isinstance(item, InputError):
            refuse(item)
        elif detected is not None:
            yield (number := number + 1), item, detected
    if detected is None:
        raise InputError("no row can be read", where=source.name, mend="see what is wrong with on_bad_row: error")


@dataclass(frozen=True, slots=True)
class _Lesson:
    """What a row teaches, before it is rendered: a conversation, and what else its method asks of it."""

    conversation: Conversation
    rejected: Conversation | None = None
    desirable: bool | None = None

    @property
    def conversations(self) -> list[Conversation]:
        return [self.conversation] if self.rejected is None else [self.conversation, self.rejected]

    def example(self, rendered: Sequence[Example]) -> Example:
        """What became of the conversations, as one example."""
        example = rendered[0] if self.rejected is None else joined(*rendered)
        return example if self.desirable is None else replace(example, desirable=self.desirable)


def _read(row: Row, detected: Detected, reading: Reading) -> list[_Lesson]:
    """What a row teaches; see `to_conversation` for its errors."""
    if reading.teaching is Teaching.ANSWERS:
        return [_Lesson(to_conversation(row, detected, reading.group_by))]
    if reading.teaching is Teaching.LABELS and detected.format is not Format.PREFERENCE:
        judged = to_judged(row, detected, reading.group_by)
        return [_Lesson(judged.conversation, desirable=judged.desirable)]
    pair = to_preference(row, detected, reading.group_by)
    if reading.teaching is Teaching.PAIRS:
        return [_Lesson(pair.chosen, rejected=pair.rejected)]
    return [_Lesson(pair.chosen, desirable=True), _Lesson(pair.rejected, desirable=False)]


def _built(
    writer: StoreWriter,
    source: Source,
    tokenizer: "PreTrainedTokenizerBase",
    reading: Reading,
    on_bad_row: Policy,
    progress: RowsRead = unwatched,
) -> StoreWriter:
    try:
        builder = _Builder(
            writer, reading, reading.renderer(tokenizer), on_bad_row, lambda rows: progress(source.name, rows)
        )
        detected: Detected | None = None
        for number, row, detected in _rows(source, reading, builder.refuse):  # noqa: B007  (one for all of the rows)
            builder.add(number, row, detected)
        assert detected is not None  # a source without rows is an error of its own
        builder.end(detected)
    except BaseException:
        writer.discard()
        raise
    return writer


class _Builder:
    """Conversations wait until there are enough of them to render at once."""

    def __init__(
        self,
        writer: StoreWriter,
        reading: Reading,
        renderer: Renderer,
        on_bad_row: Policy,
        progress: Callable[[int], None],
    ):
        self.writer = writer
        self.reading = reading
        self.renderer = renderer
        self.on_bad_row = on_bad_row
        self.progress = progress
        self.waiting: list[tuple[int, _Lesson]] = []
        self.characters = self.written = self.not_trained = self.bad_rows = 0
        self.bad: list[BadRow] = []

    def add(self, number: int, row: Row, detected: Detected) -> None:
        try:
            lessons = _read(row, detected, self.reading)
        except MixedSchema:
            raise
        except NotTrained:
            self.not_trained += 1
            return
        except InputError as error:
            self.refuse(error)
            return
        for lesson in lessons:
            self.waiting.append((number, lesson))
            self.characters += sum(len(m.content) for one in lesson.conversations for m in one.messages)
        if len(self.waiting) >= CHUNK_ROWS or self.characters > CHUNK_CHARACTERS:
            self._render()

    def end(self, detected: Detected) -> None:
        self._render()
        if not self.written:
            rows = self.bad_rows + self.not_trained
            why, where = (self.bad[0].what, self.bad[0].origin) if self.bad else ("no answer is desirable", None)
            raise InputError(f"all {rows:,} rows have defects ({why})", where=where)
        self.writer.close(
            bad=tuple(self.bad),
            bad_rows=self.bad_rows,
            not_trained=self.not_trained,
            format_name=str(detected.format),
            format_sentence=detected.sentence(self.reading.teaching),
            mask_from=str(self.renderer.mask_from or ""),
            boundary_splits=self.renderer.boundary_splits,
        )

    def refuse(self, error: InputError) -> None:
        if self.on_bad_row is Policy.ERROR:
            raise error
        self.bad_rows += 1
        if len(self.bad) < KEPT_DEFECTS:
            self.bad.append(BadRow(str(error.where), error.what, error.mend))

    def _render(self) -> None:
        if not self.waiting:
            return
        lessons = [lesson for _, lesson in self.waiting]
        try:
            examples: Sequence[Example | None] = self._rendered(lessons)
        except InputError as error:
            if self.on_bad_row is Policy.ERROR:
                raise
            examples = self._one_by_one(lessons)
            if not self.written and not any(examples):
                raise error  # not the rows': no row can be rendered at all
        done = [
            (example, number, lesson.conversation)
            for example, (number, lesson) in zip(examples, self.waiting, strict=True)
            if example is not None
        ]
        groups = (_group(conversation) for _, _, conversation in done)
        self.writer.add([e for e, _, _ in done], [n for _, n, _ in done], groups)
        self.written += len(done)
        self.progress(self.written)
        self.waiting.clear()
        self.characters = 0

    def _rendered(self, lessons: Sequence[_Lesson]) -> list[Example]:
        rendered = iter(self.renderer([one for lesson in lessons for one in lesson.conversations]))
        return [lesson.example([next(rendered) for _ in lesson.conversations]) for lesson in lessons]

    def _one_by_one(self, lessons: Iterable[_Lesson]) -> list[Example | None]:
        """A row that the template cannot render is a bad row like any other."""
        examples: list[Example | None] = []
        for lesson in lessons:
            try:
                examples += self._rendered([lesson])
            except InputError as error:
                self.refuse(error)
                examples.append(None)
        return examples


def _group(conversation: Conversation) -> bytes:
    """What keeps rows on one side of the held-out split: the named column's text, or the prompt."""
    key = conversation.prompt() if conversation.group is None else conversation.group
    return digest(repr(key).encode("utf-8", "surrogatepass"))
