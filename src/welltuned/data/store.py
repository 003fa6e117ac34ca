"""All examples of a source in four flat arrays, in memory where they are small and in files where they are not.

    ids      int32, one a token
    marks    uint8, one a token: bit 0 says that it is trained, bits 1 to 3 whose it is (a Speaker)
    origins  UTF-8 bytes, end to end
    records  one a row: where it lies in the other three, and what the audit, the split and the mixture ask of it

So ten million rows are ten million records and no Python objects. The files are read a row at a time and never mapped:
mapped pages would count as this process's memory.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from welltuned.data.conversation import Kind
from welltuned.data.fork import Fork
from welltuned.data.places import ends, forks, last_answer
from welltuned.data.render import Example
from welltuned.errors import InputError

IN_MEMORY = 64 * 2**20  # bytes of all four arrays; above this they stay in files
TOKENS_AT_A_TIME = 2**22
RECORDS_AT_A_TIME = 2**18
KEPT_DEFECTS = 1_000  # bad rows described one by one; their number is always complete
MARKS = 16  # the values that a mark can have

RECORD = np.dtype(
    [
        ("start", "<i8"),  # of its ids and marks
        ("origin", "<i8"),  # start of its origin
        ("row", "<i8"),  # its number in the source, from 0, rows left out counted
        ("digest", "<u8"),  # of its ids
        ("prompt", "<u8"),  # of its ids before its last answer; 0: no more than a start token is before that
        ("group", "<u8"),  # of what keeps rows on one side of the held-out split
        ("length", "<i4"),
        ("trained", "<i4"),  # number of trained tokens
        ("first", "<i4"),  # position of the first trained token, -1 for none; in its sequence, where there are two
        ("last", "<i4"),  # and of the last
        ("shared", "<i4"),  # tokens that both sequences of a pair begin with; all of another row's
        ("second", "<i4"),  # where the rejected sequence's own tokens begin; the length of another row
        ("longest", "<i4"),  # tokens of the longer sequence
        ("needed", "<i4"),  # tokens of a sequence up to where there is something to be learned
        ("origin_length", "<u2"),
        ("found", "<u2"),  # the kinds of defect that rendering saw, see `kind_bit`
        ("label", "i1"),  # 1 desirable, 0 not, -1 not judged
    ]
)
TYPES: Mapping[str, np.dtype[Any]] = {
    "ids": np.dtype("<i4"),
    "marks": np.dtype("u1"),
    "origins": np.dtype("u1"),
    "records": RECORD,
}
ABOUT = "about.json"
MEND_FOLDER = "make room there, or let WELLTUNED_CACHE name a folder that has some"


def kind_bit(kind: Kind) -> int:
    """The bit of a record's `found` that stands for this kind of defect."""
    return _BITS[kind]


_BITS = {kind: 1 << index for index, kind in enumerate(Kind)}


def digest(data: bytes) -> bytes:
    """8 bytes, never all zero: among ten million rows two share theirs by chance once in 400,000 datasets."""
    found = blake2b(data, digest_size=8).digest()
    return found if any(found) else b"\1" * 8


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that could not be read as a conversation, and what the error said."""

    origin: str
    what: str
    mend: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What is known of a source beside its examples.

    Attributes:
        bad: the first 1,000 rows left out as unreadable, of `bad_rows`.
        not_trained: rows that are sound and teach nothing to this method (the rejected half of KTO's).
        largest_id: the largest token id, -1 without rows, and the row that has it.
        format_name, format_sentence: the columns' format, and the sentence about how it was found.
        mask_from: how the trained tokens were found.
        boundary_splits: examples tokenised in pieces, since inference tokenises the prompt alone.
    """

    rows: int = 0
    tokens: int = 0
    bad: tuple[BadRow, ...] = ()
    bad_rows: int = 0
    not_trained: int = 0
    largest_id: int = -1
    largest_id_origin: str = ""
    format_name: str = ""
    format_sentence: str = ""
    mask_from: str = ""
    boundary_splits: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> "About":
        plain = json.loads(text)
        return cls(**{**plain, "bad": tuple(BadRow(**row) for row in plain["bad"])})


class Columns(Protocol):
    """Where the four arrays lie."""

    def size(self, name: str) -> int: ...

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]: ...


class InMemory:
    def __init__(self, arrays: Mapping[str, NDArray[Any]]):
        self._arrays = arrays

    def size(self, name: str) -> int:
        return len(self._arrays[name])

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        return self._arrays[name][start:stop]


class InFiles:
    """The arrays in a folder's files, held open: whoever removes the folder meanwhile takes nothing from us."""

    def __init__(self, folder: Path):
        self._files = {name: (folder / name).open("rb", buffering=0) for name in TYPES}

    def size(self, name: str) -> int:
        return os.fstat(self._files[name].fileno()).st_size // TYPES[name].itemsize

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        kind = TYPES[name]
        out = np.empty(stop - start, kind)
        room, at, number = out.view(np.uint8).data, start * kind.itemsize, self._files[name].fileno()
        while len(room):
            data = os.pread(number, len(room), at)  # not more than 2 GB at once, on any system
            if not data:
                raise OSError(f"the file of {name} has become shorter while it was read")
            room[: len(data)] = data
            room, at = room[len(data) :], at + len(data)
        return out


