"""The Run on disk: one directory that holds what was asked, chosen, measured and learned.

recipe.yaml · plan.yaml · started.json · metrics.jsonl · checkpoints/ · adapter/ or model/ · run.json
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from welltuned.errors import InputError, RunError
from welltuned.training import durable
from welltuned.training.events import Compiled, Evaluated, Event, Finding, Note, Skipped, Updated
from welltuned.training.lock import LOCK, Lock

ADAPTER, MODEL, RUN, PLAN, RECIPE, METRICS = "adapter", "model", "run.json", "plan.yaml", "recipe.yaml", "metrics.jsonl"
SWEEP = "sweep.json"  # what a search was asked, and found
AVERAGE = "ema"  # the average of the weights, where the run keeps one
STARTED, SAMPLES = "started.json", "samples.jsonl"  # samples: some completions of every evaluation (grpo)
EVALUATIONS = "evaluations"  # what `welltuned eval` found, a numbered file each
SHOWN = "shown.json"  # rows as they are trained, and replies (shown.py)
_FOR_WATCHERS = frozenset(
    ("total_steps", "seconds_left", "evaluation_follows", "measures", "samples", "origins")
    + ("loss_of_example", "tokens_of_example")
)


class RunDir:
    """A run directory that this process alone writes to, until it is closed.

    Args:
        resumed: it holds an unfinished run that goes on; else it must be new or empty.

    Attributes:
        trouble: why the latest lines of metrics.jsonl are not on the disk yet, where that is so. They are kept and
            written with the next one that can be.

    Raises:
        InputError: the directory is not empty, cannot be made, or another process is at work on it.
    """

    def __init__(self, path: Path, *, resumed: bool = False):
        self.path = path
        self.trouble: str | None = None
        self._awaiting: dict[str, Any] | None = None  # an update whose evaluation is not done
        self._pending = b""
        if not resumed:
            require_free(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = Lock(path)
            try:
                if not resumed:
                    require_free(path)  # once more, now that nobody else can write here
                self._metrics = os.open(path / METRICS, os.O_WRONLY | os.O_CREAT, 0o666)
            except BaseException:
                self.lock.release()
                raise
        except OSError as error:
            raise InputError(f"the output directory cannot be written ({error.strerror})", where=str(path)) from error
        self._length = os.lseek(self._metrics, 0, os.SEEK_END)

    @property
    def lock_note(self) -> str | None:
        """A sentence where the file system has no locks."""
        return self.lock.note

    def write(self, name: str, text: str) -> None:
        """Write a file whole or not at all, so that it survives a power cut."""
        durable.replace_file(self.path / name, text)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self.write(name, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def record(self, event: Event) -> None:
        """Append to metrics.jsonl: one object an update, with the held-out loss where it was evaluated.

        Everything else, and the held-out loss before the first update, is an event object.
        """
        match event:
            case Updated():
                line = _flat(event)
                if event.evaluation_follows:
                    self._awaiting = line
                    return
            case Evaluated():
                line = {**(self._awaiting or {"event": "evaluation"}), **_flat(event)}
                self._awaiting = None
            case Skipped():
                line = {"event": "skipped", "step": event.step, "what": event.what, "rows": list(event.rows)}
            case Note():
                line = {"event": "note", "text": event.text}
            case Compiled():
                line = {"event": "compiled", **asdict(event), "sentence": event.sentence}
            case Finding():
                line = {"event": "finding", **event.to_json()}
        self._append(line)
        if isinstance(event, Evaluated) and event.samples:
            self._keep_samples(event)

    def record_line(self, line: Mapping[str, Any]) -> None:
        """Append an object that is no event of a single run."""
        self._append(dict(line))

    @property
    def metrics_bytes(self) -> int:
        """The length of metrics.jsonl once all that was recorded is in it."""
        return self._length + len(self._pending)

    def cut_metrics(self, length: int) -> int:
        """Forget what was recorded after `length` bytes; how many bytes are missing that should be there."""
        self._awaiting, self._pending = None, b""
        there = min(self._length, length)
        os.ftruncate(self._metrics, there)
        if there < length:  # a power cut took the end of it: keep whole lines
            text = (self.path / METRICS).read_bytes()
            there = text.rfind(b"\n") + 1
            os.ftruncate(self._metrics, there)
        self._length = os.lseek(self._metrics, there, os.SEEK_SET)
        return length - there

    def sync_metrics(self) -> None:
        """Make what was recorded durable; called from the thread that writes checkpoints."""
        durable.SYSTEM.fsync(self._metrics)

    def _keep_samples(self, event: Evaluated) -> None:
        if not event.samples:
            return
        try:
            with (self.path / SAMPLES).open("a", encoding="utf-8") as file:
                for sample in event.samples:
                    file.write(json.dumps(finite({"step": event.step, **sample}), ensure_ascii=False) + "\n")
        except OSError as error:
            self.trouble = error.strerror or str(error)

    def cut_samples(self, step: int) -> None:
        """Forget the samples of evaluations after `step`, which will be made again."""
        path = self.path / SAMPLES
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            durable.replace_file(path, "".join(line for line in lines if _step_of(line) <= step))

    def _append(self, line: dict[str, Any]) -> None:
        self._pending += json.dumps(finite(line), allow_nan=False).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        """Write what is pending. A disk that is full now must not end a run of hours: the lines wait."""
        try:
            while self._pending:
                written = durable.SYSTEM.write(self._metrics, memoryview(self._pending))
                self._pending, self._length = self._pending[written:], self._length + written
            self.trouble = None
        except OSError as error:
            self.trouble = error.strerror or str(error)

    def close(self) -> None:
        """Raises RunError where lines of metrics.jsonl are lost."""
        if self._awaiting is not None:
            self._append(self._awaiting)
        self._flush()
        os.close(self._metrics)
        self.lock.release()
        if self._pending:
            raise RunError(f"{self.path / METRICS}: its last lines could not be written ({self.trouble})")


def _step_of(line: str) -> float:
    """Of a line of samples.jsonl; one that was cut off belongs nowhere."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _flat(event: Updated | Evaluated) -> dict[str, Any]:
    """An event as a line of metrics.jsonl, without what only watchers need; its measures stand beside the rest."""
    line = {f.name: getattr(event, f.name) for f in fields(event) if f.name not in _FOR_WATCHERS}
    measures = dict(event.measures)
    if isinstance(event, Evaluated):  # they stand beside those of the update before, which have the same names
        measures = {f"eval_{name.removeprefix('eval_')}": value for name, value in measures.items()}
    return {**{name: value for name, value in line.items() if value is not None}, **measures}


