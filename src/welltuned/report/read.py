"""A Run read for its page: whole, half-written or interrupted, whatever of it is there."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from welltuned.advice.plan import Plan, plan_from_yaml
from welltuned.errors import InputError
from welltuned.training.events import Finding
from welltuned.training.rundir import METRICS, PLAN, RECIPE, RUN, SAMPLES, SHOWN, STARTED

Line = Mapping[str, Any]
_NOTHING_SHOWN: Line = {"rows": [], "replies": [], "scores": None, "lengths": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRead:
    """A Run as its files tell it.

    Attributes:
        summary: run.json; None while the run is not finished.
        updates: the lines of metrics.jsonl with a `loss`, one for each update that was made.
        evaluations: those with an `eval_loss`, that before the first update included.
        damaged: lines of metrics.jsonl that are no JSON object: a last one that is being written does not count.
        shown: training rows as they were trained, and replies (training/shown.py); empty where there are none.
        samples: completions of a run that learns from rewards.
        started: started.json.
    """

    path: Path
    plan: Plan
    summary: Mapping[str, Any] | None
    updates: Sequence[Line]
    evaluations: Sequence[Line]
    findings: Sequence[Finding]
    skipped: Sequence[Line]
    notes: Sequence[str]
    damaged: int
    shown: Mapping[str, Any]
    samples: Sequence[Line]
    started: Mapping[str, Any]
    recipe: str

    @property
    def name(self) -> str:
        return self.path.resolve().name


def read_run_folder(path: Path) -> RunRead:
    """Read a Run.

    Raises:
        InputError: the folder holds no plan of a Run, or one that cannot be read.
    """
    plan_file = path / PLAN
    if not plan_file.is_file():
        raise InputError(f"there is no {PLAN}", where=str(path), mend="give the folder of a run")
    lines, damaged = _lines(path / METRICS)
    events = [line for line in lines if "event" in line]
    return RunRead(
        path=path,
        plan=plan_from_yaml(_text(plan_file), str(plan_file)),
        summary=_json(path / RUN),
        updates=[line for line in lines if "loss" in line and "event" not in line],
        evaluations=[line for line in lines if "eval_loss" in line],
        findings=list(_findings(events)),
        skipped=[line for line in events if line["event"] == "skipped"],
        notes=[str(line.get("text", "")) for line in events if line["event"] == "note"],
        damaged=damaged,
        shown={**_NOTHING_SHOWN, **(_json(path / SHOWN) or {})},
        samples=_lines(path / SAMPLES)[0],
        started=_json(path / STARTED) or {},
        recipe=_text(path / RECIPE),
    )


def _findings(events: Sequence[Line]) -> Iterator[Finding]:
    for line in events:
        if line["event"] == "finding":
            try:
                yield Finding.from_json(line)
            except (KeyError, TypeError, ValueError):  # another version's: its sentence is in the log all the same
                continue


def _lines(path: Path) -> tuple[list[Line], int]:
    """The objects of a file of JSON lines, and how many lines are none; an unfinished last line is still to come."""
    if not path.is_file():
        return [], 0
    found: list[Line] = []
    damaged = 0
    with path.open("rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                break
            try:
                line = json.loads(raw)
            except ValueError:
                line = None
            if isinstance(line, dict):
                found.append(line)
            else:
                damaged += 1
    return found, damaged


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none yet. What we write is whole or absent, so damage is an error."""
    if not path.is_file():
        return None
    try:
        value = json.loads(_text(path))
    except ValueError as error:
        raise InputError(f"it is damaged ({error})", where=str(path)) from error
    if not isinstance(value, dict):
        raise InputError("it is no JSON object", where=str(path))
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"it cannot be read ({error})", where=str(path)) from error
