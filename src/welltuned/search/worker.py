"""One of several processes that make the rounds of a search: a bank of some of the arms, told by another how far.

It decides nothing. All that it is told can be told again, so that one that was lost with its machine goes on from its
newest checkpoint: in the Run's folder, which all machines share.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from welltuned.advice.codec import to_plain
from welltuned.errors import InputError, RunError, WelltunedError
from welltuned.models.packed import packed_model
from welltuned.search.arms import arm_of
from welltuned.search.asked import read_asked
from welltuned.search.events import SearchEvent, line_of
from welltuned.search.loop import Search
from welltuned.search.result import Course, verified
from welltuned.search.state import ArmState, Status
from welltuned.search.sweep import begun, ready_for, setting_of
from welltuned.training import durable
from welltuned.training.checkpoint import CHECKPOINTS, newest
from welltuned.training.events import Note
from welltuned.training.identity import differences, identity_of
from welltuned.training.interrupt import Asked as Signals
from welltuned.training.interrupt import Interrupted
from welltuned.training.prepare import prepare
from welltuned.training.process import return_freed_memory
from welltuned.training.resume import place_of, require_device
from welltuned.training.rundir import METRICS, STARTED, SWEEP, RunDir, read_started

WORKERS = "workers"  # a folder of each in the Run's, until the Run is done


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Train these arms, which are all that a worker has and are alive, to the look of this index.

    Attributes:
        arms: numbers and settings.
    """

    target: int
    arms: tuple[tuple[int, dict[str, Any]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of an order; plain values, which travel.

    Attributes:
        arms: states as JSON. eval_tokens: that one look at one arm passes through the model.
        error: what went wrong, as a sentence. interrupted: it was asked to end, and is saved.
    """

    arms: tuple[dict[str, Any], ...] = ()
    eval_tokens: int = 0
    error: str | None = None
    interrupted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The winner's adapter is in the worker's folder; what there is to say of it, in plain values."""

    folder: str = ""
    summary: Mapping[str, Any] | None = None
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None
    checks: tuple[dict[str, Any], ...] = ()
    updates: int = 0
    peak_memory: int = 0
    token_budget: int = 0
    saving: Mapping[str, float] | None = None
    error: str | None = None


class Worker:
    """A loaded model with a bank, in a process of its own.

    Args:
        run: the search's Run. index: which worker this is. numbers: the arms that it begins with.
        threads: of the processor that it may use; None for all.
    """

    def __init__(self, run: str, index: int, numbers: Sequence[int], threads: int | None = None):
        self._signals = Signals()
        self._lines: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._failed: str | None = None
        try:
            self._open(Path(run), index, tuple(numbers), threads)
        except WelltunedError as error:
            self._failed = str(error)

    def _open(self, run: Path, index: int, numbers: tuple[int, ...], threads: int | None) -> None:
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        if not (run / SWEEP).is_file():
            what = f"worker {index} does not see {run}: a search over several machines needs a folder that all share"
            raise RunError(what)
        asked, started = read_asked(run), read_started(run)
        os.chdir(place_of(started))
        prepared = prepare(asked.recipe, planned=asked.plan)
        changed = differences(started.identity, identity_of(prepared))
        if changed:
            raise InputError("; ".join(changed), where=f"worker {index}", mend="give all machines the same files")
        require_device(prepared.plan, run)
        whole = begun(asked, prepared)
        mine = replace(whole, arms=tuple(arm for arm in whole.arms if arm.number in numbers))
        ready = ready_for(mine)
        folder = run / WORKERS / str(index)
        folder.mkdir(parents=True, exist_ok=True)
        durable.sweep(folder)
        durable.sweep(folder / CHECKPOINTS)
        found, notes = newest(folder, started.run)
        durable.replace_file(folder / STARTED, (run / STARTED).read_text(encoding="utf-8"))
        directory = RunDir(folder, resumed=True)
        self._ready, setting, disk = setting_of(mine, ready, directory, self._hear)
        self._search = Search(replace(setting, part=True), self._hear, self._signals)
        if found is None:
            directory.cut_metrics(0)
        else:
            self._search.restore(found)
            self._notes.append(f"worker {index} goes on after round {found.position.step}")
        self._notes += [text for text in (*notes, *ready.notes, *([disk] if disk else [])) if text]
        self._lines = [json.loads(x) for x in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
        return_freed_memory()
        self._open_for_good = ExitStack()
        self._open_for_good.enter_context(packed_model(ready.model))

    def _hear(self, event: SearchEvent) -> None:
        if isinstance(event, Note):
            self._notes.append(event.text)
            return
        self._lines.append(line_of(event))

    def news(self, steps: Mapping[int, int]) -> tuple[list[dict[str, Any]], list[str]]:
        """Lines of updates beyond these, for each arm, and all notes so far."""
        updates = [line for line in list(self._lines) if line.get("event") == "arm_update"]
        return [line for line in updates if line["step"] > steps.get(line["arm"], 0)], list(self._notes)

    def stop(self, number: int) -> None:
        """As a signal would: the update is finished and saved first."""
        self._signals.number = number

    def advance(self, order: Order) -> Answer:
        """Carry out an order, from wherever this worker is."""
        if self._failed is not None:
            return Answer(error=self._failed)
        search, board = self._search, self._search.board
        try:
            search.evaluate_start()
            self._take(order)
            search.advance()
            search.save(wait=True)
        except Interrupted:
            return Answer(interrupted=True)
        except WelltunedError as error:
            return Answer(error=str(error))
        numbers = {number for number, _ in order.arms}
        states = tuple(to_plain(arm) for arm in board.state.arms if arm.number in numbers)
        return Answer(arms=states, eval_tokens=search.eval_tokens)

    def _take(self, order: Order) -> None:
        """The arms of the order and no others; those that are new begin."""
        search, board = self._search, self._search.board
        wanted = dict(order.arms)
        arms = [
            arm if arm.number in wanted or not arm.alive else replace(arm, status=Status.DROPPED)
            for arm in board.state.arms
        ]
        if any(number in wanted and wanted[number] != dict(arm.settings) for number, arm in board.arms.items()):
            raise RunError("this worker began with other arms: give all machines the same packages and files")
        new = [number for number in wanted if number not in {arm.number for arm in arms}]
        for number in new:
            board.arms[number] = arm_of(board.plan, number, wanted[number])
            arms.append(ArmState(number=number, settings=board.arms[number].settings))
        board.state = replace(board.state, arms=tuple(arms), target=order.target)
        search.begin(new)

    def finish(self, number: int) -> Ended:
        """Write the winner's adapter into this worker's folder."""
        if self._failed is not None:
            return Ended(error=self._failed)
        search = self._search
        tokens = search.board.of(number).tokens
        speed = tokens / search.seconds if search.seconds else 0.0
        course = Course(seconds=0.0, tokens=tokens, tokens_per_second=speed, token_budget=0, saving={})
        try:
            result, summary = verified(search, search.board.arms[number], self._ready, course)
        except WelltunedError as error:
            return Ended(error=str(error))
        return Ended(
            folder=str(result.path),
            summary=to_plain(summary),
            before=None if result.before is None else to_plain(result.before),
            after=None if result.after is None else to_plain(result.after),
            checks=tuple(asdict(check) for check in result.checks),
            updates=result.updates,
            peak_memory=result.peak_memory,
            token_budget=search.engine.token_budget,
            saving=asdict(search.setting.keeper.cost),
        )