def require_free(path: Path) -> None:
    """Refuse a directory that holds something or could not be made, before any work is done for it."""
    try:
        if path.is_dir() and any(not _of_no_run(inner) for inner in path.iterdir()):
            begun = (path / RECIPE).is_file() and not (path / RUN).exists()
            mend = f"give another --out, or go on with the run in it: welltuned resume {path}"
            raise InputError(
                "the output directory is not empty", where=str(path), mend=mend if begun else "give another --out"
            )
        nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    except OSError as error:
        raise InputError(f"the output directory cannot be read ({error.strerror})", where=str(path)) from error
    if not nearest.is_dir():
        what = "there is a file in the output directory's place"
        raise InputError(what, where=str(nearest), mend="give another --out")
    if not os.access(nearest, os.W_OK):
        raise InputError("the output directory cannot be written", where=str(path), mend="give another --out")


def _of_no_run(path: Path) -> bool:
    """What a run leaves that was killed before its recipe was written."""
    names = (LOCK, RECIPE + durable.BESIDE)
    return path.name in names or (path.name == METRICS and path.is_file() and not path.stat().st_size)


def finite(value: Any) -> Any:
    """The same with null for numbers that JSON has no word for (a standard error over one example is NaN)."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
    return value


@dataclass(frozen=True, slots=True)
class Started:
    """started.json: the run's id, the folder that relative paths are meant from, and what the run is of."""

    run: str
    directory: str
    identity: Mapping[str, Any]


def read_started(path: Path) -> Started:
    try:
        plain = json.loads((path / STARTED).read_text(encoding="utf-8"))
        return Started(plain["run"], plain["directory"], plain["identity"])
    except OSError as error:
        raise InputError(f"{STARTED} cannot be read ({error.strerror})", where=str(path)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{STARTED} is damaged ({error})", where=str(path)) from error


def is_finished(path: Path) -> bool:
    """Whether a run is complete: run.json is written last."""
    return (path / RUN).is_file()


def read_run(path: Path) -> dict[str, Any]:
    """run.json of a finished run."""
    try:
        run: dict[str, Any] = json.loads((path / RUN).read_text(encoding="utf-8"))
    except OSError as error:
        begun = (path / RECIPE).is_file()
        mend = f"finish it first: welltuned resume {path}" if begun else "give the directory of a finished run"
        raise InputError(f"there is no {RUN}", where=str(path), mend=mend) from error
    except ValueError as error:
        raise InputError(f"{RUN} is damaged ({error})", where=str(path)) from error
    if not isinstance(run, dict) or not run.keys() >= {"model", "tune", "chat_template"}:
        raise InputError(f"{RUN} is not what a run of welltuned writes", where=str(path))
    return run