class ExampleStore(Sequence[Example]):
    """The examples of one source, in its order."""

    def __init__(self, columns: Columns, about: About):
        self._columns = columns
        self.about = about

    def __len__(self) -> int:
        return self.about.rows

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        record = self._record(index % len(self))
        length, label = int(record["length"]), int(record["label"])
        start, stop = int(record["start"]), int(record["start"]) + length
        marks = self._columns.read("marks", start, stop)
        found = int(record["found"])
        return Example(
            ids=self._columns.read("ids", start, stop),
            mask=(marks & 1).astype(bool),
            origin=self._origin(record),
            roles=marks >> np.uint8(1),
            found=frozenset(kind for kind, bit in _BITS.items() if found & bit) if found else frozenset(),
            fork=Fork(int(record["shared"]), int(record["second"])) if int(record["shared"]) < length else None,
            desirable=None if label < 0 else bool(label),
        )

    def origin(self, index: int) -> str:
        """What a person opens to see the row."""
        return self._origin(self._record(index))

    def column(self, name: str) -> NDArray[Any]:
        """One field of every record."""
        out = np.empty(len(self), RECORD[name])
        for start in range(0, len(self), RECORDS_AT_A_TIME):
            records = self._columns.read("records", start, min(start + RECORDS_AT_A_TIME, len(self)))
            out[start : start + len(records)] = records[name]
        return out

    def tally(self, rows: NDArray[np.int64], max_length: int | None = None) -> NDArray[np.int64]:
        """How many tokens have each mark [MARKS], over ascending `rows`, of each sequence its first `max_length`."""
        counts = np.zeros(MARKS, np.int64)
        for first, stop in _runs(rows):
            for at in range(first, stop, RECORDS_AT_A_TIME):
                records = self._columns.read("records", at, min(at + RECORDS_AT_A_TIME, stop))
                for marks in self._marks(records, max_length):
                    counts += np.bincount(marks, minlength=MARKS)
        return counts

    def _marks(self, records: NDArray[Any], max_length: int | None) -> Iterator[NDArray[np.uint8]]:
        """The marks of consecutive rows, some millions at a time."""
        starts, lengths = records["start"], records["length"]
        cuts = np.searchsorted(starts, np.arange(starts[0], starts[-1] + 1, TOKENS_AT_A_TIME))
        for a, b in zip(cuts, [*cuts[1:], len(records)], strict=True):
            if a == b:  # a row that is longer than all of this
                continue
            marks = self._columns.read("marks", int(starts[a]), int(starts[b - 1]) + int(lengths[b - 1]))
            if max_length is not None and int(records["longest"][a:b].max()) > max_length:
                shared, second = (np.repeat(records[name][a:b], lengths[a:b]) for name in ("shared", "second"))
                position = np.arange(len(marks)) - np.repeat(starts[a:b] - starts[a], lengths[a:b])
                marks = marks[np.where(position < second, position, position - second + shared) < max_length]
            yield marks

    def _record(self, index: int) -> Any:
        return self._columns.read("records", index, index + 1)[0]

    def _origin(self, record: Any) -> str:
        start = int(record["origin"])
        return (
            self._columns.read("origins", start, start + int(record["origin_length"]))
            .tobytes()
            .decode("utf-8", "replace")
        )


