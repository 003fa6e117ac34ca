"""One file → its rows, one at a time, each with the place where a person finds it again.

Memory is bounded by a line, a CSV record or a part of a record batch; only `.json` is read whole. An error names the
file and the line also where it comes after a million good rows. No row is skipped except blank lines.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from welltuned.data import strict_json
from welltuned.data.files import BOM, READ_ERRORS, DataFile, FileKind, opened, reason
from welltuned.errors import InputError

if TYPE_CHECKING:
    import pyarrow

LARGEST_WHOLE = 2**31  # bytes of a file that is read as one value, unpacked: a small packed file can hold any number
LONGEST_LINE = 2**30  # bytes; what is longer is no line but a file without line ends
LONGEST_CSV_FIELD = 2**27  # characters; the csv module's own limit (131,072) is shorter than some documents
BATCH_BYTES = 2**23  # of a columnar file that become Python objects at a time
BATCH_ROWS = 1024
JSON_LINES = "each line must be one JSON object; a list over several lines belongs in a .json file"
LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Row:
    """One record as read, and where it was read: `train.jsonl:7`, `train.json[6]`, `train.parquet row 7`."""

    record: dict[str, Any]
    origin: str


Refuse = Callable[[InputError], None]


def raised(error: InputError) -> None:
    """The usual way with a bad row."""
    raise error


def read_file(file: DataFile, refuse: Refuse = raised) -> Iterator[Row]:
    """The file's rows. A text file without any is an InputError; a Parquet or Arrow shard may be empty.

    `refuse` is told of a bad line after which reading can go on, as it does when `refuse` returns.
    """
    match file.kind:
        case FileKind.JSONL:
            return _jsonl(file, refuse)
        case FileKind.JSON:
            return _json(file, refuse)
        case FileKind.CSV:
            return _csv(file, ",", refuse)
        case FileKind.TSV:
            return _csv(file, "\t", refuse)
        case FileKind.PARQUET:
            return _columnar(file, _parquet_batches)
        case FileKind.ARROW:
            return _columnar(file, _arrow_batches)


def _lines(file: DataFile) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line, its end included; a byte-order mark at the file's start is dropped."""
    number = 0
    with opened(file) as handle:
        try:
            for number, raw in enumerate(iter(partial(handle.readline, LONGEST_LINE + 1), b""), start=1):
                if len(raw) > LONGEST_LINE:
                    what = f"the line is longer than {LONGEST_LINE:,} bytes"
                    raise InputError(what, where=f"{file.name}:{number}", mend=JSON_LINES)
                yield number, _without_mark(raw, file.name) if number == 1 else raw
        except READ_ERRORS as error:
            where = f"{file.name}:{number + 1}"
            raise InputError(f"the file cannot be read from here on ({reason(error)})", where=where) from error


def _without_mark(data: bytes, name: str) -> bytes:
    if data[:2] in UTF16:
        raise InputError("the file is UTF-16", where=f"{name}:1", mend="save it as UTF-8")
    return data.removeprefix(BOM)


def _bad_utf8(error: UnicodeDecodeError, name: str, line: int = 1) -> InputError:
    """The sentence for bytes that began at `line`."""
    at = line + error.object.count(b"\n", 0, error.start)
    what = f"invalid UTF-8 (byte 0x{error.object[error.start]:02x})"
    return InputError(what, where=f"{name}:{at}", mend="save it as UTF-8")


def _null_bytes(where: str) -> InputError:
    what = "the line holds NUL bytes"
    return InputError(what, where=where, mend="save the file as UTF-8 text, or write it again: it may be damaged")


def _jsonl(file: DataFile, refuse: Refuse) -> Iterator[Row]:
    name, parse = file.name, strict_json.parse
    read = False
    for number, raw in _lines(file):
        try:
            text = raw.decode()
            if text.isspace() or not text:
                continue
            read, record = True, parse(text)
        except ValueError as error:
            refuse(_bad_line(error, raw, name, number))
            read = True
            continue
        if type(record) is dict:
            yield Row(record, f"{name}:{number}")
        else:
            refuse(_not_an_object(record, f"{name}:{number}"))
    if not read:
        raise InputError("the file has no rows, only blank lines", where=name)


