"""A limit on what a stranger's template may take: processor time, and the length of what it writes."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from welltuned.errors import InputError

SECONDS = 30.0
"""Of processor time for one batch of rows; an ordinary template takes under a millisecond a row."""
LONGEST_TEXT = 2**28
"""Characters of one rendered row."""


@contextmanager
def limited(seconds: float | None = None) -> Iterator[None]:
    """Raise an InputError in the block after so much processor time of this process.

    By a signal, which only the main thread receives, and which Windows has not: elsewhere nothing is limited.
    """
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return

    seconds = SECONDS if seconds is None else seconds

    def stop(number: int, frame: FrameType | None) -> None:
        what = f"the chat template does not come to an end within {seconds:.0f} s"
        raise InputError(what, where="chat_template", mend="give another `chat_template`")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def require_short(text: str, origin: str) -> str:
    """The text, unless it is longer than any row could be."""
    if len(text) > LONGEST_TEXT:
        what = f"the chat template writes {len(text):,} characters for this row"
        raise InputError(what, where=origin, mend="give another `chat_template`")
    return text
