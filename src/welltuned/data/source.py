"""Rows of a dataset, each with the place it came from: JSONL, JSON, CSV/TSV, Parquet, or a dataset of the hub.

Every error names the file and the line, so that the reader can open it there. No row is skipped except blank lines.
"""

import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from welltuned.errors import InputError

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # these may also be compressed: .jsonl.gz
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
LONGEST_CSV_FIELD = 2**30  # characters; the csv module's own limit (131,072) is shorter than some documents
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """One record as read, and where it was read: `train.jsonl:7`, `train.json[6]`, `train.parquet row 7`."""

    record: dict[str, Any]
    origin: str


def read_rows(spec: str, subset: str | None = None, split: str | None = None) -> list[Row]:
    """All rows of a file, or of a hub dataset when `spec` has the form of an id (`openai/gsm8k`) and is no file."""
    path = Path(spec).expanduser()
    if path.is_dir():
        raise InputError("this is a folder", where=spec, mend=f"name one file in it ({', '.join(SUFFIXES)})")
    if path.exists():
        if subset or split:
            given = "subset" if subset else "split"
            raise InputError(f"`{given}` belongs to hub datasets, and this is a file", where=spec, mend="leave it out")
        rows = _read_file(path, spec)
    elif HUB_ID.fullmatch(spec) and _suffix(path) is None:
        rows = _read_hub(spec, subset, split or "train")
    else:
        raise InputError("there is no such file", where=spec, mend=_nearest(path))
    if not rows:
        raise InputError("the dataset has no rows", where=spec)
    return rows


def _suffix(path: Path) -> str | None:
    """`.jsonl` for `a.jsonl` and `a.jsonl.gz`; None when the format is not understood."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        return suffixes[-2] if len(suffixes) > 1 and suffixes[-2] in TEXT_SUFFIXES else None
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def _nearest(path: Path) -> str | None:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"did you mean {close[0]}?" if close else None


def _read_file(path: Path, name: str) -> list[Row]:
    suffix = _suffix(path)
    if suffix is None:
        raise InputError("the format is not known from the file's name", where=name, mend=f"use {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise InputError("the file is empty", where=name)
    match suffix:
        case ".parquet":
            return _read_parquet(path, name)
        case ".jsonl" | ".ndjson":
            with _opened(path, name) as handle:
                return _jsonl(handle, name)
        case ".json":
            return _json(_bytes(path, name), name)
        case _:
            return _csv(_bytes(path, name), name, "\t" if suffix == ".tsv" else ",")


@contextmanager
def _opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    try:
        compressed = path.suffix.lower() == ".gz"
        with cast(IO[bytes], gzip.open(path, "rb")) if compressed else path.open("rb") as handle:
            yield handle
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"the file cannot be read ({error})", where=name) from error


def _bytes(path: Path, name: str) -> bytes:
    with _opened(path, name) as handle:
        return handle.read()


def _decode(data: bytes, name: str, line: int = 1) -> str:
    """UTF-8 text of `data`, which begins at `line`; a byte-order mark at the file's start is dropped."""
    try:
        return (data.removeprefix(BOM) if line == 1 else data).decode("utf-8")
    except UnicodeDecodeError as error:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError("the file is UTF-16", where=f"{name}:{line}", mend="save it as UTF-8") from error
        at = line + error.object.count(b"\n", 0, error.start)
        byte = error.object[error.start]
        raise InputError(f"invalid UTF-8 (byte 0x{byte:02x})", where=f"{name}:{at}", mend="save it as UTF-8") from error


def _jsonl(lines: IO[bytes], name: str) -> list[Row]:
    rows = []
    for number, raw in enumerate(lines, start=1):
        text = _decode(raw, name, number)
        if not text.strip():
            continue
        where = f"{name}:{number}"
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            mend = "each line must be one JSON object; a list over several lines belongs in a .json file"
            raise InputError(f"malformed JSON at column {error.colno} ({error.msg})", where=where, mend=mend) from error
        except (RecursionError, ValueError) as error:
            raise InputError(f"malformed JSON ({error})", where=where) from error
        rows.append(_row(record, where))
    return rows


