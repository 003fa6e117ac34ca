"""The Run on disk: one directory that holds what was asked, chosen, measured and learned.

    recipe.yaml · plan.yaml · metrics.jsonl · adapter/ or model/ · run.json
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from welltuned.errors import InputError
from welltuned.training.events import Evaluated, Event, Note, Updated

ADAPTER, MODEL, RUN, PLAN, RECIPE, METRICS = "adapter", "model", "run.json", "plan.yaml", "recipe.yaml", "metrics.jsonl"


class RunDir:
    """A new, empty run directory.

    Raises:
        InputError: the directory exists and is not empty, or cannot be made.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError("the output directory is not empty", where=str(path), mend="give another --out")
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
        self.write(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def record(self, event: Event) -> None:
        """Append to metrics.jsonl: one object an update or evaluation; a note is an event object."""
        match event:
            case Updated():
                line = {k: v for k, v in asdict(event).items() if k not in ("total_steps", "seconds_left")}
            case Evaluated():
                line = asdict(event)
            case Note():
                line = {"event": "note", "text": event.text}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    def close(self) -> None:
        self._metrics.close()


def read_run(path: Path) -> dict[str, Any]:
    """run.json of a finished run."""
    try:
        run: dict[str, Any] = json.loads((path / RUN).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no {RUN}", where=str(path), mend="give the directory of a finished run") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{RUN} is damaged ({error})", where=str(path)) from error
    return run