def _bad_line(error: ValueError, raw: bytes, name: str, number: int) -> InputError:
    where = f"{name}:{number}"
    match error:
        case UnicodeDecodeError():
            return _bad_utf8(error, name, number)
        case strict_json.JsonFault():
            return InputError(error.what, where=where, mend=error.mend)
    if b"\0" in raw:
        return _null_bytes(where)
    what, mend = _malformed(error), JSON_LINES
    if number > 1 and not raw.endswith(b"\n"):
        mend = "this is the last line and it has no line end: the file may have been cut off"
    return InputError(what, where=where, mend=mend)


def _malformed(error: ValueError) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return f"malformed JSON ({error})"
    at = _fault(error)
    return f"malformed JSON at column {at - error.doc.rfind(chr(10), 0, at)} ({error.msg})"


def _fault(error: json.JSONDecodeError) -> int:
    """Where the parser stopped, or the end of the text if it looked for more behind it."""
    return min(error.pos, len(error.doc.rstrip()))


def _not_an_object(record: Any, where: str) -> InputError:
    found = {list: "a list", str: "a string", type(None): "null", bool: "a boolean"}.get(type(record), "a number")
    mend = 'write {"column": value, ...}' + ("; a file that is one list is called .json" if found == "a list" else "")
    return InputError(f"the row is {found}, not an object", where=where, mend=mend)


def _json(file: DataFile, refuse: Refuse) -> Iterator[Row]:
    """A list of objects, or an object that holds exactly one list; JSON Lines under a .json name are read as such."""
    if _is_lines(file):
        yield from _jsonl(file, refuse)
        return
    name = file.name
    text = _whole(file)
    start = strict_json.after_space(text, 0)
    index, prefix = -1, ""
    try:
        if text[start : start + 1] == "[":
            values = strict_json.items(text, start)
        else:
            prefix, found = _only_list(strict_json.parse(text), name)
            values = iter(found)
        for index, record in enumerate(values):
            if type(record) is not dict:
                raise _not_an_object(record, f"{name}{prefix}[{index}]")
            yield Row(record, f"{name}{prefix}[{index}]")
    except json.JSONDecodeError as error:
        where = f"{name}:{1 + text.count(chr(10), 0, _fault(error))}"
        raise (_null_bytes(where) if "\0" in text else InputError(_malformed(error), where=where)) from error
    except strict_json.JsonFault as error:
        where = f"{name}[{index + 1}]" if text[start : start + 1] == "[" else name
        raise InputError(error.what, where=where, mend=error.mend) from error
    if index < 0:
        raise InputError("the file has no rows, its list is empty", where=name)


def _is_lines(file: DataFile) -> bool:
    """Whether the first line is an object by itself and something follows it."""
    if not _starts_object(file):
        return False  # a list in one line may be longer than lines may be
    filled = ((number, raw) for number, raw in _lines(file) if raw.strip())
    _, first = next(filled, (0, b""))
    if next(filled, None) is None:
        return False
    try:
        strict_json.parse(first.decode())
    except strict_json.JsonFault:
        return True
    except ValueError:
        return False
    return True


def _starts_object(file: DataFile) -> bool:
    return _bytes(file, 64).removeprefix(BOM).lstrip().startswith(b"{")


def _bytes(file: DataFile, most: int = -1) -> bytes:
    with opened(file) as handle:
        try:
            return handle.read(most)
        except READ_ERRORS as error:
            raise InputError(f"the file cannot be read ({reason(error)})", where=file.name) from error


