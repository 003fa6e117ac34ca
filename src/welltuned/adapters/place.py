"""Results come whole or not at all: written beside their place, and moved there when they are done and proven."""

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from welltuned.errors import InputError

_SPARE = 1.05  # headers, tokenizer, card


@contextmanager
def written_whole(out: Path, needs: int = 0) -> Iterator[Path]:
    """A folder beside `out` to write into, which takes its place when the block ends well, and else is removed.

    Args:
        needs: bytes that will be written, so that a disk too small is told at once.

    Raises:
        InputError: `out` exists and is not an empty folder, it cannot be made, or the disk is full.
    """
    require_unused(out)
    parent = out.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if free < needs * _SPARE:
            raise _full(out, needs, free)
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=parent))
    except OSError as error:
        raise InputError(f"the output cannot be written ({error.strerror})", where=str(out)) from error
    try:
        yield beside
        beside.chmod(0o755)  # mkdtemp makes it for its owner alone
        if out.is_dir():
            out.rmdir()
        beside.replace(out)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if _is_full(error):
            raise _full(out, needs, shutil.disk_usage(parent).free) from error
        raise


def require_unused(out: Path) -> None:
    """Refuse a place that holds something, before any work is done for it."""
    if out.is_dir() and any(out.iterdir()):
        raise InputError("the output directory is not empty", where=str(out), mend="give another --out")
    if out.exists() and not out.is_dir():
        raise InputError("there is a file in the output's place", where=str(out), mend="give another --out")


def _is_full(error: BaseException) -> bool:
    """Whether this is a full disk: as Python says it, or as safetensors and torch put it into words."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left on device" in str(error)


def _full(out: Path, needs: int, free: int) -> InputError:
    wanted = f": about {needs / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free" if needs else ""
    return InputError(
        f"there is not enough disk space{wanted}", where=str(out), mend="make room, or give another --out"
    )


def folder_size(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