def _runs(rows: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Consecutive numbers as [first, stop)."""
    if not len(rows):
        return
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for part in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
        yield int(rows[part[0]]), int(rows[part[1] - 1]) + 1


class StoreWriter:
    """Takes examples in order and becomes an `ExampleStore`.

    With a folder the arrays are written there; without one they are kept in memory, and moved to a temporary folder
    that has no name any more once they outgrow it.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.temporary = False
        self._parts: dict[str, list[NDArray[Any]]] = {name: [] for name in TYPES}
        self._files: dict[str, BinaryIO] = {}
        self._about = About()
        self._origin_bytes = self._bytes = 0
        if folder is not None:
            self._open(folder)

    def add(self, examples: Sequence[Example], rows: Sequence[int], groups: Iterable[bytes]) -> None:
        """Append examples with their row numbers in the source, and the digests of their groups."""
        if not examples:
            return
        origins = [example.origin.encode("utf-8", "replace")[: 2**16 - 1] for example in examples]
        records = self._records(examples, origins)
        records["row"] = rows
        records["group"] = np.frombuffer(b"".join(groups), "<u8")
        ids = np.concatenate([example.ids for example in examples]).astype(np.int32, copy=False)
        largest = int(ids.max(initial=-1))
        if largest > self._about.largest_id:
            place = int(np.searchsorted(records["start"] - self._about.tokens, int(ids.argmax()), "right")) - 1
            self._about = replace(self._about, largest_id=largest, largest_id_origin=examples[place].origin)
        self._write("ids", ids)
        self._write("marks", np.concatenate([_marks_of(example) for example in examples]))
        self._write("origins", np.frombuffer(b"".join(origins), np.uint8))
        self._write("records", records)
        self._about = replace(self._about, rows=self._about.rows + len(examples), tokens=self._about.tokens + len(ids))
        self._origin_bytes += sum(map(len, origins))
        if not self._files and self._bytes > IN_MEMORY:
            self._spill()

    def close(self, **facts: Any) -> About:
        """End writing; `facts` are the fields of `About` that the caller knows."""
        self._about = replace(self._about, **facts)
        try:
            for file in self._files.values():
                file.close()
            if self.folder is not None:
                (self.folder / ABOUT).write_text(self._about.to_json(), encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error
        return self._about

    def store(self) -> ExampleStore:
        """What was written, after `close`."""
        if self.folder is None:
            arrays = {name: np.concatenate([np.empty(0, TYPES[name]), *p]) for name, p in self._parts.items()}
            return ExampleStore(InMemory(arrays), self._about)
        store = open_store(self.folder)
        if self.temporary:
            self.discard()
        return store

    def discard(self) -> None:
        """Remove what was written; a store that was opened from it goes on."""
        for file in self._files.values():
            with suppress(OSError):  # a full disk has been told of already
                file.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _records(self, examples: Sequence[Example], origins: Sequence[bytes]) -> NDArray[Any]:
        records = np.zeros(len(examples), RECORD)
        lengths = np.array([len(example.ids) for example in examples])
        sizes = np.array([len(origin) for origin in origins])
        trained = [np.flatnonzero(example.mask) for example in examples]
        firsts, lasts = ends(examples, trained)
        records["start"] = self._about.tokens + np.cumsum(lengths) - lengths
        records["origin"] = self._origin_bytes + np.cumsum(sizes) - sizes
        records["length"], records["origin_length"] = lengths, sizes
        records["trained"] = [len(t) for t in trained]
        records["first"], records["last"] = firsts, lasts
        records["shared"], records["second"], records["longest"], records["needed"] = forks(examples, firsts)
        records["label"] = [-1 if e.desirable is None else int(e.desirable) for e in examples]
        texts = [e.ids.tobytes() for e in examples]
        asked = [last_answer(example, at) for example, at in zip(examples, trained, strict=True)]
        prompts = [t[: 4 * n] if n > 1 else b"" for t, n in zip(texts, asked, strict=True)]
        named = [t if e.desirable is None else t + bytes([e.desirable]) for t, e in zip(texts, examples, strict=True)]
        records["digest"] = np.frombuffer(b"".join(map(digest, named)), "<u8")
        records["prompt"] = np.frombuffer(b"".join(digest(p) if p else bytes(8) for p in prompts), "<u8")
        records["found"] = [sum(map(kind_bit, example.found)) for example in examples]
        return records

    def _write(self, name: str, array: NDArray[Any]) -> None:
        self._bytes += array.nbytes
        if not self._files:
            self._parts[name].append(array)
            return
        try:
            self._files[name].write(np.ascontiguousarray(array).view(np.uint8).data)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> InputError:
        where = self.folder or Path(tempfile.gettempdir())
        return InputError(f"the tokens cannot be written ({error.strerror})", where=str(where), mend=MEND_FOLDER)

    def _open(self, folder: Path) -> None:
        self._files = {name: (folder / name).open("wb") for name in TYPES}

    def _spill(self) -> None:
        try:
            self.folder, self.temporary = Path(tempfile.mkdtemp(prefix="welltuned-")), True
            self._open(self.folder)
        except OSError as error:
            raise self._unwritable(error) from error
        for name, parts in self._parts.items():
            for part in parts:
                self._write(name, part)
            parts.clear()


def open_store(folder: Path) -> ExampleStore:
    """The store in a folder: read into memory where it is small.

    Raises:
        OSError, ValueError, KeyError, TypeError: the folder is not there, not whole, or not one of ours.
    """
    about = About.from_json((folder / ABOUT).read_text(encoding="utf-8"))
    files = InFiles(folder)
    sizes = {name: files.size(name) for name in TYPES}
    last = files.read("records", about.rows - 1, about.rows)[0] if about.rows else np.zeros(1, RECORD)[0]
    origins = int(last["origin"]) + int(last["origin_length"])
    if sizes != {"ids": about.tokens, "marks": about.tokens, "origins": origins, "records": about.rows}:
        raise ValueError("a file of the store is cut short")
    if sum(size * TYPES[name].itemsize for name, size in sizes.items()) > IN_MEMORY:
        return ExampleStore(files, about)
    return ExampleStore(InMemory({name: files.read(name, 0, size) for name, size in sizes.items()}), about)


def _marks_of(example: Example) -> NDArray[np.uint8]:
    """uint8 [n]; a renderer that was not asked whose tokens they are leaves them to the template."""
    trained = example.mask.astype(np.uint8)
    return trained if example.roles is None else trained | (example.roles.astype(np.uint8) << np.uint8(1))
