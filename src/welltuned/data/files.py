"""One data file: what kind it is, how it is packed, whether its content is what its name says, and how it is opened."""

import bz2
import csv
import difflib
import gzip
import io
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, cast

from welltuned.data import strict_json
from welltuned.errors import InputError

HEAD = 65_536  # bytes that are looked at to recognise a content
BUFFER = 2**20
LONGEST_NAME = 64  # characters of a column's name, for text to be taken as CSV's header
BOM = b"\xef\xbb\xbf"
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what reading a packed file can raise


class FileKind(StrEnum):
    JSONL = "JSON Lines"
    JSON = "JSON"
    CSV = "CSV"
    TSV = "TSV"
    PARQUET = "Parquet"
    ARROW = "Arrow"


class Packing(StrEnum):
    NONE = "not compressed"
    GZIP = "gzip"
    BZIP2 = "bzip2"
    XZ = "xz"
    ZSTD = "Zstandard"


KINDS = {
    ".jsonl": FileKind.JSONL,
    ".ndjson": FileKind.JSONL,
    ".json": FileKind.JSON,
    ".csv": FileKind.CSV,
    ".tsv": FileKind.TSV,
    ".parquet": FileKind.PARQUET,
    ".arrow": FileKind.ARROW,
    ".feather": FileKind.ARROW,
}
PACKINGS = {".gz": Packing.GZIP, ".bz2": Packing.BZIP2, ".xz": Packing.XZ, ".zst": Packing.ZSTD}
COLUMNAR = frozenset({FileKind.PARQUET, FileKind.ARROW})  # compressed within; never packed once more
MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", Packing.GZIP),
    (b"BZh", Packing.BZIP2),
    (b"\xfd7zXZ\x00", Packing.XZ),
    (b"\x28\xb5\x2f\xfd", Packing.ZSTD),
    (b"PAR1", FileKind.PARQUET),
    (b"ARROW1", FileKind.ARROW),
    (b"\xff\xff\xff\xff", FileKind.ARROW),  # as a stream
    (b"PK\x03\x04", "a zip archive"),
    (b"%PDF", "PDF"),
    (b"SQLite format 3", "an SQLite database"),
)
SUFFIXES = ", ".join(KINDS)
MEND_SUFFIX = {
    ".txt": 'write each text as a line {"text": ...} of a .jsonl file',
    ".xlsx": "save the sheet as CSV",
    ".xls": "save the sheet as CSV",
    ".zip": "unpack it, and name the file or the folder",
    ".tar": "unpack it, and name the folder",
    ".tgz": "unpack it, and name the folder",
    ".parq": "call it .parquet",
    ".pq": "call it .parquet",
}


@dataclass(frozen=True, slots=True)
class DataFile:
    """`name` is how sentences and origins call it; `size` (bytes) and `changed` (ns) are those of when it was found."""

    path: Path
    name: str
    kind: FileKind
    packing: Packing
    size: int
    changed: int

    def require_unchanged(self) -> None:
        """Rows and fingerprint must be of one content, or a cache would keep the one under the other's name."""
        now = status(self.path, self.name)
        if (now.st_size, now.st_mtime_ns) != (self.size, self.changed):
            raise InputError(
                "the file changed while it was read", where=self.name, mend="run again when it is complete"
            )


def kind_and_packing(path: Path) -> tuple[FileKind, Packing] | None:
    """(JSON Lines, gzip) for `a.jsonl.gz`; None where the name does not tell a kind that is understood."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packing = PACKINGS.get(suffixes[-1], Packing.NONE) if suffixes else Packing.NONE
    if packing is not Packing.NONE:
        suffixes.pop()
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    return None if kind is None or (kind in COLUMNAR and packing is not Packing.NONE) else (kind, packing)


def status(path: Path, name: str) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError as error:
        if path.is_symlink():
            raise InputError(f"the link leads to {path.readlink()}, which does not exist", where=name) from error
        raise InputError("there is no such file", where=name, mend=nearest(path)) from error
    except OSError as error:
        raise InputError(f"the file cannot be read ({reason(error)})", where=name) from error


def nearest(path: Path) -> str | None:
    """A sentence that names the file most like `path` in its folder."""
    try:
        names = [p.name for p in path.parent.iterdir()]
    except OSError:
        return f"the folder {path.parent} does not exist either"
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {close[0]}?" if close else None


def reason(error: BaseException) -> str:
    """Why reading failed, in lower case and on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def data_file(path: Path, name: str) -> DataFile:
    """The file, recognised by its name and checked against its first bytes."""
    found = status(path, name)
    known = kind_and_packing(path)
    if known is None:
        mend = MEND_SUFFIX.get(path.suffix.lower()) or _mend_name(path, name)
        raise InputError("the format is not known from the file's name", where=name, mend=mend)
    if found.st_size == 0:
        raise InputError("the file is empty", where=name)
    file = DataFile(path, name, *known, found.st_size, found.st_mtime_ns)
    _check_magic(file)
    return file


def _mend_name(path: Path, name: str) -> str:
    head = _head(path, name)
    packing = next((suffix for suffix, packing in PACKINGS.items() if magic(head) == packing), "")
    kind = None if packing else content_kind(head)
    suffix = next((suffix for suffix, known in KINDS.items() if known is kind), "")
    like = f"its content looks like {kind}: call it {path.name}{suffix}" if kind else ""
    return like or f"use {SUFFIXES}, and of the text ones also {', '.join(PACKINGS)}"


