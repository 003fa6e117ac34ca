"""All updates of a run: what is made, evaluated, saved and told, and what is done where something goes wrong."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from welltuned.errors import RunError
from welltuned.models.oom import retried
from welltuned.training.average import Average
from welltuned.training.checkpoint import Checkpoint, Position, Snapshot
from welltuned.training.events import Evaluated, Event, Note, Observer, Skipped, Updated
from welltuned.training.going_back import back_or_stop
from welltuned.training.healing import (
    IN_A_ROW,
    culprits,
    finite_alone,
    halved,
    is_sound,
)
from welltuned.training.interrupt import Asked, Interrupted, name_of
from welltuned.training.keeper import Keeper
from welltuned.training.memory_guard import MemoryGuard
from welltuned.training.monitor.movement import Movement
from welltuned.training.optimizer import clip_
from welltuned.training.optimizer_8bit import make_optimizer
from welltuned.training.prepare import Prepared
from welltuned.training.process import memory_used
from welltuned.training.reduce import GradientSum, Word
from welltuned.training.rundir import RunDir
from welltuned.training.settings import adamw_settings, rate_spans, schedule_of
from welltuned.training.snapshot import Numbers, Origin
from welltuned.training.step import Engine, Evaluation, Gradient, NotFinite, Objective
from welltuned.training.watcher import MakeWatch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Setting:
    """What the loop works on."""

    engine: Engine
    objective: Objective
    prepared: Prepared
    directory: RunDir
    keeper: Keeper
    origin: Origin


class Loop:
    """The updates from a position on.

    Attributes:
        at: where the run is.
        engine: the engine with the token budget that memory allows.
    """

    def __init__(self, setting: Setting, observer: Observer, make_watch: MakeWatch, asked: Asked):
        self.setting, self.asked = setting, asked
        self._observer, self._make_watch = observer, make_watch
        plan = setting.prepared.plan
        self.plan, self.trained, self.engine = plan, setting.engine.trained, setting.engine
        self.ranks = setting.engine.ranks
        self.at = Position(token_budget=setting.engine.token_budget)
        self.watch = make_watch(plan, self.at.monitor)
        self._sum = GradientSum(self.trained, self.ranks, passes_together=setting.engine.shards is not None)
        self.optimizer = make_optimizer(
            plan.value("optim"),
            self.trained.flat_KP,
            self.trained.grad_KP,
            self.trained.decayed,
            adamw_settings(plan),
            rate_spans(plan, self.trained),
        )
        self.average = Average(plan.value("ema_decay"), self.trained.flat_KP) if "ema_decay" in plan.choices else None
        self.numbers = Numbers(self.trained, self.optimizer, self.average)
        self._movement = Movement(self.trained, self.ranks)  # before a checkpoint is restored: it remembers the start
        self.schedule = schedule_of(plan)
        self.batch = plan.value("effective_batch_size")
        self._guard = MemoryGuard(plan, processes=self.ranks.here)
        self._unsaid: list[str] = []  # what a rank that does not speak for all has to say
        self._asked: int | None = None  # the signal that all ranks know of
        self._most_tokens: int | None = None
        self._clock = time.monotonic()
        self._warned_of_metrics = False
        self._metrics_at_start = setting.directory.metrics_bytes

    # ── telling ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def tell(self, event: Event) -> None:
        """The one place where events are told: to the Run's files, to the observer, to whoever watches."""
        self._pass_on(event)
        for finding in self.watch.see(event):
            self._pass_on(finding)

    def _pass_on(self, event: Event) -> None:
        directory = self.setting.directory
        directory.record(event)
        self._observer(event)
        if directory.trouble is not None and not self._warned_of_metrics:
            text = f"metrics.jsonl cannot be written ({directory.trouble}); its lines wait in memory, training goes on"
            self._observer(Note(text))
        self._warned_of_metrics = directory.trouble is not None

    def say(self, sentences: Sequence[str]) -> None:
        """Tell sentences to the user."""
        for sentence in sentences:
            self.tell(Note(sentence))

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """Make all updates that are left, and save the last position.

        Raises:
            RunError: the run cannot go on; its newest checkpoint is intact. Interrupted: the user ended it.
        """
        if self.at.step == 0 and self.at.before is None:
            self.at = replace(self.at, before=self._evaluated())
        self._metrics_at_start = self.setting.directory.metrics_bytes
        while not self._over():
            self._stop_where_asked()
            step = self.at.step
            if not self._update():
                continue
            due = bool(self.setting.prepared.held_out) and self._due(step + 1)
            if due and not self._evaluate():
                continue
            self.say(self.setting.keeper.news())
            if self._over():
                break
            wanted = self._reached(self.plan.value("save_steps"), step + 1) or (due and self._may_be_best())
            if wanted and self.at.in_a_row == 0:  # a checkpoint to go back to is one that a sound update led to
                self.save()
        if self.watch.stop_reason is not None and self.at.ended is None:
            self.at = replace(self.at, ended=self.watch.stop_reason)
            self.tell(Note(self.watch.stop_reason))
        self.save(wait=True)

    def _may_be_best(self) -> bool:
        """Whether the weights just evaluated may be wanted at the end; where nothing can tell yet, they may."""
        return self.plan.value("load_best_model_at_end") and self.watch.best_step in (None, self.at.step)

    def _over(self) -> bool:
        return self.at.step >= self.plan.updates or self.watch.stop_reason is not None or self.at.ended is not None

    def _due(self, done: int) -> bool:
        return self._reached(self.plan.value("eval_steps"), done) or done == self.plan.updates

    def _reached(self, every: int, done: int) -> bool:
        """Whether a multiple of `every` is reached; within a set of updates it waits for the end of the set."""
        return self._between_sets(done) and done % every < self.setting.prepared.mixture.in_a_set

    def _between_sets(self, done: int) -> bool:
        return done % self.setting.prepared.mixture.in_a_set == 0

    def _stop_where_asked(self) -> None:
        number = self.asked.number if self.ranks.alone else self._asked
        if number is None or not self._between_sets(self.at.step):
            return
        run, step, name = self.setting.directory.path, self.at.step, name_of(number)
        if step == 0:
            raise Interrupted(number, f"ended by {name} before the first update: nothing is lost")
        self.save(wait=True)
        saved = self.setting.keeper.saved
        where = "nothing could be saved" if saved is None else f"update {saved} of {self.plan.updates} is saved"
        text = f"ended by {name} after update {step}; {where}; go on with: welltuned resume {run}"
        raise Interrupted(number, text, quiet=not self.ranks.is_first)

    # ── one update ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _update(self) -> bool:
        """One update, or the decision to leave it out; False where the run went back instead."""
        started, step = time.perf_counter(), self.at.step
        prepared = self.setting.prepared
        chosen = prepared.mixture.update(self.batch, step)
        rows = [prepared.train[i] for i in chosen]
        keys = [dropout_key(self.plan.value("seed"), step, i) for i in chosen]
        try:
            made = self._gradient(rows, keys)
            norm = clip_(self.trained.grad_KP, self.plan.value("max_grad_norm"), self._sum.lengths())[0]
            what = (
                None
                if is_sound(norm, made)
                else f"the gradient of update {step + 1} is not finite (its length: {norm})"
            )
        except NotFinite as error:
            what = str(error)
        if what is not None:
            return self._left_out(what, rows, keys)
        rate = self.schedule.rate(step) * self.at.rate_factor
        self.optimizer.step([rate])
        if self.average is not None:
            self.average.follow(self.trained.flat_KP, step + 1)
        spent = time.perf_counter() - started
        self._guard.learn(self.engine.token_budget)
        self._most_tokens = max(made.tokens, self._most_tokens or 0)
        self.at = replace(
            self.at, step=step + 1, in_a_row=0, seconds=self.at.seconds + spent, tokens=self.at.tokens + made.tokens
        )
        self._tell_update(made, rows, norm, rate, spent)
        return True

    def _tell_update(self, made: Gradient, rows: Sequence[Any], norm: float, rate: float, spent: float) -> None:
        step, total, prepared = self.at.step, self.plan.updates, self.setting.prepared
        self.tell(
            Updated(
                step=step,
                total_steps=total,
                loss=made.loss,
                learning_rate=rate,
                grad_norm=norm,
                tokens=made.tokens,
                supervised_tokens=made.supervised_tokens,
                tokens_per_second=made.tokens / spent,
                epoch=step / prepared.mixture.steps_per_epoch(self.batch),
                memory_bytes=memory_used(self.plan.facts.machine.device).now,
                seconds_left=self.at.seconds / step * (total - step),
                evaluation_follows=bool(prepared.held_out) and self._due(step),
                measures=made.measures,
                weight_change=self._movement.relative(),
                origins=tuple(row.origin for row in rows),
            )
        )
        self.say(made.notes)

    def _gradient(self, rows: Sequence[Any], keys: Sequence[int]) -> Gradient:
        """The update's gradient, summed over the ranks."""
        return self._sum.of(lambda: self._own_gradient(rows, keys), self._word, self._heed)

    def _own_gradient(self, rows: Sequence[Any], keys: Sequence[int]) -> Gradient:
        """This rank's part, in smaller pieces where memory does not suffice; always from a cleared buffer."""
        where = f"update {self.at.step + 1}"
        while (lacking := self._guard.short_of(self.engine.token_budget)) > 0:
            self._shrink(f"{where} would need {lacking / 1e6:,.0f} MB more than are free")

        def make() -> Gradient:
            self.optimizer.zero_grad()
            return self.setting.objective.accumulate_gradient(self.engine, rows, keys)

        return self.with_memory(make, where)

    def _word(self) -> Word:
        """What the other ranks do not know of this one."""
        notes, self._unsaid = tuple(self._unsaid), []
        news = self.asked.number is not None and self._asked is None
        return Word(token_budget=self.engine.token_budget, notes=notes, signal=self.asked.number if news else None)

    def _heed(self, words: Sequence[Word]) -> None:
        """Take in what the ranks say."""
        self._asked = next((word.signal for word in words if word.signal is not None), self._asked)
        self.cut_to(min(word.token_budget for word in words))
        self.say([f"process {rank}: {note}" for rank, word in enumerate(words) for note in word.notes])

    def cut_to(self, budget: int) -> None:
        """Micro-batches of at most so many tokens from here on."""
        self.engine = replace(self.engine, token_budget=budget)
        self.at = replace(self.at, token_budget=budget)

    def with_memory(self, make: Callable[[], T], where: str) -> T:
        """What `make` gives, tried again with a smaller token budget each time that memory is out."""
        if self.engine.shards is not None:
            return self.engine.shards.once(make)
        return retried(make, lambda: self._shrink(f"{where} ran out of memory"))

    def _shrink(self, why: str) -> None:
        budget = self.engine.token_budget
        if budget <= 1:
            mend = "set gradient_checkpointing: true, a lower max_length, or use a smaller model"
            raise RunError(f"{why}, though every example is computed by itself; {mend}")
        smaller = halved(budget, self._most_tokens)
        self.cut_to(smaller)
        text = f"{why}: micro-batches hold at most {smaller:,} tokens from here on, not {budget:,}"
        text += "; the effective batch, and with it the result, stays the same"
        if self.ranks.is_first:
            self.tell(Note(text))
        else:
            self._unsaid.append(text)

    # ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _evaluated(self) -> Evaluation | None:
        prepared = self.setting.prepared
        if not prepared.held_out:
            return None
        found = self.with_memory(
            lambda: self.setting.objective.evaluate(self.engine, prepared.held_out), "the evaluation"
        )
        rows = found.loss_of_example, found.tokens_of_example
        self.tell(Evaluated(self.at.step, found.loss, found.standard_error, found.measures, *rows, found.samples))
        self.say(found.notes)
        return replace(found, samples=(), notes=())  # told, and nothing for a checkpoint to hold

    def _evaluate(self) -> bool:
        """Evaluate here; False where that was impossible and the run went back."""
        try:
            self.at = replace(self.at, last=self._evaluated())
        except NotFinite as error:
            back_or_stop(self, str(error))
            return False
        return True

    # ── numbers that are not finite ──────────────────────────────────────────────────────────────────────────────────

    def _left_out(self, what: str, rows: Sequence[Any], keys: Sequence[int]) -> bool:
        """Leave this update out: nothing of it reaches weights or moments. False where the run went back."""
        self.optimizer.zero_grad()
        if not all(self.ranks.gather(lambda: bool(torch.isfinite(self.trained.flat_KP).all()))):
            back_or_stop(self, f"trained weights are not finite at update {self.at.step + 1}")
            return False
        finite = finite_alone(self._gradient, self._sum.lengths, self.trained.grad_KP, rows, keys)
        found = tuple(rows[i].origin for i in culprits(rows, finite))
        self.at = replace(self.at, step=self.at.step + 1, skipped=self.at.skipped + 1, in_a_row=self.at.in_a_row + 1)
        self.tell(Skipped(self.at.step, self.plan.updates, what, found))
        at_the_end = self.at.step == self.plan.updates  # where no later update can show that only rows were at fault
        if self.at.in_a_row >= (2 if at_the_end else IN_A_ROW):
            named = ", ".join(found[:5]) if len(found) < len(rows) else "no row alone"
            count = f"{self.at.in_a_row} updates in a row were not finite"
            back_or_stop(self, f"{count}, the last: {what} (at fault: {named})")
            return False
        return True

    def start_over(self) -> bool:
        """Everything as before the first update; False where that is not possible."""
        if not self.numbers.start_over():
            return False
        self.at = replace(self.at, step=0, last=None, monitor={})
        self.setting.directory.cut_metrics(self._metrics_at_start)
        self.setting.directory.cut_samples(0)
        self.watch = self._make_watch(self.plan, {})
        return True

    # ── saving and going on ──────────────────────────────────────────────────────────────────────────────────────────

    def save(self, *, wait: bool = False) -> None:
        """Begin to save this position; with `wait`, until it is on the disk."""
        if self.numbers.pieces is None:
            self.ranks.require_equal(f"the weights or moments after update {self.at.step}", self.numbers.flat)
        if not self.ranks.alone:
            self._heed(self.ranks.gather(self._word))
        now = time.monotonic()
        self.at = replace(
            self.at,
            elapsed=self.at.elapsed + now - self._clock,
            best=self.watch.best_step,
            monitor=self.watch.state(),
        )
        self._clock = now
        if self.numbers.pieces is None:
            self.ranks.first(lambda: self._keep(wait))
        else:
            from welltuned.training.pieces import keep_pieces

            keep_pieces(self, self.numbers.pieces)

    def _keep(self, wait: bool) -> None:
        keeper = self.setting.keeper
        if wait:
            self.say(keeper.join())
        if not keeper.has(self.at.step):
            self.say(keeper.save(self.snapshot, wait=wait))

    def snapshot(self, copied: bool) -> Snapshot:
        """The run as it is here; see `Numbers.take`."""
        length = self.setting.directory.metrics_bytes
        return self.numbers.take(self.at, self.setting.origin, length, copied=copied)

    def since_save(self) -> float:
        """Seconds since the last position that knows its time."""
        return time.monotonic() - self._clock

    def restore(self, found: Checkpoint | None) -> None:
        """Go on from a checkpoint: weights, moments, position, the monitor, and the length of metrics.jsonl.

        Args:
            found: None on ranks beside the first, which alone reads it.

        Raises:
            RunError: it holds other tensors than the model has.
        """
        self.at, self._clock = self.numbers.restore(found, self.ranks), time.monotonic()
        self.optimizer.zero_grad()
        self.cut_to(min(self.engine.token_budget, self.at.token_budget))  # the recipe's may be less by now
        self.watch = self._make_watch(self.plan, self.at.monitor)
        if found is None:
            return
        self.setting.keeper.resumed(self.at.step, self.at.best, found.run)
        self.setting.directory.cut_samples(self.at.step)
        missing = self.setting.directory.cut_metrics(found.metrics_bytes)
        if missing:
            self.tell(Note(f"metrics.jsonl had lost {missing:,} bytes that belong before update {self.at.step}"))


def dropout_key(seed: int, step: int, row: int) -> int:
    """Names an example's dropout masks in one update."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{row}".encode(), digest_size=7).digest())
