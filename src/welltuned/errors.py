"""What can go wrong, in one sentence each: what, where, how to mend it."""


class WelltunedError(Exception):
    """The check or run failed (exit code 1)."""

    exit_code = 1
    quiet = False  # whether another process says it


class InputError(WelltunedError):
    """The input is wrong (exit code 2): one sentence says what, where (file and line, or key), and how to mend it.

    >>> str(InputError("the row has no answer", where="train.jsonl:7", mend="add a non-empty assistant message"))
    'train.jsonl:7: the row has no answer; add a non-empty assistant message'
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, mend: str | None = None):
        self.what, self.where, self.mend = what, where, mend
        super().__init__((f"{where}: " if where else "") + what + (f"; {mend}" if mend else ""))


class RunError(WelltunedError):
    """A run could not go on, or its result did not pass verification."""
