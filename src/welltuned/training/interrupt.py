"""Ctrl-C, SIGTERM and SIGHUP end a run between two updates, after a save. A second one ends it at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from welltuned.errors import WelltunedError

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__)


class Interrupted(WelltunedError):
    """The user or the system ended the run. The exit code is the shell's: 128 and the signal's number."""

    def __init__(self, number: int, text: str, *, quiet: bool = False):
        self.exit_code, self.quiet = 128 + number, quiet
        super().__init__(text)


class Asked:
    """Whether the run was asked to end, and by which signal."""

    number: int | None = None

    @property
    def name(self) -> str:
        return name_of(self.number or 0)


def name_of(number: int) -> str:
    """A signal as people call it."""
    found = signal.Signals(number)
    return "Ctrl-C" if found is signal.SIGINT else found.name


@contextmanager
def interruptible(*, quiet: bool = False) -> Iterator[Asked]:
    """Within the block the first signal is only noted. Elsewhere than in the main thread signals are left alone.

    Args:
        quiet: another process says that it was.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    # A signal that is ignored (nohup, a job in the background) stays so.
    before = {n: signal.getsignal(n) for n in SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)}

    def note(number: int, _: FrameType | None) -> None:
        if asked.number is not None:
            raise KeyboardInterrupt
        asked.number = number
        if not quiet:  # not by print: the signal may have come in the middle of one
            os.write(2, b"\nwelltuned: this update is finished and saved first; once more, and it ends at once\n")

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
