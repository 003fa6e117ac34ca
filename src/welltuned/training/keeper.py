"""Saves checkpoints while training goes on: the training thread copies the numbers, another one writes them."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from welltuned.errors import InputError, RunError
from welltuned.models.oom import is_out_of_memory
from welltuned.training import durable
from welltuned.training.checkpoint import CHECKPOINTS, Snapshot, rotate, write_checkpoint


@dataclass(slots=True)
class Cost:
    """Seconds that saving took: of the training thread, and of processor time in the thread that writes."""

    saves: int = 0
    training_thread: float = 0.0
    writing_thread: float = 0.0


class Keeper:
    """Keeps the last `keep` checkpoints of a run, and the best.

    A save that fails for want of room, rights or a sound disk leaves the older ones as they are, is told as soon as it
    is known, and training goes on: the next save tries again. Anything else that goes wrong in the writing thread is
    raised in the training thread.

    Args:
        before_writing: called in the writing thread first (metrics.jsonl must not be behind its checkpoint).
    """

    def __init__(self, run: Path, keep: int, before_writing: Callable[[], None]):
        self.run, self.keep = run, keep
        self.cost = Cost()
        self.saved: int | None = None  # the newest update that is safe
        self.failed: str | None = None  # what the last save died of
        self._before_writing = before_writing
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._writing = 0

    def save(self, take: Callable[[bool], Snapshot], *, wait: bool = False) -> tuple[str, ...]:
        """Begin to save, after the save before is done; sentences on what went wrong there, or with `wait` here.

        Args:
            take: makes the snapshot; asked for a copy, or without one for the live buffers, which are then written
                before this returns: so it is where memory has no room for a copy.
        """
        notes, started = list(self.join()), time.perf_counter()
        try:
            snapshot, copied = take(True), True
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            snapshot, copied = take(False), False
        self._writing = snapshot.position.step
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no room for another thread
            self._thread.run()
            return (*notes, *self._done())
        if wait or not copied:
            notes += self.join()
        self.cost.saves += 1
        self.cost.training_thread += time.perf_counter() - started
        return tuple(notes)

    def has(self, step: int) -> bool:
        """Whether the newest checkpoint is that of this update, and safe."""
        return self.saved == step and self.failed is None

    def written(self, snapshot: Snapshot, failed: str | None, seconds: float) -> tuple[str, ...]:
        """All ranks together wrote a checkpoint, or could not for this reason; sentences on that."""
        self.cost.training_thread += seconds
        self._writing, self._error = snapshot.position.step, None if failed is None else RunError(failed)
        self.cost.saves += 1
        if failed is None:
            with suppress(OSError):  # the next save tries again
                rotate(self.run, self.keep, snapshot.position.best, snapshot.run)
        return self._done()

    def resumed(self, step: int, best: int | None, run_id: str) -> None:
        """The run goes on from this checkpoint; what a kill kept from being removed is removed now."""
        self.saved = step
        with suppress(OSError):  # the next save tries again, and tells
            rotate(self.run, self.keep, best, run_id)

    def news(self) -> tuple[str, ...]:
        """What the writing thread has to say, if it is done; never waits."""
        return self.join() if self._thread is not None and not self._thread.is_alive() else ()

    def join(self) -> tuple[str, ...]:
        """Wait for the save under way; sentences on what went wrong."""
        if self._thread is None:
            return ()
        self._thread.join()
        return self._done()

    def _done(self) -> tuple[str, ...]:
        self._thread, error, self._error = None, self._error, None
        self.failed = None
        if error is None:
            self.saved = self._writing
            return ()
        if not isinstance(error, OSError | RunError) and not is_out_of_memory(error):
            raise error
        self.failed = _reason(error)
        safe = "no checkpoint is there yet" if self.saved is None else f"that of update {self.saved} is safe"
        return (f"the checkpoint of update {self._writing} could not be written ({self.failed}); {safe}",)

    def _write(self, snapshot: Snapshot) -> None:
        started = time.thread_time()
        try:
            self._before_writing()
            durable.sweep(self.run / CHECKPOINTS)
            write_checkpoint(self.run, snapshot)
            rotate(self.run, self.keep, snapshot.position.best, snapshot.run)
        except BaseException as error:
            self._error = error
        self.cost.writing_thread += time.thread_time() - started


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "no memory left" if is_out_of_memory(error) else str(error)


def require_disk(run: Path, checkpoint: int, final: int, keep: int) -> str | None:
    """Refuse a run whose result would not fit on the disk; a sentence where only some checkpoints would.

    Args:
        checkpoint, final: bytes of one checkpoint, and of what lies there at the end beside them.
    """
    folder = next(p for p in (run, *run.absolute().parents) if p.exists())
    free = durable.SYSTEM.free(folder)
    least, usual = checkpoint + final, checkpoint * (keep + 2) + final  # the best, and the one that is being written
    if free < least:
        what = f"the disk has {free / 1e9:.2f} GB free, and a checkpoint with the result takes {least / 1e9:.2f} GB"
        raise InputError(what, where=str(run), mend="make room there, or give another --out")
    if free < usual:
        return (
            f"the disk has {free / 1e9:.2f} GB free, and {keep} checkpoints, the best and one being written take "
            f"{usual / 1e9:.2f} GB: a lower save_total_limit would fit"
        )
    return None
