"""A Run read for its page: whole, half-written or interrupted, whatever of it is there."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from welltuned.advice.plan import Plan, plan_from_yaml
from welltuned.errors import InputError
from welltuned.report.arms import SearchRead, read_search
from welltuned.report.evaluations import Evaluated, read_evaluations
from welltuned.report.log import Line, Log
from welltuned.training.rundir import METRICS, PLAN, RECIPE, RUN, SAMPLES, SHOWN, STARTED, SWEEP

_NOTHING_SHOWN: Line = {"rows": [], "replies": [], "scores": None, "lengths": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRead:
    """A Run as its files tell it.

    Attributes:
        summary: run.json; None while the run is not finished.
        log: metrics.jsonl.
        shown: training rows as they were trained, and replies (training/shown.py); empty where there are none.
        samples: completions of a run that learns from rewards.
        started: started.json.
        search: what a search compared, where this is the Run of one.
        evaluations: what `welltuned eval` found of it, the newest first.
    """

    path: Path
    plan: Plan
    summary: Mapping[str, Any] | None
    log: Log
    shown: Mapping[str, Any]
    samples: Sequence[Line]
    started: Mapping[str, Any]
    recipe: str
    search: SearchRead | None
    evaluations: Sequence[Evaluated]

    @property
    def name(self) -> str:
        return self.path.resolve().name


def read_run_folder(path: Path, log: Log | None = None) -> RunRead:
    """Read a Run.

    Args:
        log: its metrics as far as they were read; they are followed from there.

    Raises:
        InputError: the folder holds no plan of a Run, or one that cannot be read.
    """
    plan_file = path / PLAN
    if not plan_file.is_file():
        raise InputError(f"there is no {PLAN}", where=str(path), mend="give the folder of a run")
    log = log or Log(path / METRICS)
    log.follow()
    plan = plan_from_yaml(_text(plan_file), str(plan_file))
    return RunRead(
        path=path,
        plan=plan,
        summary=_json(path / RUN),
        log=log,
        shown={**_NOTHING_SHOWN, **(_json(path / SHOWN) or {})},
        samples=_samples(path / SAMPLES),
        started=_json(path / STARTED) or {},
        recipe=_text(path / RECIPE),
        search=_search(path / SWEEP, log, plan.updates),
        evaluations=read_evaluations(path),
    )


def _search(path: Path, log: Log, updates: int) -> SearchRead | None:
    kept = _json(path)
    if kept is None:
        return None
    try:
        return read_search(kept, log, updates)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"it is no search that can be read ({error!r})", where=str(path)) from error


def _samples(path: Path) -> list[Line]:
    """The objects of samples.jsonl; what is no object yet is left."""
    found: list[Line] = []
    for text in _text(path).splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


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
