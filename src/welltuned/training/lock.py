"""One process a Run: a lock that the kernel takes back when its holder dies, however it dies."""

import errno
import fcntl
import json
import os
import platform
from pathlib import Path

from welltuned.errors import InputError

LOCK = ".lock"
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class Lock:
    """Held from its making to `release`.

    `note` is a sentence where the file system has no locks.

    Raises:
        InputError: another process holds it.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self.note: str | None = None
        self._number = self._held(folder)
        os.ftruncate(self._number, 0)
        os.write(self._number, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())

    def _held(self, folder: Path) -> int:
        while True:
            number = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                who = _holder(number)
                os.close(number)
                mend = "wait for it, or end it"
                raise InputError(
                    f"another process{who} is at work on this run", where=str(folder), mend=mend
                ) from error
            except OSError as error:
                if error.errno not in _NOT_SUPPORTED:
                    os.close(number)
                    raise
                self.note = f"{folder} lies where files cannot be locked: nothing keeps a second run out"
                return number
            if _still_there(number, self.path):
                return number
            os.close(number)  # its last holder removed it between our opening and our locking

    def release(self) -> None:
        """Let others have the Run; the file goes too."""
        if _still_there(self._number, self.path):
            self.path.unlink()
        os.close(self._number)


def at_work(folder: Path) -> bool:
    """Whether a process of this machine is at work on a Run, for whoever only looks: nothing is locked or changed."""
    try:
        found = json.loads((folder / LOCK).read_bytes())
        pid, host = int(found["pid"]), found["host"]
        os.kill(pid, 0)
    except PermissionError:  # another user's process
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(host == platform.node())


def _still_there(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except FileNotFoundError:
        return False


def _holder(number: int) -> str:
    try:
        found = json.loads(os.pread(number, 4096, 0))
        return f" (number {int(found['pid'])} on {found['host']})"
    except (ValueError, KeyError, TypeError):
        return ""
