"""All rounds of a search: what is trained, judged, decided, saved and told."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from welltuned.advice.plan import Plan
from welltuned.advice.settle import shown
from welltuned.data.mix import Mixture
from welltuned.errors import RunError
from welltuned.search.arms import RATE, Arm, arm_of, prior_of
from welltuned.search.bank import Bank
from welltuned.search.events import (
    ArmAdded,
    ArmEnded,
    ArmJudged,
    ArmUpdated,
    SearchEvent,
    SearchObserver,
    evaluated,
    line_of,
    update_event,
)
from welltuned.search.halving import Decision, Entry, Look, decide, mean, paired, rungs
from welltuned.search.items import Items, Share, row_losses
from welltuned.search.room import Room
from welltuned.search.state import ArmState, RungRecord, State, Status
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
from welltuned.training.step import Engine, Evaluation, Gradient, Objective
from welltuned.training.watch import Watch


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a search works on.

    Attributes:
        arms: those of the start.
        advised: the rate that the advice gives for each group, from which its prior is made.
        rates: whether the rate is searched, so that new arms may be tried at others.
        grid: train every arm to its end and compare at the rungs, without acting on it.
    """

    engine: Engine
    items: Items
    objective: Objective
    prepared: Prepared
    arms: tuple[Arm, ...]
    advised: Mapping[str, float]
    directory: RunDir
    keeper: Keeper
    origin: Origin
    rates: bool = True
    grid: bool = False