def _head(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as handle:
            return handle.read(HEAD)
    except OSError as error:
        raise InputError(f"the file cannot be read ({reason(error)})", where=name) from error


def magic(head: bytes) -> str | None:
    """What the first bytes say: a Packing, a columnar FileKind, or the name of something that holds no rows."""
    return next((found for mark, found in MAGIC if head.startswith(mark)), None)


def _check_magic(file: DataFile) -> None:
    head = _head(file.path, file.name)
    found = magic(head)
    said = file.packing if file.packing is not Packing.NONE else file.kind if file.kind in COLUMNAR else None
    if found == said or (said is FileKind.ARROW and found is None):  # old Arrow streams begin with a length
        return
    if said is None:
        packing = next((suffix for suffix, packing in PACKINGS.items() if packing == found), None)
        mend = f"call it {file.path.name}{packing}" if packing else None
        mend = mend or ("unpack it first" if found == "a zip archive" else f"give a file of {file.kind}")
        raise InputError(f"the file's name says {file.kind}, and its content is {found}", where=file.name, mend=mend)
    kind = found or content_kind(head)
    what = f"the file cannot be read: its name says {said}, and its content is {kind or 'not'}"
    mend = f"call it by the suffix of {kind}" if kind in list(FileKind) else "write it again, or fetch it again"
    raise InputError(what, where=file.name, mend=mend)


def content_kind(head: bytes) -> FileKind | None:
    """The kind that the first bytes of an unpacked content show; CSV only where two lines agree on it."""
    known = magic(head)
    if known is not None:
        return FileKind(known) if known in COLUMNAR else None
    text = head.removeprefix(BOM).decode("utf-8", errors="replace").lstrip()
    match text[:1]:
        case "[":
            return FileKind.JSON
        case "{":
            return FileKind.JSONL if _one_line_object(text, cut=len(head) == HEAD) else FileKind.JSON
    fits = [
        kind for kind, delimiter in ((FileKind.CSV, ","), (FileKind.TSV, "\t")) if _looks_separated(text, delimiter)
    ]
    return fits[0] if len(fits) == 1 else None


def _one_line_object(text: str, cut: bool) -> bool:
    """Whether the first line is an object by itself; one longer than what was read is a row, not an indented object."""
    line, end, _ = text.partition("\n")
    if not end and cut:
        return True
    try:
        strict_json.parse(line)
    except strict_json.JsonFault:
        return True  # a whole object with a fault that the reader names
    except ValueError:
        return False
    return True


def _looks_separated(text: str, delimiter: str) -> bool:
    records = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header, first = next(records, []), next(records, [])
    except csv.Error:
        return False
    names = {name.strip() for name in header}
    short = all(0 < len(name) <= LONGEST_NAME for name in names)
    return len(header) > 1 and len(names) == len(header) == len(first) and short


def spooled(stream: IO[bytes], name: str) -> tuple[DataFile, object]:
    """What a pipe brings, as a temporary file that can be read twice, and the holder whose end deletes the file."""
    holder = tempfile.NamedTemporaryFile(prefix="welltuned-")  # noqa: SIM115 (lives as long as its source)
    try:
        shutil.copyfileobj(stream, holder, BUFFER)
        holder.flush()
    except OSError as error:
        raise InputError(f"the input cannot be read ({reason(error)})", where=name) from error
    path = Path(holder.name)
    found = path.stat()
    if found.st_size == 0:
        raise InputError("the input is empty", where=name, mend="a pipe can be read only once")
    said = magic(_head(path, name))
    packing = Packing(said) if said in list(Packing) else Packing.NONE
    file = DataFile(path, name, FileKind.JSONL, packing, found.st_size, found.st_mtime_ns)
    with opened(file) as handle:
        kind = content_kind(_read_head(handle, name))
    if kind is None or (kind in COLUMNAR and packing is not Packing.NONE):
        mend = "give JSON Lines, a JSON list, CSV with a header, Parquet or Arrow"
        raise InputError("the input's format is not recognised", where=name, mend=mend)
    return DataFile(path, name, kind, packing, found.st_size, found.st_mtime_ns), holder


def _read_head(handle: IO[bytes], name: str) -> bytes:
    try:
        return handle.read(HEAD)
    except READ_ERRORS as error:
        raise InputError(f"the input cannot be read ({reason(error)})", where=name) from error


@contextmanager
def opened(file: DataFile) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked; what goes wrong in reading them is the reader's to catch (READ_ERRORS)."""
    try:
        handle = _open(file)
    except READ_ERRORS as error:
        raise InputError(f"the file cannot be read ({reason(error)})", where=file.name) from error
    with handle:
        yield handle


def _open(file: DataFile) -> IO[bytes]:
    match file.packing:
        case Packing.NONE:
            return file.path.open("rb", buffering=BUFFER)
        case Packing.GZIP:
            return cast(IO[bytes], gzip.open(file.path, "rb"))
        case Packing.BZIP2:
            return bz2.open(file.path, "rb")
        case Packing.XZ:
            return lzma.open(file.path, "rb")
        case Packing.ZSTD:
            try:
                import pyarrow
            except ImportError as error:
                mend = "pip install pyarrow, or unpack the file"
                raise InputError("Zstandard needs the `pyarrow` package", where=file.name, mend=mend) from error
            return io.BufferedReader(pyarrow.input_stream(str(file.path), compression="zstd"))
