"""The end of a search: the winner's adapter, verified as any run's, and its Run with the evidence beside it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from welltuned.advice.plan import Plan, plan_to_yaml
from welltuned.choice import SetBy
from welltuned.recipe import recipe_to_yaml
from welltuned.search.arms import Arm
from welltuned.search.asked import Asked
from welltuned.search.board import Board
from welltuned.search.events import curve_of, evaluated
from welltuned.search.loop import Search
from welltuned.search.report import Found, found_of, plot, to_json
from welltuned.search.state import State
from welltuned.training.checkpoint import Position
from welltuned.training.events import Event, Note
from welltuned.training.prepare import Prepared
from welltuned.training.process import memory_used
from welltuned.training.result import RunResult, summary_of, verify_and_save
from welltuned.training.run import Ready
from welltuned.training.rundir import METRICS, PLAN, RECIPE, RUN, SWEEP, RunDir
from welltuned.training.trackers import tracked
from welltuned.training.watch import Watch

PLOT = "sweep.svg"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a finished search found, and the Run of its winner; `weights` are those of the held-out rows."""

    run: RunResult
    found: Found
    state: State
    weights: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What the whole search took.

    Attributes:
        seconds: of work, all processes. tokens: that all arms trained on. told: what the search did otherwise than a
            run of the same recipe would, in sentences.
    """

    seconds: float
    tokens: int
    tokens_per_second: float
    token_budget: int
    saving: Mapping[str, float]
    told: tuple[str, ...] = ()


def prepared_for(prepared: Prepared, winner: Arm, compared: int) -> Prepared:
    """What was prepared, as the winner's own run."""
    plan = _reasoned(winner.plan, winner, compared)
    mixture = replace(prepared.mixture, seed=winner.plan.value("seed"))
    return replace(prepared, recipe=winner.plan.recipe, plan=plan, mixture=mixture)


def verified(search: Search, winner: Arm, ready: Ready, course: Course) -> tuple[RunResult, dict[str, Any]]:
    """Write the winner's adapter into the search's directory, and what a run's summary says of it."""
    setting, board = search.setting, search.board
    state = board.of(winner.number)
    search.bank.keep([search.rows.index(winner.number)])
    prepared = prepared_for(setting.prepared, winner, len(board.state.arms))
    engine = replace(ready.engine, token_budget=search.engine.token_budget)
    after = ready.objective.evaluate(engine, prepared.held_out)
    at = Position(step=state.step, skipped=state.skipped, token_budget=engine.token_budget)
    result = RunResult(
        path=setting.directory.path,
        engine=engine,
        updates=state.step,
        before=search.before,
        after=after,
        checks=verify_and_save(engine, prepared, setting.directory, {}, at),
        seconds=course.seconds,
        tokens_per_second=course.tokens_per_second,
        peak_memory=memory_used(prepared.plan.facts.machine.device).peak,
    )
    return result, summary_of(prepared, ready.fused, ready.notes, result)


def write_result(
    asked: Asked,
    board: Board,
    prepared: Prepared,
    directory: RunDir,
    made: tuple[RunResult, dict[str, Any]],
    course: Course,
    run_id: str,
) -> SweepResult:
    """Write everything but the adapter, which is there; run.json comes last.

    Args:
        prepared: the search's own. made: what `verified` gave.
    """
    result, summary = made
    winner = board.arms[board.state.winner if board.state.winner is not None else 0]
    prepared = prepared_for(prepared, winner, len(board.state.arms))
    found, state = found_of(board, winner), board.of(winner.number)
    _record_curve(board, winner, prepared, result, directory, run_id)
    directory.write(RECIPE, recipe_to_yaml(prepared.recipe))
    directory.write(PLAN, plan_to_yaml(prepared.plan))
    directory.write(PLOT, plot(found))
    directory.write_json(SWEEP, {"format": FORMAT, "asked": asked.to_json(), **to_json(found)})
    findings = Watch.restored(state.monitor, winner.plan).findings
    watched = {
        "stop_reason": None,
        "best_step": None,
        "findings": [f.to_json() for f in findings],
        "healed": {"updates_left_out": state.skipped, "token_budget": course.token_budget},
        "saving": dict(course.saving),
        "notes": [*summary["notes"], *course.told],
    }
    directory.write_json(RUN, {**summary, **watched, "sweep": to_json(found)})
    return SweepResult(result, found, board.state, tuple(board.weights))


def course_of(search: Search, told: tuple[str, ...]) -> Course:
    tokens = sum(arm.tokens for arm in search.board.state.arms)
    return Course(
        seconds=search.elapsed,
        tokens=tokens,
        tokens_per_second=tokens / search.seconds if search.seconds else 0.0,
        token_budget=search.engine.token_budget,
        saving=asdict(search.setting.keeper.cost),
        told=told,
    )


def _record_curve(
    board: Board, winner: Arm, prepared: Prepared, result: RunResult, directory: RunDir, run_id: str
) -> None:
    """The winner's updates and evaluations as a run tells them: for metrics.jsonl, and for the recipe's trackers."""
    total = winner.plan.updates
    lines = [json.loads(line) for line in (directory.path / METRICS).read_text(encoding="utf-8").splitlines()]
    per_epoch = prepared.mixture.steps_per_epoch(winner.plan.value("effective_batch_size"))

    def keep(event: Event) -> None:
        if isinstance(event, Note):
            board.tell(event)
        else:
            directory.record(event)

    with tracked(keep, winner.plan, directory.path, run_id) as heard:
        if result.before is not None:
            heard(evaluated(0, result.before))
        for event in curve_of(lines, winner.number, total, per_epoch, result.tokens_per_second):
            heard(event)
        if result.after is not None:
            heard(evaluated(total, result.after))


def _reasoned(plan: Plan, winner: Arm, compared: int) -> Plan:
    """The winner's plan with what speaks for its values now."""
    choices = dict(plan.choices)
    for name in winner.settings:
        choice = choices[name]
        reason = f"the best of {compared} arms that a search compared on your held-out rows (sweep.json)"
        choices[name] = replace(choice, reason=reason, set_by=SetBy.USER)
    return replace(plan, choices=choices)
