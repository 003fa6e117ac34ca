"""The rounds of a search in this process: what is trained, looked at, saved and told."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from welltuned.advice.plan import Plan
from welltuned.data.mix import Mixture
from welltuned.errors import RunError
from welltuned.models.lora import LoraSettings
from welltuned.search.arms import Arm
from welltuned.search.bank import Bank
from welltuned.search.board import Board, Rules
from welltuned.search.events import ArmUpdated, SearchEvent, SearchObserver, evaluated, line_of, update_event
from welltuned.search.halving import Look
from welltuned.search.items import Items, Share, row_losses
from welltuned.search.room import Room
from welltuned.search.state import ArmState, State, Status
from welltuned.training.checkpoint import Checkpoint, Position, Snapshot
from welltuned.training.events import Note
from welltuned.training.healing import IN_A_ROW, is_sound
from welltuned.training.interrupt import Asked, Interrupted
from welltuned.training.keeper import Keeper
from welltuned.training.loop import dropout_key
from welltuned.training.monitor import divergence
from welltuned.training.optimizer import Schedule
from welltuned.training.prepare import Prepared
from welltuned.training.rundir import RunDir
from welltuned.training.settings import adamw_settings, rate_spans, schedule_of
from welltuned.training.snapshot import Origin
from welltuned.training.starting import lora_settings
from welltuned.training.step import Engine, Evaluation, Gradient, Objective
from welltuned.training.watch import Watch


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a search works on.

    Attributes:
        arms: those of the start, one for each of the bank's first rows.
        part: other arms of the search are elsewhere.
    """

    engine: Engine
    items: Items
    objective: Objective
    prepared: Prepared
    arms: tuple[Arm, ...]
    rules: Rules
    directory: RunDir
    keeper: Keeper
    origin: Origin
    part: bool = False


