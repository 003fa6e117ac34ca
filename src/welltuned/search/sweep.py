"""A search from question to Run: the winner's adapter, verified as any run's, with the evidence beside it."""

import json
from collections.abc import Mapping
from contextlib import chdir, closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from welltuned.advice.codec import from_plain, to_plain
from welltuned.advice.plan import Plan, plan_to_yaml, require_memory
from welltuned.choice import SetBy
from welltuned.errors import InputError
from welltuned.facts.machine import require_one_process
from welltuned.models.lora import AdapterBank
from welltuned.models.packed import packed_model
from welltuned.recipe import Method, Recipe, load_recipe, recipe_to_dict, recipe_to_yaml
from welltuned.search.arms import RATE, Arm, Question, arm_of, first_arms
from welltuned.search.events import SearchObserver, curve_of, evaluated, unheard
from welltuned.search.items import Items, PairItems, SupervisedItems
from welltuned.search.loop import Search, Setting
from welltuned.search.report import Found, found_of, plot, to_json
from welltuned.search.state import State
from welltuned.training import durable
from welltuned.training.checkpoint import CHECKPOINTS, Checkpoint, Position, newest
from welltuned.training.events import Note
from welltuned.training.identity import differences, identity_of, versions
from welltuned.training.interrupt import interruptible
from welltuned.training.keeper import Keeper, require_disk
from welltuned.training.preference import preference_objective, rows_used
from welltuned.training.preference_step import Pairwise
from welltuned.training.prepare import Prepared, prepare
from welltuned.training.process import memory_used, return_freed_memory
from welltuned.training.result import RunResult, disk_errors, summary_of, verify_and_save
from welltuned.training.resume import place_of, require_device
from welltuned.training.run import Ready, begin, make_ready, on_this_machine
from welltuned.training.rundir import (
    ADAPTER,
    METRICS,
    PLAN,
    RECIPE,
    RUN,
    STARTED,
    SWEEP,
    RunDir,
    is_finished,
    read_started,
    require_free,
)
from welltuned.training.snapshot import Origin

PLOT = "sweep.svg"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Asked:
    """sweep.json as it is at the start: what is searched, and the plan that its arms depart from."""

    question: Question
    recipe: Recipe
    plan: Plan
    grid: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "question": to_plain(self.question),
            "recipe": to_plain(recipe_to_dict(self.recipe)),
            "plan": to_plain(self.plan),
            "grid": self.grid,
        }


def is_sweep(path: Path) -> bool:
    """Whether a directory holds a search, finished or not."""
    return (path / SWEEP).is_file()


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a finished search found, and the Run of its winner; `weights` are those of the held-out rows."""

    run: RunResult
    found: Found
    state: State
    weights: tuple[int, ...]


def sweep(
    prepared: Prepared,
    question: Question,
    out: Path,
    observer: SearchObserver = unheard,
    *,
    grid: bool = False,
) -> SweepResult:
    """Train many adapters at once, end those that cannot win, and write the winner's Run to `out`.

    Args:
        grid: train every arm to its end, as a measurement of what the search would have found.

    Raises:
        InputError: what is asked cannot be searched, or does not fit into memory or onto the disk.
        RunError: every arm diverged, or the result could not be written. Interrupted: a signal ended it, after a save.
    """
    require_one_process("a sweep")
    require_free(out)
    asked = Asked(question, prepared.recipe, prepared.plan, grid)
    arms = first_arms(prepared.plan, question)
    require_memory(prepared.plan)
    require_room(prepared.plan, len(arms))
    with on_this_machine(prepared.plan):
        ready = make_ready(prepared.plan, [arm.plan for arm in arms])
        with closing(RunDir(out)) as directory:
            write_asked(directory, asked)
            begin(directory, prepared, identity_of(prepared))
            return _course(asked, prepared, arms, ready, directory, observer, None, ())


def write_asked(directory: RunDir, asked: Asked) -> None:
    """The first file of a search: with it the rest can be made again."""
    with disk_errors(directory.path):
        directory.write_json(SWEEP, {"format": FORMAT, "asked": asked.to_json()})


def read_asked(path: Path) -> Asked:
    """What a search was asked.

    Raises:
        InputError: sweep.json is damaged.
    """
    try:
        plain = json.loads((path / SWEEP).read_text(encoding="utf-8"))["asked"]
        question = from_plain(Question, {**plain["question"], "over": []})
        over = tuple((name, tuple(values)) for name, values in plain["question"]["over"])
        plan = from_plain(Plan, plain["plan"])
        return Asked(replace(question, over=over), load_recipe(None, plain["recipe"]), plan, plain["grid"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{SWEEP} is damaged ({error})", where=str(path)) from error


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
            require_device(prepared.plan, path)
            arms = first_arms(prepared.plan, asked.question)
            with on_this_machine(prepared.plan):
                ready = make_ready(prepared.plan, [arm.plan for arm in arms])
                went = "the search starts over: there is no checkpoint"
                went = went if found is None else f"goes on after round {found.position.step}"
                return _course(asked, prepared, arms, ready, directory, observer, found, (*notes, went, *changed))


def require_room(plan: Plan, arms: int) -> None:
    """Refuse more arms than memory holds beside what one run is forecast to take."""
    parts, limit = plan.memory.parts, plan.memory.limit_bytes
    arm = sum(parts.get(name, 0) for name in ("adapters", "gradients", "optimizer")) + parts.get("gradients", 0)
    needed = plan.memory.total_bytes + (arms - 1) * arm  # an arm's running average is as large as its gradient
    if limit is not None and needed > limit:
        what = f"{arms} arms need about {needed / 1e9:.1f} GB and have {limit / 1e9:.1f} GB"
        raise InputError(what, where="--arms", mend="search fewer arms, a lower r, or --tune qlora")


def _course(
    asked: Asked,
    prepared: Prepared,
    arms: tuple[Arm, ...],
    ready: Ready,
    directory: RunDir,
    observer: SearchObserver,
    found: Checkpoint | None,
    notes: tuple[str, ...],
) -> SweepResult:
    """One process's part of a search: from the start, or from a checkpoint, to the verified adapter."""
    plan = prepared.plan
    started = read_started(directory.path)
    ready, items = _objective(ready, prepared, arms, observer)
    bank = ready.engine.trained
    assert isinstance(bank, AdapterBank)
    disk = require_disk(directory.path, 4 * bank.flat_KP.nbytes, bank.flat_KP[0].nbytes, plan.value("save_total_limit"))
    keeper = Keeper(directory.path, plan.value("save_total_limit"), directory.sync_metrics)
    setting = Setting(
        engine=ready.engine,
        items=items,
        objective=ready.objective,
        prepared=prepared,
        arms=arms,
        advised=advised_rates(plan, arms),
        directory=directory,
        keeper=keeper,
        origin=Origin(started.run, started.identity, versions()),
        rates=asked.question.searches_rate,
        grid=asked.grid,
    )
    with interruptible() as signals, disk_errors(directory.path):
        search = Search(setting, observer, signals)
        if found is None:
            directory.cut_metrics(0)
            for text in (*prepared.notes, *(text for text in ready.notes if text not in plan.warnings)):
                search.tell(Note(text))
        else:
            search.restore(found)
        for text in (*notes, *((disk,) if disk is not None else ())):
            search.tell(Note(text))
        return_freed_memory()
        try:
            with packed_model(ready.model):
                winner = search.run()
                return _finished(asked, search, winner, ready)
        except BaseException:
            with suppress(Exception):  # what ended the search is what is told
                keeper.join()
            raise


