"""A search from question to Run in this process, and on after it was ended."""

from collections.abc import Iterable, Mapping
from contextlib import chdir, closing, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from welltuned.advice.plan import Plan, require_memory
from welltuned.data.render import Example
from welltuned.errors import InputError
from welltuned.facts.machine import require_one_process
from welltuned.models.lora import AdapterBank
from welltuned.models.packed import packed_model
from welltuned.recipe import Method
from welltuned.search.applied import RATE, told
from welltuned.search.arms import Arm, Question, arm_of
from welltuned.search.asked import Asked, is_sweep, read_asked, write_asked
from welltuned.search.board import Rules, shares_of
from welltuned.search.events import SearchObserver, unheard
from welltuned.search.forecast import forecast, require_time
from welltuned.search.items import Items, PairItems, SupervisedItems
from welltuned.search.loop import Search, Setting
from welltuned.search.result import SweepResult, course_of, verified, write_result
from welltuned.search.sampler import OptunaSampler, largest_rank, starting
from welltuned.training import durable
from welltuned.training.checkpoint import CHECKPOINTS, Checkpoint, newest
from welltuned.training.events import Note
from welltuned.training.identity import differences, identity_of, versions
from welltuned.training.interrupt import interruptible
from welltuned.training.keeper import Keeper, require_disk
from welltuned.training.preference import preference_objective, rows_used
from welltuned.training.preference_step import Pairwise
from welltuned.training.prepare import Prepared, prepare
from welltuned.training.process import return_freed_memory
from welltuned.training.result import disk_errors
from welltuned.training.resume import place_of, require_device
from welltuned.training.run import Ready, begin, make_ready, on_this_machine
from welltuned.training.rundir import ADAPTER, STARTED, RunDir, is_finished, read_started, require_free
from welltuned.training.snapshot import Origin
from welltuned.training.trackers import require_trackers