def _whole(file: DataFile) -> str:
    try:
        data = _bytes(file, LARGEST_WHOLE + 1)
        if len(data) > LARGEST_WHOLE:
            what = f"the file is one JSON value of more than {LARGEST_WHOLE:,} bytes"
            raise InputError(what, where=file.name, mend="write JSON Lines (.jsonl), which are read row by row")
        return _without_mark(data, file.name).decode()
    except UnicodeDecodeError as error:
        raise _bad_utf8(error, file.name) from error


def _only_list(value: Any, name: str) -> tuple[str, list[Any]]:
    if not isinstance(value, dict):
        raise InputError("the file is neither a list nor an object", where=name, mend="write [{...}, {...}]")
    lists = [(key, held) for key, held in value.items() if isinstance(held, list)]
    if len(lists) != 1:
        what = f"the object holds {len(lists)} lists" if lists else "the object holds no list"
        raise InputError(what, where=name, mend="the file must be a list of rows or an object with one such list")
    return f".{lists[0][0]}", lists[0][1]


def _csv(file: DataFile, delimiter: str, refuse: Refuse) -> Iterator[Row]:
    """A header line, then one row a record; the origin is the line on which a record begins (fields may span lines)."""
    name = file.name
    records = csv.reader(_csv_lines(file), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    read = False
    while True:
        line = records.line_num + 1
        try:
            fields = _next_record(records)
        except csv.Error as error:
            raise _bad_csv(error, f"{name}:{line}") from error
        if fields is None:
            break
        if header is None:
            header = fields
            _check_header(header, file, delimiter)
        elif fields and len(fields) != len(header):
            what = f"the row has {len(fields)} fields, and the header has {len(header)}"
            mend = "quote fields that hold the delimiter or a line end"
            refuse(InputError(what, where=f"{name}:{line}", mend=mend))
            read = True
        elif fields:
            read = True
            yield Row(dict(zip(header, fields, strict=True)), f"{name}:{line}")
    if not read:
        raise InputError("the file has a header and no rows", where=name)


def _csv_lines(file: DataFile) -> Iterator[str]:
    returns = False
    for number, raw in _lines(file):
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise _bad_utf8(error, file.name, number) from error
        if "\0" in text:
            raise _null_bytes(f"{file.name}:{number}")
        if number == 1:  # whether lines end in a carriage return alone, as on the first Macintoshes
            returns = "\r" in text.rstrip("\r\n")
        yield from LINE.findall(text) if returns else (text,)


def _next_record(records: Any) -> list[str] | None:
    """The next record, None at the end. The field limit is one for the whole process: it is put back each time."""
    limit = csv.field_size_limit(LONGEST_CSV_FIELD)
    try:
        return next(records, None)
    finally:
        csv.field_size_limit(limit)


def _bad_csv(error: csv.Error, where: str) -> InputError:
    if "unexpected end of data" in str(error) or "field larger" in str(error):
        what = f"malformed CSV (a quote that is opened in the record of this line is not closed: {error})"
        return InputError(what, where=where, mend='a quote within a quoted field is written twice: ""')
    return InputError(f"malformed CSV ({error})", where=where)


def _check_header(header: list[str], file: DataFile, delimiter: str) -> None:
    mend = "the first line must name the columns"
    twice = next((column for column in header if header.count(column) > 1), None)
    if not header or not all(column.strip() for column in header):
        raise InputError("a column has no name", where=f"{file.name}:1", mend=mend)
    if twice is not None:
        raise InputError(f"the column `{twice}` appears twice", where=f"{file.name}:1", mend=mend)
    other = next((mark for mark in (";", "\t", "|", ",") if mark != delimiter and mark in header[0]), None)
    if len(header) == 1 and other is not None:
        shown = "tabs" if other == "\t" else f"`{other}`"
        what = f"the header is one column, `{header[0][:80]}`: the columns seem to be separated by {shown}"
        mend = "call it .tsv" if other == "\t" else "call it .csv" if other == "," else "save it with commas"
        raise InputError(what.replace("\t", "\\t"), where=f"{file.name}:1", mend=mend)


Decode = Callable[[Any], Any]
Batches = Callable[[DataFile], Iterator["pyarrow.RecordBatch"]]


def _columnar(file: DataFile, batches: Batches) -> Iterator[Row]:
    try:
        import pyarrow
    except ImportError as error:
        what = f"{file.kind} needs the `pyarrow` package"
        raise InputError(what, where=file.name, mend="pip install pyarrow") from error
    number = 0
    stream = batches(file)
    while True:
        try:
            batch = next(stream, None)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            what = f"the file is not readable {file.kind} ({reason(error)})"
            where = f"{file.name} row {number + 1}" if number else file.name
            raise InputError(what, where=where) from error
        if batch is None:
            return
        for record in _records(batch, file.name, number):
            number += 1
            yield Row(record, f"{file.name} row {number}")


def _parquet_batches(file: DataFile) -> Iterator["pyarrow.RecordBatch"]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file.path, pre_buffer=False, buffer_size=2**20) as table:
        meta = table.metadata
        bytes_ = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
        yield from table.iter_batches(batch_size=_rows_at_a_time(bytes_, meta.num_rows))


