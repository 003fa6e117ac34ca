"""Rows of a dataset, each with the place it came from: files, folders, patterns, a pipe, or a dataset of the hub.

A source is read lazily and as often as needed; what cannot be read is one sentence with file and line.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from welltuned.data import folders
from welltuned.data.files import DataFile, FileKind, data_file, kind_and_packing, nearest, reason, spooled
from welltuned.data.hub import open_hub
from welltuned.data.readers import Refuse, raised, read_file
from welltuned.data.readers import Row as Row
from welltuned.errors import InputError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
STDIN = "-"
LARGE_JSON = 2**29  # bytes from which it is said that a .json file is read whole


class Source(Protocol):
    """`name` is how sentences call it, `size` its bytes on disk (0 for the hub).

    `note` is a sentence on what was chosen, such as a split, and `skipped` names files that were not understood.
    """

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def note(self) -> str | None: ...
    @property
    def skipped(self) -> tuple[str, ...]: ...

    def rows(self, refuse: Refuse = raised) -> Iterator[Row]:
        """All rows, read as they are asked for; an InputError where there are none, or the file cannot be read on.

        `refuse` is told of a bad line after which it can; unless it raises (as by default) that line is left out.
        """
        ...

    def fingerprint(self) -> str:
        """Hex digest of the content; with `name` it tells everything that `rows` yields, origins included."""
        ...


@dataclass(frozen=True, slots=True)
class FileSource:
    """One file or several of one kind, read one after the other."""

    name: str
    files: tuple[DataFile, ...]
    note: str | None = None
    skipped: tuple[str, ...] = ()
    holder: object = None  # of a pipe's temporary file, which goes with it
    _digests: list[str] = field(default_factory=list, init=False, repr=False, compare=False)  # empty until asked for

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def rows(self, refuse: Refuse = raised) -> Iterator[Row]:
        empty = True

        def noted(error: InputError) -> None:
            nonlocal empty
            empty = False
            refuse(error)

        for file in self.files:
            file.require_unchanged()
            for row in read_file(file, noted):
                empty = False
                yield row
            file.require_unchanged()
        if empty:
            raise InputError("the dataset has no rows", where=self.name)

    def fingerprint(self) -> str:
        """blake2b of every file's bytes as they lie on disk, its kind and its name within the source.

        Read once, at about 1 GB/s.
        """
        if not self._digests:
            digest = hashlib.blake2b(digest_size=16)
            for file in self.files:
                within = file.name.removeprefix(self.name).lstrip("/")
                digest.update(f"{within}\0{file.kind}\0{file.size}\0".encode("utf-8", "surrogateescape"))
                digest.update(_digest(file))
            self._digests.append(digest.hexdigest())
        return self._digests[0]


def _digest(file: DataFile) -> bytes:
    try:
        with file.path.open("rb") as handle:
            digest = hashlib.file_digest(handle, hashlib.blake2b).digest()
    except OSError as error:
        raise InputError(f"the file cannot be read ({reason(error)})", where=file.name) from error
    file.require_unchanged()
    return digest


def read_rows(spec: str, subset: str | None = None, split: str | None = None) -> list[Row]:
    """All rows at once, for data that is known to be small."""
    return list(open_source(spec, subset, split).rows())


def open_source(spec: str, subset: str | None = None, split: str | None = None) -> Source:
    """The source that `spec` names: `-` (stdin), a file, a folder, a pattern, or the id of a hub dataset.

    No row is read yet; an InputError where nothing is found, where a name and the content of its file disagree, and
    where it is not clear which files are meant. `subset` of a folder is a folder in it.
    """
    if spec == STDIN:
        _refuse(subset, split, spec, "stdin")
        if sys.stdin.isatty():
            raise InputError("nothing is piped into stdin", where=spec, mend="welltuned ... --data - < train.jsonl")
        return _spooled_source(None, "stdin")
    path = Path(spec).expanduser()
    try:
        if path.is_dir():
            return _folder_source(path, spec, subset, split)
        if path.exists() and not path.is_file():  # a pipe, as `<(zcat a.jsonl.gz)` makes one
            _refuse(subset, split, spec, "a pipe")
            return _spooled_source(path, spec)
        if path.exists() or path.is_symlink():
            _refuse(subset, split, spec, "a file")
            file = data_file(path, spec)
            return FileSource(spec, (file,), _large_json((file,)))
    except OSError as error:
        raise InputError(f"the file cannot be read ({reason(error)})", where=_shown(spec)) from error
    if folders.is_pattern(spec):
        _refuse(subset, None, spec, "a pattern")
        return _found_source(folders.matching(spec, split), spec)
    near = nearest(path)
    if HUB_ID.fullmatch(spec) and kind_and_packing(path) is None:
        return open_hub(spec, subset, split, near if near and near.startswith("did you mean") else None)
    raise InputError("there is no such file", where=_shown(spec), mend=near)


def _shown(spec: str) -> str:
    """What was given in the place of a name, shortened if it is a whole text."""
    return spec if len(spec) < 200 and spec.isprintable() else ascii(spec[:80])


def _refuse(subset: str | None, split: str | None, spec: str, what: str) -> None:
    given = "subset" if subset else "split" if split else None
    if given is not None:
        raise InputError(
            f"`{given}` belongs to hub datasets and folders, and this is {what}", where=spec, mend="leave it out"
        )


def _spooled_source(path: Path | None, name: str) -> FileSource:
    if path is None:
        file, holder = spooled(sys.stdin.buffer, name)
    else:
        with path.open("rb") as pipe:
            file, holder = spooled(pipe, name)
    return FileSource(name, (file,), _large_json((file,)), holder=holder)


def _folder_source(path: Path, spec: str, subset: str | None, split: str | None) -> FileSource:
    name = spec
    if subset is not None:
        path, name = path / subset, f"{spec.rstrip('/')}/{subset}"
        if not path.is_dir():
            inner = sorted(p.name for p in path.parent.iterdir() if p.is_dir() and not p.name.startswith("."))
            mend = f"set `subset` to one of {', '.join(inner)}" if inner else "leave `subset` out"
            raise InputError(f"the folder has no subset `{subset}`", where=spec, mend=mend)
    return _found_source(folders.in_folder(path, name, split), name)


def _found_source(found: folders.Found, name: str) -> FileSource:
    notes = [note for note in (found.note, _large_json(found.files)) if note is not None]
    return FileSource(name, found.files, " ".join(notes) or None, found.skipped)


def _large_json(files: tuple[DataFile, ...]) -> str | None:
    large = [file for file in files if file.kind is FileKind.JSON and file.size > LARGE_JSON]
    if not large:
        return None
    return f"{large[0].name} ({large[0].size / 2**30:.1f} GiB) is read whole into memory; JSON Lines would be streamed."
