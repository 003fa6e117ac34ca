"""What ranks beside the first have in the place of a Run's files: they write nothing and say nothing."""

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from welltuned.training.checkpoint import Snapshot
from welltuned.training.events import Event
from welltuned.training.keeper import Cost, Keeper
from welltuned.training.ranks import Ranks
from welltuned.training.rundir import RunDir


class NoFiles(RunDir):
    """In the place of a RunDir; `path` is only for messages."""

    def __init__(self, path: Path):
        self.path, self.trouble = path, None

    @property
    def metrics_bytes(self) -> int:
        return 0

    @property
    def lock_note(self) -> str | None:
        return None

    def write(self, name: str, text: str) -> None: ...
    def record(self, event: Event) -> None: ...
    def record_line(self, line: Mapping[str, Any]) -> None: ...
    def cut_samples(self, step: int) -> None: ...
    def sync_metrics(self) -> None: ...
    def close(self) -> None: ...
    def cut_metrics(self, length: int) -> int:
        return 0


class NoKeeper(Keeper):
    """In the place of a Keeper."""

    def __init__(self) -> None:
        self.cost, self.saved, self.failed = Cost(), None, None

    def save(self, take: Callable[[bool], Snapshot], *, wait: bool = False) -> tuple[str, ...]:
        return ()

    def resumed(self, step: int, best: int | None, run_id: str) -> None: ...
    def news(self) -> tuple[str, ...]:
        return ()

    def join(self) -> tuple[str, ...]:
        return ()


def run_files(path: Path, ranks: Ranks, *, resumed: bool = False) -> "closing[RunDir]":
    """The Run's directory, to be closed: on the first rank, which alone writes; what it refuses is raised on all."""
    made: list[RunDir] = []
    ranks.first(lambda: made.append(RunDir(path, resumed=resumed)))
    return closing(made[0] if made else NoFiles(path))