__all__ = ["SweepResult", "is_sweep", "resume_sweep", "sweep"]
EXTENSION = 1  # arms that a search over rates usually adds to those of the start


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A search before its first update: its arms, who proposes more, and what is to be said first."""

    asked: Asked
    prepared: Prepared
    arms: tuple[Arm, ...]
    sampler: OptunaSampler | None
    said: tuple[str, ...]

    @property
    def rules(self) -> Rules:
        question = self.asked.question
        return Rules(
            advised=advised_rates(self.prepared.plan, self.arms),
            rates=question.searches_rate and self.sampler is None,
            grid=self.asked.grid,
            seconds=None if question.minutes is None else question.minutes * 60,
            sampler=self.sampler,
        )

    @property
    def most_arms(self) -> int:
        return len(self.arms) if self.sampler is None else self.sampler.trials


def begun(asked: Asked, prepared: Prepared) -> Begun:
    """The arms of a question, and what the search does otherwise than a run.

    Raises:
        InputError: what is asked cannot be searched.
    """
    question = asked.question
    arms, sampler = starting(prepared.plan, question)
    values = {name for name, given in question.over if given or name != RATE} | {r.name for r in question.ranges}
    centred = question.searches_rate and RATE not in values and sampler is None
    said = told(prepared.plan, sorted(values), centred)
    return Begun(asked=asked, prepared=prepared, arms=arms, sampler=sampler, said=said)


def sweep(
    prepared: Prepared,
    question: Question,
    out: Path,
    observer: SearchObserver = unheard,
    *,
    grid: bool = False,
    ray: str | None = None,
    workers: int | None = None,
) -> SweepResult:
    """Train many adapters at once, end those that cannot win, and write the winner's Run to `out`.

    Args:
        grid: train every arm to its end, as a measurement of what the search would have found.
        ray: spread the arms over a cluster: its address, or `local`; None for this process alone.
        workers: of the cluster; None for one a GPU, or one a machine.

    Raises:
        InputError: what is asked cannot be searched, or does not fit into memory, onto the disk, into the time given.
        RunError: every arm diverged, or the result could not be written. Interrupted: a signal ended it, after a save.
    """
    require_one_process("a sweep")
    require_free(out)
    if workers is not None and ray is None:
        raise InputError("belongs to --ray", where="--workers", mend="add --ray, or leave it out")
    search = begun(Asked(question, prepared.recipe, prepared.plan, grid, ray, workers), prepared)
    plan, rules = prepared.plan, search.rules
    require_memory(plan)
    require_trackers(prepared.recipe)
    extra = 0 if grid or not rules.rates else EXTENSION
    trials = None if search.sampler is None else search.sampler.trials
    shares = shares_of(arm.plan.updates for arm in search.arms)
    time = forecast(plan, search.arms, shares, more=extra, trials=trials)
    require_time(time, rules.seconds, plan)
    for text in (time.sentence(), *search.said):
        observer(Note(text))
    if ray is not None:
        from welltuned.search.cluster import sweep_on_cluster

        return sweep_on_cluster(search, out, observer)
    require_room(plan, search.most_arms)
    with on_this_machine(plan):
        ready = ready_for(search)
        with closing(RunDir(out)) as directory, disk_errors(out):
            write_asked(directory, search.asked)
            begin(directory, prepared, identity_of(prepared))
            return _course(search, ready, directory, observer, None, ())


def resume_sweep(path: Path, observer: SearchObserver = unheard, *, accept_changes: bool = False) -> SweepResult:
    """Finish a search that was ended by whatever, from its newest sound checkpoint or from the start.

    Raises:
        InputError: it is finished, or something changed since. And what `sweep` raises.
    """
    require_one_process("a sweep")
    if is_finished(path):
        raise InputError("the search is finished", where=str(path), mend=f"use it: welltuned chat {path}")
    path = path.resolve()
    with closing(RunDir(path, resumed=True)) as directory:
        asked = read_asked(path)
        started = read_started(path) if (path / STARTED).is_file() else None
        durable.sweep(path)
        durable.sweep(path / CHECKPOINTS)
        if (path / ADAPTER).is_dir():
            durable.remove_folder(path / ADAPTER)
        found, notes = newest(path, started.run if started is not None else None)
        with chdir(place_of(started)):
            prepared = prepare(asked.recipe, planned=asked.plan)
            now = identity_of(prepared)
            then = found.identity if found is not None else None if started is None else started.identity
            changed = differences(then, now) if then is not None else []
            if changed and not accept_changes:
                mend = "put it back as it was, or go on with what is there now: --accept-changes"
                raise InputError("; ".join(changed), where=str(path), mend=mend)
            if changed or started is None:
                begin(directory, prepared, now, started)
            search = begun(asked, prepared)
            if asked.ray is not None:
                from welltuned.search.cluster import go_on

                return go_on(search, directory, observer, tuple(changed))
            require_device(prepared.plan, path)
            with on_this_machine(prepared.plan):
                ready = ready_for(search)
                went = "the search starts over: there is no checkpoint"
                went = went if found is None else f"goes on after round {found.position.step}"
                return _course(search, ready, directory, observer, found, (*notes, went, *changed))


def require_room(plan: Plan, arms: int) -> None:
    """Refuse more arms than memory holds beside what one run is forecast to take."""
    parts, limit = plan.memory.parts, plan.memory.limit_bytes
    arm = sum(parts.get(name, 0) for name in ("adapters", "gradients", "optimizer")) + parts.get("gradients", 0)
    needed = plan.memory.total_bytes + (arms - 1) * arm  # an arm's running average is as large as its gradient
    if limit is not None and needed > limit:
        what = f"{arms} arms need about {needed / 1e9:.1f} GB and have {limit / 1e9:.1f} GB"
        raise InputError(what, where="--arms", mend="search fewer arms, a lower r, or --tune qlora")


def ready_for(search: Begun) -> Ready:
    """The loaded model with a row for every arm, in slots that have room for any that may come."""
    widest = largest_rank(search.prepared.plan, search.asked.question, search.arms)
    plans = [arm.plan for arm in search.arms]
    return make_ready(search.prepared.plan, plans if widest is None else [*plans, widest])


def setting_of(
    search: Begun, ready: Ready, directory: RunDir, observer: SearchObserver
) -> tuple[Ready, Setting, str | None]:
    """What the rounds work on, and what is to be said of the disk. A preference method's reference is asked here."""
    plan = search.prepared.plan
    started = read_started(directory.path)
    ready, items = _objective(ready, search.prepared, search.arms, observer, more=search.sampler is not None)
    bank = ready.engine.trained
    assert isinstance(bank, AdapterBank)
    disk = require_disk(directory.path, 4 * bank.flat_KP.nbytes, bank.flat_KP[0].nbytes, plan.value("save_total_limit"))
    setting = Setting(
        engine=ready.engine,
        items=items,
        objective=ready.objective,
        prepared=search.prepared,
        arms=search.arms,
        rules=search.rules,
        directory=directory,
        keeper=Keeper(directory.path, plan.value("save_total_limit"), directory.sync_metrics),
        origin=Origin(started.run, started.identity, versions()),
    )
    return ready, setting, disk