class Search:
    """The rounds from a position on.

    Attributes:
        state: what is known of every arm. rounds: rounds made.
    """

    def __init__(self, setting: Setting, observer: SearchObserver, asked: Asked):
        self.setting, self.asked, self._observer = setting, asked, observer
        self.plan: Plan = setting.prepared.plan
        self.arms = {arm.number: arm for arm in setting.arms}
        numbers = tuple(self.arms)
        states = tuple(ArmState(number=n, settings=self.arms[n].settings, like=n) for n in numbers)
        self.state = State(arms=states, bank=numbers)
        self.bank = Bank(setting.engine, adamw_settings(self.plan), rate_spans(self.plan, setting.engine.trained))
        self.rounds, self.seconds, self.elapsed = 0, 0.0, 0.0
        self.before: Evaluation | None = None
        self.last_decision: Decision | None = None
        self.shares = shares_of(arm.plan.updates for arm in setting.arms)
        self._watches: dict[int, Watch] = {}
        self._schedules: dict[int, Schedule] = {}
        self.room = Room(self.plan, setting.engine.token_budget, lambda text: self.tell(Note(text)))
        self._clock = time.monotonic()
        self.weights = [setting.items.weight(row) for row in setting.prepared.held_out]
        self._eval_tokens = sum(setting.items.length(row) for row in setting.prepared.held_out)

    @property
    def engine(self) -> Engine:
        """With the token budget that memory allows."""
        return replace(self.setting.engine, token_budget=self.room.budget)

    # ── telling ──────────────────────────────────────────────────────────────────────────────────────────────────────

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
        if self.before is None:
            self.before = self.room.give(
                lambda: self.setting.objective.evaluate(self.engine, self.setting.prepared.held_out), "the evaluation"
            )
            for number in self.arms:
                self.watch(number).see(evaluated(0, self.before))
                self._tell_arm(number, "")
        while not self.state.ended:
            self._stop_where_asked()
            if self._round():
                if self.rounds % self.plan.value("save_steps") == 0:
                    self.save()
            else:
                self._judge()
            self._say(self.setting.keeper.news())
        self.save(wait=True)
        if self.last_decision is None:  # it went on after its last decision
            self.last_decision = self._decide()
        assert self.state.winner is not None
        return self.arms[self.state.winner]

    def _tell_arm(self, number: int, why: str) -> None:
        self.tell(ArmAdded(number, self.arms[number].name, why))

    @property
    def _share_now(self) -> float:
        return self.shares[min(self.state.target, len(self.shares) - 1)]

    def _target(self, number: int) -> int:
        """The update that an arm works towards: the same share of its run for all."""
        return math.ceil(self._share_now * self.arms[number].plan.updates - 1e-6)

    # ── one round ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _round(self) -> bool:
        """One update of every arm that is behind; False where none is."""
        behind = [a for a in self.state.arms if a.status is Status.ALIVE and a.step < self._target(a.number)]
        if not behind:
            return False
        started = time.perf_counter()
        row_of = {number: k for k, number in enumerate(self.state.bank)}
        behind.sort(key=lambda arm: row_of[arm.number])
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
        return True

    def _share(self, arm: ArmState, k: int) -> Share:
        plan, prepared = self.arms[arm.number].plan, self.setting.prepared
        seed = plan.value("seed")
        chosen = self._mixture(arm.number).update(plan.value("effective_batch_size"), arm.step)
        return Share(k, [prepared.train[i] for i in chosen], [dropout_key(seed, arm.step, i) for i in chosen])

    def _mixture(self, number: int) -> Mixture:
        return replace(self.setting.prepared.mixture, seed=self.arms[number].plan.value("seed"))

    def _schedule(self, number: int) -> Schedule:
        if number not in self._schedules:
            self._schedules[number] = schedule_of(self.arms[number].plan)
        return self._schedules[number]

    def _updated(self, arm: ArmState, k: int, made: Gradient, norm: float, rate: float | None) -> None:
        """Take note of one arm's update, or of one that was left out since it was not finite."""
        step, total = arm.step + 1, self.arms[arm.number].plan.updates
        sound = rate is not None
        arm = replace(
            arm,
            step=step,
            tokens=arm.tokens + made.tokens,
            skipped=arm.skipped + (not sound),
            in_a_row=0 if sound else arm.in_a_row + 1,
        )
        watch = self.watch(arm.number)
        if sound and rate is not None:
            watch.see(update_event(step, total, made, norm, rate))
            smooth = watch.history.smooth
            arm = replace(arm, loss=made.loss if smooth is None else smooth)
            self._tell_update(arm.number, made, norm, rate)
        self.state = self.state.with_arm(replace(arm, monitor=watch.state()))
        broken = next((f.what for f in watch.findings if f.id == divergence.ID), None)
        if not sound and (arm.in_a_row >= IN_A_ROW or not self.bank.is_finite(k)):
            broken = f"{arm.in_a_row} updates in a row were not finite"
        if broken is not None:
            self._end(arm.number, Status.DIVERGED, broken)

    def _tell_update(self, number: int, made: Gradient, norm: float, rate: float) -> None:
        step, total = self._state(number).step + 1, self.arms[number].plan.updates
        counted = made.tokens, made.supervised_tokens
        self.tell(ArmUpdated(number, step, total, step / total, made.loss, rate, norm, *counted))

    def watch(self, number: int) -> Watch:
        if number not in self._watches:
            state = next(a.monitor for a in self.state.arms if a.number == number)
            self._watches[number] = Watch.restored(state, self.arms[number].plan)
        return self._watches[number]

    def _end(self, number: int, status: Status, why: str) -> None:
        arm = next(a for a in self.state.arms if a.number == number)
        self.state = self.state.with_arm(replace(arm, status=status, why=why))
        self.tell(ArmEnded(number, arm.step, str(status), why))

    def _compact(self, added: Sequence[int] = ()) -> None:
        """Give the room of arms that ended to the others; new ones begin in rows of their likes."""
        alive = {a.number for a in self.state.alive}
        if not alive and not added:
            raise RunError("every arm diverged; lower learning_rate in the recipe, or look at the rows")
        kept = tuple(n for n in self.state.bank if n in alive and n not in added)
        if kept == self.state.bank and not added:
            return
        row_of = {number: k for k, number in enumerate(self.state.bank)}
        likes = {a.number: a.like for a in self.state.arms}
        mates = [next(k for n, k in row_of.items() if likes[n] == likes[number]) for number in added]
        self.bank.keep([*(row_of[n] for n in kept), *mates], fresh=range(len(kept), len(kept) + len(added)))
        self.state = replace(self.state, bank=(*kept, *added))

    # ── judging ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _judge(self) -> None:
        """Judge every arm that has reached the target, and act on it where the target is a rung."""
        numbers = [a.number for a in self.state.alive if self._lacks_look(a)]
        self._look(numbers)
        self._compact()
        last = self._share_now >= 1
        if last or self.state.target > 0:  # the first look is there for its slope only
            decision = self._decide()
            if self._act(decision, last):
                self.save()
                return
        self.state = replace(self.state, target=self.state.target + 1)
        self.save()

    def _lacks_look(self, arm: ArmState) -> bool:
        return not arm.looks or arm.looks[-1].share < self._share_now

    def _look(self, numbers: Sequence[int]) -> None:
        row_of = {number: k for k, number in enumerate(self.state.bank)}
        some = sorted(numbers, key=lambda n: row_of[n])

        def losses() -> list[list[float]]:
            with nullcontext() if self._share_now >= 1 else self.bank.averaged():
                return self._row_losses([row_of[n] for n in some])

        for number, found in zip(some, self.room.give(losses, "the evaluation"), strict=True):
            self._looked(number, tuple(found))
        if self.setting.grid and 0 < self.state.target < len(self.shares) - 1:
            for number, found in zip(some, self._row_losses([row_of[n] for n in some]), strict=True):
                arm = self._state(number)
                self.state = self.state.with_arm(replace(arm, plain=(*arm.plain, Look(self._share_now, tuple(found)))))
        self.state = replace(self.state, evaluated=self.state.evaluated + self._eval_tokens * len(numbers))
        self._tell_looks(numbers)

    def _row_losses(self, rows: Sequence[int]) -> list[list[float]]:
        return row_losses(self.engine, self.setting.items, self.setting.prepared.held_out, rows)

    def _looked(self, number: int, losses: tuple[float, ...]) -> None:
        arm, share = self._state(number), self._share_now
        self.state = self.state.with_arm(replace(arm, looks=(*arm.looks, Look(share, losses))))
        if not all(map(math.isfinite, losses)):
            self._end(number, Status.DIVERGED, "its held-out loss is not finite")
        elif share >= 1:
            self.state = self.state.with_arm(replace(self._state(number), status=Status.DONE))

    def _tell_looks(self, numbers: Sequence[int]) -> None:
        entries = {e.arm: e for e in self.entries() if e.arm in numbers and e.alive}
        if not entries:
            return
        best = min(entries.values(), key=lambda e: mean(e, self.weights))
        for number, entry in entries.items():
            gap, arm = paired(entry, best, self.weights), self._state(number)
            self.tell(ArmJudged(number, arm.step, self._share_now, mean(entry, self.weights), gap.mean, gap.error))

    def entries(self) -> list[Entry]:
        """Every arm as the decisions take it."""
        return [a.entry(self.arms[a.number].x, self.arms[a.number].group) for a in self.state.arms if a.looks]

    def _state(self, number: int) -> ArmState:
        return next(a for a in self.state.arms if a.number == number)

    # ── deciding ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _decide(self) -> Decision:
        first = {arm.group: arm for arm in reversed(self.arms.values())}
        priors = {group: prior_of(arm, self.setting.advised[group]) for group, arm in first.items()}
        return decide(self.entries(), self.weights, priors, extended=self.state.extended, rates=self.setting.rates)

    def _act(self, decision: Decision, last: bool) -> bool:
        """Do what was decided; True where another arm began, which must catch up first."""
        self.last_decision = decision
        self._record(decision)
        settled = self.setting.grid or self.state.winner is not None
        if last and (settled or decision.add is None):
            self.state = replace(self.state, winner=decision.leader, ended=True)
            return False
        if self.setting.grid:
            return False
        for number, why in decision.drop.items():
            self._end(number, Status.DROPPED, why)
        if decision.stop is not None:
            for arm in self.state.alive:
                if arm.number != decision.leader:
                    self._end(arm.number, Status.DROPPED, f"the search stopped: {decision.stop}")
            self.state = replace(self.state, winner=decision.leader)
        if decision.add is None or settled:
            self._compact()
            return False
        self._add(decision)
        return True

    def _add(self, decision: Decision) -> None:
        assert decision.add is not None
        x, why = decision.add
        leader = self.arms[decision.leader]
        rate = leader.plan.value(RATE) * math.exp(x - leader.x)
        number = len(self.state.arms)
        self.arms[number] = arm_of(self.plan, number, {**leader.settings, RATE: float(f"{rate:.1e}")})
        like = self._state(decision.leader).like
        state = ArmState(number=number, settings=self.arms[number].settings, like=like)
        self.state = replace(self.state, arms=(*self.state.arms, state), extended=self.state.extended or "edge" in why)
        if self.before is not None:
            self.watch(number).see(evaluated(0, self.before))
        self._compact([number])
        self._tell_arm(number, why)

    def _record(self, decision: Decision) -> None:
        curve, leader = decision.curve, self.arms[decision.leader]
        share = self._share_now
        best = None if curve is None else leader.plan.value(RATE) * math.exp(curve.x - leader.x)
        said = [f"arm {n} ({self.arms[n].name}): {why}" for n, why in decision.drop.items()]
        said += [decision.stop] if decision.stop is not None else []
        said += [f"new arm: {decision.add[1]}"] if decision.add is not None else []
        record = RungRecord(
            share=share,
            leader=decision.leader,
            regret=decision.regret,
            best_rate=best,
            best_rate_factor=None if curve is None else math.exp(curve.x_error),
            said=tuple(said),
        )
        self.state = replace(self.state, rungs=(*self.state.rungs, record))
        at = (
            ""
            if best is None or curve is None
            else f", the best rate about {shown(best)} (×/÷ {math.exp(curve.x_error):.2f})"
        )
        self.tell(Note(f"at {share:.0%}: {leader.name} leads, expected to cost {decision.regret:.2%} of the loss{at}"))

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

    def save(self, *, wait: bool = False) -> None:
        """Begin to save this position; with `wait`, until it is on the disk."""
        keeper, now = self.setting.keeper, time.monotonic()
        if wait:
            self._say(keeper.join())
        self.elapsed, self._clock = self.elapsed + now - self._clock, now
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
        self.state, self.rounds, self.before = State.from_json(at.monitor), at.step, at.before
        self.seconds, self.elapsed, self._clock = at.seconds, at.elapsed, time.monotonic()
        for arm in self.state.arms:
            if arm.number not in self.arms:
                self.arms[arm.number] = arm_of(self.plan, arm.number, arm.settings)
        likes = {a.number: a.like for a in self.state.arms}
        first = {number: k for k, number in enumerate(arm.number for arm in self.setting.arms)}
        self.bank.keep([first[likes[number]] for number in self.state.bank])
        self.bank.restore(found)
        self.room.budget = at.token_budget
        self._watches, self._schedules = {}, {}
        self.setting.keeper.resumed(at.step, None, found.run)
        missing = self.setting.directory.cut_metrics(found.metrics_bytes)
        if missing:
            self.tell(Note(f"metrics.jsonl had lost {missing:,} bytes that belong before round {at.step}"))


def shares_of(updates: Iterable[int]) -> tuple[float, ...]:
    """After which shares of its run each arm is judged, by the shortest: half-way to the first rung, and the rungs."""
    shortest = min(updates)
    found = rungs(shortest)
    steps = ((found[0] + 1) // 2, *found) if 1 < found[0] < shortest else found
    return tuple(step / shortest for step in steps)