def _row(record: Any, where: str) -> Row:
    if not isinstance(record, dict):
        found = {list: "a list", str: "a string", type(None): "null", bool: "a boolean"}.get(type(record), "a number")
        raise InputError(f"the row is {found}, not an object", where=where, mend='write {"column": value, ...}')
    return Row(record, where)


def _json(data: bytes, name: str) -> list[Row]:
    """A list of objects, or an object that holds exactly one list; JSON Lines under a .json name are read as such."""
    text = _decode(data, name)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[:1] == "{":
            return _jsonl(io.BytesIO(data), name)
        where = f"{name}:{error.lineno}"
        raise InputError(f"malformed JSON at column {error.colno} ({error.msg})", where=where) from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"malformed JSON ({error})", where=name) from error
    key = ""
    if isinstance(value, dict):
        lists = [k for k, v in value.items() if isinstance(v, list)]
        if len(lists) != 1:
            what = f"the object holds {len(lists)} lists" if lists else "the object holds no list"
            raise InputError(what, where=name, mend="the file must be a list of rows or an object with one such list")
        key, value = f".{lists[0]}", value[lists[0]]
    if not isinstance(value, list):
        raise InputError("the file is neither a list nor an object", where=name, mend="write [{...}, {...}]")
    return [_row(record, f"{name}{key}[{index}]") for index, record in enumerate(value)]


def _csv(data: bytes, name: str, delimiter: str) -> list[Row]:
    """A header line, then one row a record; the origin is the line on which a record begins (fields may span lines)."""
    limit = csv.field_size_limit(LONGEST_CSV_FIELD)
    reader = csv.reader(io.StringIO(_decode(data, name), newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    line = 1
    try:
        header = next(reader, [])
        _check_header(header, name)
        line = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(header):
                what = f"the row has {len(fields)} fields, and the header has {len(header)}"
                raise InputError(what, where=f"{name}:{line}", mend="quote fields that hold the delimiter")
            if fields:
                rows.append(Row(dict(zip(header, fields, strict=True)), f"{name}:{line}"))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"malformed CSV ({error})", where=f"{name}:{line}") from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise InputError("the file has a header and no rows", where=name)
    return rows


def _check_header(header: list[str], name: str) -> None:
    twice = {column for column in header if header.count(column) > 1}
    if not header or "" in header or twice:
        what = f"the column `{twice.pop()}` appears twice" if twice and "" not in twice else "a column has no name"
        raise InputError(what, where=f"{name}:1", mend="the first line must name the columns")


def _read_parquet(path: Path, name: str) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet needs the `pyarrow` package", where=name, mend="pip install pyarrow") from error
    try:
        table = pyarrow.parquet.read_table(path)
        records = table.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"the file is not readable Parquet ({_first_line(error)})", where=name) from error
    return [Row(record, f"{name} row {number}") for number, record in enumerate(records, start=1)]


def _read_hub(spec: str, subset: str | None, split: str) -> list[Row]:
    """A hub dataset from the local cache or the network; whatever fails there is one sentence."""
    mend = "check the name, `subset` and `split`, and the network; or name a local file"
    try:
        import datasets

        dataset = datasets.load_dataset(spec, name=subset, split=split)
    except ImportError as error:
        raise InputError("hub datasets need the `datasets` package", where=spec, mend="pip install datasets") from error
    except (OSError, ValueError, RuntimeError) as error:  # not found, offline, gated, no such subset or split
        what = f"there is no such file, and no such hub dataset could be loaded ({_first_line(error)})"
        raise InputError(what, where=spec, mend=mend) from error
    place = f"{spec}/{subset}" if subset else spec
    return [Row(dict(record), f"{place}:{split} row {number}") for number, record in enumerate(dataset, start=1)]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