def _course(
    search: Begun,
    ready: Ready,
    directory: RunDir,
    observer: SearchObserver,
    found: Checkpoint | None,
    notes: tuple[str, ...],
) -> SweepResult:
    """One process's part of a search: from the start, or from a checkpoint, to the verified adapter."""
    plan, prepared = search.prepared.plan, search.prepared
    ready, setting, disk = setting_of(search, ready, directory, observer)
    with interruptible() as signals, disk_errors(directory.path):
        rounds = Search(setting, observer, signals)
        if found is None:
            directory.cut_metrics(0)
            for text in search.said:  # the observer has heard it
                directory.record(Note(text))
            for text in (*prepared.notes, *(text for text in ready.notes if text not in plan.warnings)):
                rounds.tell(Note(text))
        else:
            rounds.restore(found)
        for text in (*notes, *((disk,) if disk is not None else ())):
            rounds.tell(Note(text))
        return_freed_memory()
        try:
            with packed_model(ready.model):
                winner = rounds.run()
                course = course_of(rounds, search.said)
                made = verified(rounds, winner, ready, course)
                rounds.board.state = rounds.state
                return write_result(search.asked, rounds.board, prepared, directory, made, course, setting.origin.run)
        except BaseException:
            with suppress(Exception):  # what ended the search is what is told
                setting.keeper.join()
            raise


def _objective(
    ready: Ready, prepared: Prepared, arms: tuple[Arm, ...], observer: SearchObserver, *, more: bool
) -> tuple[Ready, Items]:
    """The method's objective, and what a bank computes of it. The reference is asked once, for all arms.

    Args:
        more: arms may come that no one knows yet, so that it is asked for every row.
    """
    if prepared.recipe.method is Method.SFT:
        return ready, SupervisedItems()
    notes: list[str] = []
    also: Iterable[Example] = (
        row
        for arm in arms
        for row in rows_used(
            arm.plan, replace(prepared.mixture, seed=arm.plan.value("seed")), prepared.train, prepared.held_out
        )
    )
    also = chain(also, prepared.train) if more else also
    objective = preference_objective(
        ready.engine,
        prepared.plan,
        prepared.train,
        prepared.held_out,
        prepared.mixture,
        notes.append,
        lambda text: observer(Note(text)),
        also,
    )
    assert isinstance(objective, Pairwise)
    return replace(ready, objective=objective, notes=(*ready.notes, *notes)), PairItems(objective)


def advised_rates(plan: Plan, arms: tuple[Arm, ...]) -> Mapping[str, float]:
    """The rate that each group would have without a search."""
    found: dict[str, float] = {}
    for arm in arms:
        if arm.group not in found:
            others = {name: value for name, value in arm.settings.items() if name != RATE}
            found[arm.group] = arm_of(plan, 0, others).plan.value(RATE) if others else plan.value(RATE)
    return found
