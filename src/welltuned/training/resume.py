"""Go on with a run that was ended by whatever: from its newest checkpoint that verifies, or from the start."""

import os
from collections.abc import Mapping
from contextlib import chdir
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from welltuned.advice.plan import Plan, plan_from_yaml
from welltuned.errors import InputError
from welltuned.facts.machine import Device
from welltuned.recipe import Recipe, Tune, load_recipe, recipe_to_dict
from welltuned.training import durable
from welltuned.training.bystander import run_files
from welltuned.training.checkpoint import CHECKPOINTS, Checkpoint, checkpoints, newest, set_aside
from welltuned.training.events import Observer, silent
from welltuned.training.identity import PROCESSES, differences, identity_of, versions
from welltuned.training.in_pieces import lies_in_pieces
from welltuned.training.prepare import Prepared, prepare
from welltuned.training.prepare_together import prepare_together, sharing_notes
from welltuned.training.ranks import ALONE, Ranks
from welltuned.training.result import RunResult
from welltuned.training.run import Course, begin, loaded, on_this_machine
from welltuned.training.rundir import (
    ADAPTER,
    AVERAGE,
    MODEL,
    PLAN,
    RECIPE,
    STARTED,
    RunDir,
    Started,
    is_finished,
    read_started,
)
from welltuned.training.snapshot import same_tensors
from welltuned.training.step import Trained
from welltuned.training.watch import is_divergence, monitor
from welltuned.training.watcher import MakeWatch


def resume(
    path: Path,
    observer: Observer = silent,
    *,
    accept_changes: bool = False,
    make_watch: MakeWatch = monitor,
    ranks: Ranks = ALONE,
) -> RunResult:
    """Finish an unfinished run. On a CPU with the same libraries the result is that of an undisturbed run, bit for bit.

    Args:
        accept_changes: go on although recipe, plan, data, base model or tokenizer are not what they were; a changed
            recipe is planned anew. A run that diverged then goes on from its best weights, or starts over.
        ranks: the processes that share the run from here on, as many as they may be. The first alone reads the Run.

    Raises:
        InputError: there is no run, it is finished, or something changed. And what `train` raises.
    """
    ranks.first(lambda: require_unfinished(path))
    path = path.resolve()
    with run_files(path, ranks, resumed=True) as directory:
        run = _Unfinished(directory, accept_changes, make_watch, ranks)
        with chdir(ranks.first(run.read)):
            prepared = prepare_together(lambda: prepare(run.left.recipe, planned=run.left.plan), ranks)
            ranks.first(lambda: run.compare(prepared))
            require_device(prepared.plan, path)
            with on_this_machine(prepared.plan, ranks):
                ready = loaded(prepared, ranks, observer)
                ranks.first(lambda: run.require_same_tensors(ready.engine.trained))
                notes, found = (*run.notes, *sharing_notes(prepared, ranks)), run.left.found
                return Course(prepared, ready, directory, observer, make_watch, notes, found).run()


class _Unfinished:
    """A Run that goes on, as the first rank finds it; on the others it is never read."""

    def __init__(self, directory: RunDir, accept_changes: bool, make_watch: MakeWatch, ranks: Ranks):
        self._directory, self._accept_changes, self._make_watch = directory, accept_changes, make_watch
        self._ranks = ranks
        self.left = LeftOver(None, None, None, None, ())  # type: ignore[arg-type]
        self.notes: tuple[str, ...] = ()

    def read(self) -> str:
        """Look what is there; the folder that its paths are meant from."""
        self.left = _left_over(self._directory.path, self._ranks)
        return place_of(self.left.started)

    def compare(self, prepared: Prepared) -> None:
        """Refuse what is not the run that it was, unless that is accepted."""
        left, path = self.left, self._directory.path
        now = identity_of(prepared)
        changed = differences(left.identity, now) if left.identity is not None else []
        if changed and not self._accept_changes:
            raise InputError(
                "; ".join(changed),
                where=str(path),
                mend="put it back as it was, or go on with what is there now: --accept-changes",
            )
        if changed and left.found is not None and _diverged(left.found, prepared.plan, self._make_watch):
            left = _before_divergence(path, left, left.found)
        if changed or left.started is None:
            begin(self._directory, prepared, now, left.started)
        self.left = left
        self.notes = (*left.notes, *_sentences(left.found, changed, prepared.plan))

    def require_same_tensors(self, trained: Trained) -> None:
        if self.left.found is not None:
            require_same_tensors(self.left.found, trained, self._directory.path)