def _objective(
    ready: Ready, prepared: Prepared, arms: tuple[Arm, ...], observer: SearchObserver
) -> tuple[Ready, Items]:
    """The method's objective, and what a bank computes of it. The reference is asked once, for all arms."""
    if prepared.recipe.method is Method.SFT:
        return ready, SupervisedItems()
    notes: list[str] = []
    also = (
        row
        for arm in arms
        for row in rows_used(
            arm.plan, replace(prepared.mixture, seed=arm.plan.value("seed")), prepared.train, prepared.held_out
        )
    )
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


def _finished(asked: Asked, search: Search, winner: Arm, ready: Ready) -> SweepResult:
    """Verify and save the winner's adapter and what was found; run.json comes last."""
    setting, directory = search.setting, search.setting.directory
    state = next(a for a in search.state.arms if a.number == winner.number)
    search.bank.keep([search.state.bank.index(winner.number)])
    plan = _reasoned(winner.plan, winner, search)
    prepared = replace(
        setting.prepared,
        recipe=winner.plan.recipe,
        plan=plan,
        mixture=replace(setting.prepared.mixture, seed=winner.plan.value("seed")),
    )
    engine = replace(ready.engine, token_budget=search.engine.token_budget)
    after = ready.objective.evaluate(engine, prepared.held_out)
    at = Position(step=state.step, skipped=state.skipped, token_budget=engine.token_budget)
    checks = verify_and_save(engine, prepared, directory, {}, at)
    tokens = sum(arm.tokens for arm in search.state.arms)
    result = RunResult(
        path=directory.path,
        engine=engine,
        updates=state.step,
        before=search.before,
        after=after,
        checks=checks,
        seconds=search.elapsed,
        tokens_per_second=tokens / search.seconds if search.seconds else 0.0,
        peak_memory=memory_used(plan.facts.machine.device).peak,
    )
    found = found_of(search, winner, plan)
    _record_curve(search, winner, result)
    directory.write(RECIPE, recipe_to_yaml(prepared.recipe))
    directory.write(PLAN, plan_to_yaml(plan))
    directory.write(PLOT, plot(found))
    directory.write_json(SWEEP, {"format": FORMAT, "asked": asked.to_json(), **to_json(found)})
    watched = {
        "stop_reason": None,
        "best_step": None,
        "findings": [f.to_json() for f in search.watch(winner.number).findings],
        "healed": {"updates_left_out": state.skipped, "token_budget": engine.token_budget},
        "saving": asdict(setting.keeper.cost),
    }
    summary = summary_of(prepared, ready.fused, ready.notes, result)
    directory.write_json(RUN, {**summary, **watched, "sweep": to_json(found)})
    return SweepResult(result, found, search.state, tuple(search.weights))


def _record_curve(search: Search, winner: Arm, result: RunResult) -> None:
    """The winner's updates and evaluations as lines of a run, for whoever reads metrics.jsonl as one."""
    directory, total = search.setting.directory, winner.plan.updates
    lines = [json.loads(line) for line in (directory.path / METRICS).read_text(encoding="utf-8").splitlines()]
    batch = winner.plan.value("effective_batch_size")
    per_epoch = search.setting.prepared.mixture.steps_per_epoch(batch)
    if result.before is not None:
        directory.record(evaluated(0, result.before))
    for event in curve_of(lines, winner.number, total, per_epoch, result.tokens_per_second):
        directory.record(event)
    if result.after is not None:
        directory.record(evaluated(total, result.after))


def _reasoned(plan: Plan, winner: Arm, search: Search) -> Plan:
    """The winner's plan with what speaks for its values now."""
    compared = len(search.state.arms)
    choices = dict(plan.choices)
    for name in winner.settings:
        choice = choices[name]
        reason = f"the best of {compared} arms that a search compared on your held-out rows (sweep.json)"
        choices[name] = replace(choice, reason=reason, set_by=SetBy.USER)
    return replace(plan, choices=choices)
