"""The command line, run in this process, and what it said."""

from dataclasses import dataclass

import pytest

from welltuned.cli.main import main


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def complaints(self):
        """The lines that an error ends a command with."""
        return [line for line in self.err.splitlines() if line.startswith("welltuned:")]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture
def welltuned(capfd):
    """A function that runs `welltuned ...` here; captures what libraries write past sys.stdout too."""

    def run(*arguments):
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        return Said(code, *capfd.readouterr())

    return run