def require_unfinished(path: Path) -> None:
    """Refuse what cannot be gone on with."""
    if not path.is_dir() or not (path / RECIPE).is_file():
        mend = "give the folder that `welltuned train --out` was given"
        raise InputError(f"there is no run here: {RECIPE} is missing", where=str(path), mend=mend)
    if is_finished(path):
        raise InputError("the run is finished", where=str(path), mend=f"use it: welltuned chat {path}")


@dataclass(frozen=True, slots=True)
class LeftOver:
    """What an unfinished run left: `started` and `plan` are None where it ended before they were written."""

    recipe: Recipe
    plan: Plan | None
    started: Started | None
    found: Checkpoint | None
    notes: tuple[str, ...]

    @property
    def identity(self) -> Mapping[str, Any] | None:
        if self.found is not None:
            return self.found.identity
        return None if self.started is None else self.started.identity


def _left_over(path: Path, ranks: Ranks) -> LeftOver:
    """Read what is there, and clear away what was being written or is written again at the end."""
    recipe = load_recipe(str(path / RECIPE))
    started = read_started(path) if (path / STARTED).is_file() else None
    durable.sweep(path)
    durable.sweep(path / CHECKPOINTS)
    for name in (ADAPTER, MODEL, AVERAGE):
        if (path / name).is_dir():
            durable.remove_folder(path / name)
    plan = None
    if started is not None:
        plan = plan_from_yaml((path / PLAN).read_text(encoding="utf-8"), where=str(path / PLAN))
        if recipe_to_dict(recipe) != recipe_to_dict(plan.recipe):
            plan = None  # the recipe was edited: planned anew, and compared
    each_its_own = plan is not None and plan.recipe.tune is Tune.FULL and lies_in_pieces(plan, ranks)
    found, notes = newest(path, started.run if started is not None else None, tensors=not each_its_own)
    return LeftOver(recipe, plan, started, found, notes)


def _diverged(found: Checkpoint, plan: Plan, make_watch: MakeWatch) -> bool:
    return is_divergence(found.position.ended, make_watch(plan, found.position.monitor).findings)


def _before_divergence(path: Path, left: LeftOver, found: Checkpoint) -> LeftOver:
    """The run at its best evaluation, or at its start. Later checkpoints are set aside: new ones take their names."""
    best = found.position.best or 0
    for step, folder in checkpoints(path):
        if step > best:
            set_aside(folder, f"the run diverged; it went on from update {best} at most")
    sound, notes = newest(path, found.run)
    place = "its start" if sound is None else f"update {sound.position.step:,}"
    place += ", the best on the held-out rows" if sound is not None and sound.position.step == best else ""
    return replace(left, found=sound, notes=(*left.notes, *notes, f"the run had diverged; it goes on from {place}"))


def place_of(started: Started | None) -> str:
    """The folder that the run's relative paths are meant from, if it is still there."""
    return started.directory if started is not None and os.path.isdir(started.directory) else os.getcwd()


def require_device(plan: Plan, path: Path) -> None:
    """A plan for a GPU is not silently carried out on a processor."""
    if plan.facts.machine.device is Device.CUDA and not torch.cuda.is_available():
        raise InputError("the run was planned for a GPU, and there is none here", where=str(path))


def require_same_tensors(found: Checkpoint, trained: Trained, path: Path) -> None:
    """A changed recipe may change rates and data, not what is trained."""
    if not same_tensors(found, trained):
        what = "the checkpoint holds other tensors than this recipe trains"
        raise InputError(what, where=str(path), mend="put r, target_modules, tune and model back as they were")


def _sentences(found: Checkpoint | None, changed: list[str], plan: Plan) -> list[str]:
    if found is None:
        return ["there is no checkpoint: the run starts over", *changed]
    said = [f"goes on after update {found.position.step:,} of {plan.updates:,}", *changed]
    now = versions()
    then, here = found.versions.get(PROCESSES, 1), now[PROCESSES]
    if then != here:
        said.append(f"the run was shared by {then} processes and is by {here}: it goes on, but not bit for bit")
    for name in (name for name in dict.fromkeys((*found.versions, *now)) if name != PROCESSES):
        if found.versions.get(name) != now.get(name):
            said.append(
                f"{name} was {found.versions.get(name)} and is {now.get(name)}: the run goes on, but not bit for bit"
            )
    return said
