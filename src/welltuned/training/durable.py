"""Files that survive a kill and a power cut: written beside, fsynced, and only then given their name.

Every system call of a save goes through `SYSTEM`, so that a test can fail or kill at each of them.
"""

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CHUNK = 4 * 2**20  # bytes of one write
BESIDE, GOING = ".tmp", ".old"  # endings of what is not whole yet, and of what is being removed


class System:
    """The system calls that a save consists of."""

    def open(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def write(self, number: int, data: memoryview) -> int:
        return os.write(number, data)

    def fsync(self, number: int) -> None:
        if sys.platform == "darwin":  # there fsync leaves the data in the drive's own cache
            import fcntl

            fcntl.fcntl(number, fcntl.F_FULLFSYNC)
        else:
            os.fsync(number)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def make_folder(self, path: Path) -> None:
        os.mkdir(path)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        os.rmdir(path)

    def free(self, path: Path) -> int:
        """Bytes that this user may still write there."""
        return shutil.disk_usage(path).free


SYSTEM = System()
Chunks = Iterable[bytes | memoryview]


@dataclass(frozen=True, slots=True)
class Written:
    size: int
    sha256: str


def write_file(path: Path, chunks: Chunks) -> Written:
    """Write and fsync one file; its name is not durable before its folder is fsynced."""
    digest, size, number = hashlib.sha256(), 0, SYSTEM.open(path)
    try:
        for chunk in chunks:
            digest.update(chunk)
            rest = memoryview(chunk).cast("B")
            size += len(rest)
            while len(rest):
                rest = rest[SYSTEM.write(number, rest[:CHUNK]) :]
        SYSTEM.fsync(number)
    finally:
        os.close(number)
    return Written(size, digest.hexdigest())


def replace_file(path: Path, text: str) -> None:
    """Give a file this content, whole or not at all."""
    beside = path.with_name(path.name + BESIDE)
    write_file(beside, [text.encode("utf-8")])
    SYSTEM.replace(beside, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    number = os.open(path, os.O_RDONLY)
    try:
        SYSTEM.fsync(number)
    finally:
        os.close(number)


def publish_folder(beside: Path, target: Path) -> None:
    """Give a folder, whose files are fsynced, its name."""
    sync_folder(beside)
    SYSTEM.rename(beside, target)
    sync_folder(target.parent)


def settle_folder(beside: Path, target: Path) -> None:
    """The same for files that someone else wrote: each is fsynced first. What lay at `target` is replaced."""
    for path in sorted(beside.rglob("*")):
        number = os.open(path, os.O_RDONLY)
        try:
            SYSTEM.fsync(number)
        finally:
            os.close(number)
    if target.exists():
        remove_folder(target)
    publish_folder(beside, target)


def remove_folder(path: Path) -> None:
    """Remove a folder: renamed first, so that a half removed one is never taken for a whole one."""
    going = path
    if not path.name.endswith((BESIDE, GOING)):
        going = path.with_name(path.name + GOING)
        if going.exists():
            _remove_tree(going)
        SYSTEM.rename(path, going)
    _remove_tree(going)


def _remove_tree(path: Path) -> None:
    for inner in sorted(path.iterdir()):
        if inner.is_dir() and not inner.is_symlink():
            _remove_tree(inner)
        else:
            SYSTEM.unlink(inner)
    SYSTEM.remove_folder(path)


def sweep(folder: Path) -> None:
    """Remove what an interrupted save or removal left behind."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.endswith((BESIDE, GOING)):
            if path.is_dir() and not path.is_symlink():
                _remove_tree(path)
            else:
                SYSTEM.unlink(path)


def read_chunks(path: Path) -> Iterator[bytes]:
    """A file's bytes as they are on the disk: on Linux the kernel's copy of them is dropped first."""
    with path.open("rb") as file:
        if sys.platform == "linux":
            with suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(CHUNK):
            yield chunk


def checksum(path: Path) -> Written:
    """Size and sha256 of what lies on the disk."""
    digest, size = hashlib.sha256(), 0
    for chunk in read_chunks(path):
        digest.update(chunk)
        size += len(chunk)
    return Written(size, digest.hexdigest())


def require_room(folder: Path, needed: int) -> None:
    """Raise the OSError of a full disk, before anything is written, where `needed` bytes have no room."""
    free = SYSTEM.free(folder)
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB free", str(folder))