class Search:
    """The rounds from a position on.

    Attributes:
        board: what is known of every arm. rows: the number of the arm in each row of the bank. rounds: rounds made.
        eval_tokens: that one look at one arm passes through the model.
    """

    def __init__(self, setting: Setting, observer: SearchObserver, asked: Asked):
        self.setting, self.asked, self._observer = setting, asked, observer
        self.plan: Plan = setting.prepared.plan
        weights = [setting.items.weight(row) for row in setting.prepared.held_out]
        self.board = Board(self.plan, setting.arms, weights, setting.rules, self.tell)
        self.bank = Bank(setting.engine, adamw_settings(self.plan), rate_spans(self.plan, setting.engine.trained))
        self._shared = self.bank.adapters.settings[0]
        self.rows = tuple(arm.number for arm in setting.arms)
        if self.bank.size > len(self.rows):  # one more, so that slots have room for its rank
            self.bank.keep(range(len(self.rows)))
        self.rounds, self.seconds, self.elapsed = 0, 0.0, 0.0
        self.before: Evaluation | None = None
        self._watches: dict[int, Watch] = {}
        self._schedules: dict[int, Schedule] = {}
        self.room = Room(self.plan, setting.engine.token_budget, lambda text: self.tell(Note(text)))
        self._clock = time.monotonic()
        self.eval_tokens = sum(setting.items.length(row) for row in setting.prepared.held_out)

    @property
    def engine(self) -> Engine:
        """With the token budget that memory allows."""
        return replace(self.setting.engine, token_budget=self.room.budget)

    @property
    def state(self) -> State:
        """The board's, with the bank's rows."""
        return replace(self.board.state, bank=self.rows)

    def tell(self, event: SearchEvent) -> None:
        """To the Run's files, and to the observer."""
        if isinstance(event, Note):
            self.setting.directory.record(event)
        else:
            self.setting.directory.record_line(line_of(event))
        self._observer(event)

    def _say(self, sentences: Sequence[str]) -> None:
        for sentence in sentences:
            self.tell(Note(sentence))

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> Arm:
        """Work until one arm is chosen and trained to its end; that arm.

        Raises:
            RunError: every arm diverged. Interrupted: the user ended it, after a save.
        """
        self.evaluate_start()
        while not self.board.state.ended:
            self.advance()
            self.begin(self.board.judge(self.since_start()))
            self.save()
        self.save(wait=True)
        if self.board.last_decision is None:  # it went on after its last decision
            self.board.last_decision = self.board.decide()
        assert self.board.state.winner is not None
        return self.board.arms[self.board.state.winner]

    def evaluate_start(self) -> None:
        """The held-out rows before the first update, once for all arms."""
        if self.before is not None:
            return
        self.before = self.room.give(
            lambda: self.setting.objective.evaluate(self.engine, self.setting.prepared.held_out), "the evaluation"
        )
        for number in self.board.arms:
            self.watch(number).see(evaluated(0, self.before))
            self.board.tell_arm(number)

    def advance(self) -> None:
        """Train every arm to where all are judged next, and look at it there."""
        while True:
            while self.board.behind():
                self._stop_where_asked()
                self._round()
                if self.rounds % self.plan.value("save_steps") == 0 and self.board.behind():
                    self.save()  # where a look follows, it is saved after that, with what was decided
                self._say(self.setting.keeper.news())
            self._stop_where_asked()
            due = {a.number: share for a in self.board.state.alive if (share := self.board.due(a)) is not None}
            if not due:
                return
            share = min(due.values())
            self._look([number for number, at in due.items() if at == share], share)
            self._compact()

    # ── one round ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _round(self) -> None:
        """One update of every arm that is behind."""
        started = time.perf_counter()
        row_of = {number: k for k, number in enumerate(self.rows)}
        behind = sorted(self.board.behind(), key=lambda arm: row_of[arm.number])
        shares = [self._share(arm, row_of[arm.number]) for arm in behind]
        where = f"round {self.rounds + 1}"
        self.room.reserve(where)
        made = self.room.give(lambda: self.bank.gradients(self.engine, self.setting.items, shares), where)
        norms = self.bank.clip(self.plan.value("max_grad_norm"))
        rate_K: list[float | None] = [None] * self.bank.size
        step_K = [0] * self.bank.size
        for arm, share, gradient in zip(behind, shares, made, strict=True):
            if is_sound(norms[share.k], gradient):
                rate_K[share.k] = self._schedule(arm.number).rate(arm.step)
            step_K[share.k] = arm.step + 1
        self.bank.step(rate_K, step_K)
        self.room.learn(sum(g.tokens for g in made))
        self.rounds, self.seconds = self.rounds + 1, self.seconds + time.perf_counter() - started
        for arm, share, gradient in zip(behind, shares, made, strict=True):
            self._updated(arm, share.k, gradient, norms[share.k], rate_K[share.k])
        self._compact()

    def _share(self, arm: ArmState, k: int) -> Share:
        plan, prepared = self.board.arms[arm.number].plan, self.setting.prepared
        seed = plan.value("seed")
        chosen = self._mixture(arm.number).update(plan.value("effective_batch_size"), arm.step)
        return Share(k, [prepared.train[i] for i in chosen], [dropout_key(seed, arm.step, i) for i in chosen])

    def _mixture(self, number: int) -> Mixture:
        return replace(self.setting.prepared.mixture, seed=self.board.arms[number].plan.value("seed"))

    def _schedule(self, number: int) -> Schedule:
        if number not in self._schedules:
            self._schedules[number] = schedule_of(self.board.arms[number].plan)
        return self._schedules[number]

    def _updated(self, arm: ArmState, k: int, made: Gradient, norm: float, rate: float | None) -> None:
        """Take note of one arm's update, or of one that was left out since it was not finite."""
        step, total = arm.step + 1, self.board.arms[arm.number].plan.updates
        sound = rate is not None
        arm = replace(
            arm,
            step=step,
            tokens=arm.tokens + made.tokens,
            skipped=arm.skipped + (not sound),
            in_a_row=0 if sound else arm.in_a_row + 1,
        )
        watch = self.watch(arm.number)
        if rate is not None:
            watch.see(update_event(step, total, made, norm, rate))
            smooth = watch.history.smooth
            arm = replace(arm, loss=made.loss if smooth is None else smooth)
            counted = made.tokens, made.supervised_tokens
            self.tell(ArmUpdated(arm.number, step, total, step / total, made.loss, rate, norm, *counted))
        self.board.state = self.board.state.with_arm(replace(arm, monitor=watch.state()))
        broken = next((f.what for f in watch.findings if f.id == divergence.ID), None)
        if not sound and (arm.in_a_row >= IN_A_ROW or not self.bank.is_finite(k)):
            broken = f"{arm.in_a_row} updates in a row were not finite"
        if broken is not None:
            self.board.end(arm.number, Status.DIVERGED, broken)

    def watch(self, number: int) -> Watch:
        if number not in self._watches:
            self._watches[number] = Watch.restored(self.board.of(number).monitor, self.board.arms[number].plan)
        return self._watches[number]

    # ── who is in the bank ───────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, numbers: Sequence[int]) -> None:
        """Rows for these arms, which begin; the room of those that ended is given to the others."""
        if self.before is not None:
            for number in numbers:
                self.watch(number).see(evaluated(0, self.before))
        self._compact(numbers)

    def _compact(self, added: Sequence[int] = ()) -> None:
        alive = {a.number for a in self.board.state.alive}
        if not alive and not added:
            if self.setting.part:
                return
            raise RunError("every arm diverged; lower learning_rate in the recipe, or look at the rows")
        kept = tuple(n for n in self.rows if n in alive)
        if kept == self.rows and not added:
            return
        row_of = {number: k for k, number in enumerate(self.rows)}
        fresh = {len(kept) + i: self._settings(number) for i, number in enumerate(added)}
        self.bank.keep([*(row_of[n] for n in kept), *(0 for _ in added)], fresh)
        self.rows = (*kept, *added)

    def _settings(self, number: int) -> LoraSettings:
        """An arm's adapter, in the places that the bank has."""
        return replace(lora_settings(self.board.arms[number].plan), target_modules=self._shared.target_modules)

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _look(self, numbers: Sequence[int], share: float) -> None:
        """Judge arms by their held-out losses: until the end by the averages of their weights."""
        row_of = {number: k for k, number in enumerate(self.rows)}
        some = sorted(numbers, key=lambda n: row_of[n])

        def losses(*, averaged: bool) -> list[list[float]]:
            with self.bank.averaged() if averaged else nullcontext():
                at = [row_of[n] for n in some]
                return row_losses(self.engine, self.setting.items, self.setting.prepared.held_out, at)

        found = self._given(lambda: losses(averaged=share < 1))
        for number, of_row in zip(some, found, strict=True):
            self.board.looked(number, share, tuple(of_row), self.eval_tokens)
        if self.setting.rules.grid and 0 < self.board.state.target < len(self.board.shares) - 1:
            for number, of_row in zip(some, self._given(lambda: losses(averaged=False)), strict=True):
                arm = self.board.of(number)
                arm = replace(arm, plain=(*arm.plain, Look(share, tuple(of_row))))
                self.board.state = self.board.state.with_arm(arm)
        self.board.tell_looks(numbers, share)

    def _given(self, make: Callable[[], list[list[float]]]) -> list[list[float]]:
        return self.room.give(make, "the evaluation")

    # ── saving and going on ──────────────────────────────────────────────────────────────────────────────────────────

    def _stop_where_asked(self) -> None:
        if self.asked.number is None:
            return
        run = self.setting.directory.path
        if self.rounds == 0:
            raise Interrupted(self.asked.number, f"ended by {self.asked.name} before the first update: nothing is lost")
        self.save(wait=True)
        saved = self.setting.keeper.saved
        where = "nothing could be saved" if saved is None else f"round {saved} is saved"
        text = f"ended by {self.asked.name} after round {self.rounds}; {where}; go on with: welltuned resume {run}"
        raise Interrupted(self.asked.number, text)

    def since_start(self) -> float:
        """Seconds of work, in this process and in those before it."""
        return self.elapsed + time.monotonic() - self._clock

    def save(self, *, wait: bool = False) -> None:
        """Begin to save this position; with `wait`, until it is on the disk."""
        keeper = self.setting.keeper
        if wait:
            self._say(keeper.join())
        self.elapsed, self._clock = self.since_start(), time.monotonic()
        if keeper.saved != self.rounds or keeper.failed is not None:
            self._say(keeper.save(self._snapshot, wait=wait))

    def _snapshot(self, copied: bool) -> Snapshot:
        position = Position(
            step=self.rounds,
            token_budget=self.engine.token_budget,
            seconds=self.seconds,
            elapsed=self.elapsed,
            before=self.before,
            monitor=self.state.to_json(),
        )
        directory = self.setting.directory
        return self.bank.snapshot(position, self.setting.origin, directory.metrics_bytes, copied=copied)

    def restore(self, found: Checkpoint) -> None:
        """Go on from a checkpoint: every arm, its weights, average and moments, and the length of metrics.jsonl."""
        at = found.position
        state = State.from_json(at.monitor)
        self.board.restore(state)
        self.board.introduce(self._observer)
        self.rows, self.rounds, self.before = state.bank, at.step, at.before
        self.seconds, self.elapsed, self._clock = at.seconds, at.elapsed, time.monotonic()
        fresh: Mapping[int, LoraSettings] = {k: self._settings(number) for k, number in enumerate(self.rows)}
        self.bank.keep([0 for _ in self.rows], fresh)
        self.bank.restore(found)
        self.room.budget = at.token_budget
        self._watches, self._schedules = {}, {}
        self.setting.keeper.resumed(at.step, None, found.run)
        missing = self.setting.directory.cut_metrics(found.metrics_bytes)
        if missing:
            self.tell(Note(f"metrics.jsonl had lost {missing:,} bytes that belong before round {at.step}"))
