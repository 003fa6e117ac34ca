"""The Run on disk: one directory that holds what was asked, chosen, measured and learned.

recipe.yaml · plan.yaml · metrics.jsonl · adapter/ or model/ · run.json
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from welltuned.errors import InputError
from welltuned.training.events import Evaluated, Event, Note, Updated

ADAPTER, MODEL, RUN, PLAN, RECIPE, METRICS = "adapter", "model", "run.json", "plan.yaml", "recipe.yaml", "metrics.jsonl"
_FOR_WATCHERS = ("total_steps", "seconds_left", "evaluation_follows", "measures")


class RunDir:
    """A new, empty run directory.

    Raises:
        InputError: the directory exists and is not empty, or cannot be made.
    """

    def __init__(self, path: Path):
        self.path = path
        self._awaiting: dict[str, Any] | None = None  # an update whose evaluation is not done
        require_free(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._metrics = (path / METRICS).open("x", encoding="utf-8")
        except OSError as error:
            raise InputError(f"the output directory cannot be written ({error.strerror})", where=str(path)) from error

    def write(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        beside = self.path / (name + ".tmp")
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, self.path / name)

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
            case Note():
                line = {"event": "note", "text": event.text}
        self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(finite(line), allow_nan=False) + "\n")
        self._metrics.flush()

    def close(self) -> None:
        if self._awaiting is not None:
            self._append(self._awaiting)
        self._metrics.close()


def _flat(event: Updated | Evaluated) -> dict[str, Any]:
    """An event as a line of metrics.jsonl, without what only watchers need; its measures stand beside the rest."""
    line = {f.name: getattr(event, f.name) for f in fields(event) if f.name not in _FOR_WATCHERS}
    return {**line, **event.measures}


def require_free(path: Path) -> None:
    """Refuse a directory that holds something or could not be made, before any work is done for it."""
    try:
        if path.is_dir() and any(path.iterdir()):
            raise InputError("the output directory is not empty", where=str(path), mend="give another --out")
        nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    except OSError as error:
        raise InputError(f"the output directory cannot be read ({error.strerror})", where=str(path)) from error
    if not nearest.is_dir():
        what = "there is a file in the output directory's place"
        raise InputError(what, where=str(nearest), mend="give another --out")
    if not os.access(nearest, os.W_OK):
        raise InputError("the output directory cannot be written", where=str(path), mend="give another --out")


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


def read_run(path: Path) -> dict[str, Any]:
    """run.json of a finished run."""
    try:
        run: dict[str, Any] = json.loads((path / RUN).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"there is no {RUN}", where=str(path), mend="give the directory of a finished run") from error
    except ValueError as error:
        raise InputError(f"{RUN} is damaged ({error})", where=str(path)) from error
    if not isinstance(run, dict) or not run.keys() >= {"model", "tune", "chat_template"}:
        raise InputError(f"{RUN} is not what a run of welltuned writes", where=str(path))
    return run