def _arrow_batches(file: DataFile) -> Iterator["pyarrow.RecordBatch"]:
    import pyarrow

    with pyarrow.OSFile(str(file.path)) as handle:  # not mapped: pages of a map count as the process's memory
        if handle.read(6) == b"ARROW1":
            table = pyarrow.ipc.open_file(handle)
            yield from map(table.get_batch, range(table.num_record_batches))
        else:
            handle.seek(0)
            yield from pyarrow.ipc.open_stream(handle)


def _rows_at_a_time(size: int, rows: int) -> int:
    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // size if size else BATCH_ROWS))


def _records(batch: "pyarrow.RecordBatch", name: str, before: int) -> Iterator[dict[str, Any]]:
    """The batch's rows as dicts, a few at a time; `before` rows of the file came before it."""
    names = batch.schema.names
    if len(set(names)) != len(names):
        twice = next(column for column in names if names.count(column) > 1)
        raise InputError(f"the column `{twice}` appears twice", where=name)
    decoders = {field.name: read for field in batch.schema if (read := _decoder(field.type)) is not None}
    step = _rows_at_a_time(batch.nbytes, batch.num_rows)
    for start in range(0, batch.num_rows, step):
        part = batch.slice(start, step)
        try:
            records = _to_python(part, decoders)
        except ValueError as error:
            index, first = _first_bad(part, decoders, error)
            what = "invalid UTF-8" if isinstance(first, UnicodeDecodeError) else f"not readable ({reason(first)})"
            raise InputError(what, where=f"{name} row {before + start + index + 1}") from error
        yield from records


def _to_python(batch: "pyarrow.RecordBatch", decoders: dict[str, Decode]) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = batch.to_pylist()
    for column, decode in decoders.items():
        for record in records:
            record[column] = decode(record[column])
    return records


def _first_bad(batch: "pyarrow.RecordBatch", decoders: dict[str, Decode], found: ValueError) -> tuple[int, ValueError]:
    """Which row of a batch cannot be converted, and why: each is tried alone."""
    for index in range(batch.num_rows):
        try:
            _to_python(batch.slice(index, 1), decoders)
        except ValueError as error:
            return index, error
    return 0, found


def _decoder(kind: "pyarrow.DataType") -> Decode | None:
    """How values of a type that holds JSON text (as `datasets` stores mixed types) are read; None for other types."""
    import pyarrow

    if isinstance(kind, pyarrow.JsonType):
        return lambda value: None if value is None else strict_json.parse(value)
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        item = _decoder(kind.value_type)
        return item and (lambda values: None if values is None else [item(value) for value in values])
    if pyarrow.types.is_struct(kind):
        inner = {field.name: read for field in kind if (read := _decoder(field.type)) is not None}
        if inner:
            return lambda value: value and value | {key: read(value[key]) for key, read in inner.items()}
    return None
