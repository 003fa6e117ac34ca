"""What a search knows of its arms, and what follows: who goes on, who is dropped, who begins, who has won.

No weights here: the rounds are made elsewhere, in this process (`loop`) or on many machines (`cluster`).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from welltuned.advice.learning_rate import two_digits
from welltuned.advice.plan import Plan
from welltuned.advice.settle import shown, span_words
from welltuned.errors import InputError
from welltuned.search.applied import RATE
from welltuned.search.arms import Arm, arm_of, prior_of
from welltuned.search.events import ArmAdded, ArmEnded, ArmJudged, SearchEvent
from welltuned.search.forecast import affordable, minutes_words
from welltuned.search.halving import Decision, Entry, Look, decide, mean, paired, rungs
from welltuned.search.state import ArmState, RungRecord, State, Status
from welltuned.training.events import Note


class Sampler(Protocol):
    """Who proposes arms from what earlier ones came to.

    Attributes:
        trials: arms of the whole search. batch: how many are asked for at once.
    """

    @property
    def trials(self) -> int: ...

    @property
    def batch(self) -> int: ...

    def ask(self, told: Sequence[tuple[Mapping[str, object], float | None]], count: int) -> list[dict[str, object]]:
        """Settings of the next arms.

        Args:
            told: settings of every arm so far with its loss; None where it diverged.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How arms are judged.

    Attributes:
        advised: the rate that the advice gives for each group, from which its prior is made.
        rates: whether the rate is searched, so that new arms may be tried at others.
        grid: train every arm to its end and compare at the rungs, without acting on it.
        seconds: what the search may take; None for no limit.
        sampler: proposes arms at the first rung until all trials are spent; None where all arms are there at the start.
    """

    advised: Mapping[str, float] = field(default_factory=dict)
    rates: bool = True
    grid: bool = False
    seconds: float | None = None
    sampler: Sampler | None = None


class Board:
    """The arms and their state.

    Args:
        plan: what the arms depart from. weights: what each held-out row weighs in the mean loss.

    Attributes:
        shares: after which shares of its run each arm is judged.
        last_decision: None where a search goes on after its last decision.
    """

    def __init__(
        self,
        plan: Plan,
        arms: Sequence[Arm],
        weights: Sequence[int],
        rules: Rules,
        tell: Callable[[SearchEvent], None],
    ):
        self.plan, self.weights, self.rules, self.tell = plan, weights, rules, tell
        self.arms = {arm.number: arm for arm in arms}
        self.state = State(arms=tuple(ArmState(number=a.number, settings=a.settings) for a in arms))
        self.last_decision: Decision | None = None
        self.shares = shares_of(arm.plan.updates for arm in arms)

    def restore(self, state: State) -> None:
        """Go on from a state, whose later arms are planned again."""
        self.state = state
        for arm in state.arms:
            known = self.arms.get(arm.number)
            if known is None or dict(known.settings) != dict(arm.settings):
                self.arms[arm.number] = arm_of(self.plan, arm.number, arm.settings)

    # ── where it is ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def share_now(self) -> float:
        return self.shares[min(self.state.target, len(self.shares) - 1)]

    def due(self, arm: ArmState) -> float | None:
        """The share of its run after which an arm is judged next; None where it waits for the others.

        Arms that a sampler proposed take the earlier looks as well, so that their slopes are known.
        """
        last = arm.looks[-1].share if arm.looks else 0.0
        shares = self.shares[: self.state.target + 1] if self.rules.sampler is not None else (self.share_now,)
        return next((share for share in shares if share > last), None)

    def goal(self, arm: ArmState) -> int:
        """The update that an arm works towards: the same share of its run for all."""
        share = self.due(arm)
        return arm.step if share is None else math.ceil(share * self.arms[arm.number].plan.updates - 1e-6)

    def behind(self) -> list[ArmState]:
        """Arms that have updates to make before the next look."""
        return [a for a in self.state.arms if a.status is Status.ALIVE and a.step < self.goal(a)]

    def of(self, number: int) -> ArmState:
        return next(a for a in self.state.arms if a.number == number)

    def entries(self) -> list[Entry]:
        """Every arm as the decisions take it."""
        return [a.entry(self.arms[a.number].x, self.arms[a.number].group) for a in self.state.arms if a.looks]

    # ── what became of an arm ────────────────────────────────────────────────────────────────────────────────────────

    def tell_arm(self, number: int, why: str = "") -> None:
        self.tell(ArmAdded(number, self.arms[number].name, why))

    def introduce(self, observer: Callable[[SearchEvent], None]) -> None:
        """Name every arm, and those that ended, to somebody who comes in the middle; the Run's files know them."""
        for arm in self.state.arms:
            observer(ArmAdded(arm.number, self.arms[arm.number].name, ""))
            if not arm.alive:
                observer(ArmEnded(arm.number, arm.step, str(arm.status), arm.why))

    def end(self, number: int, status: Status, why: str) -> None:
        arm = self.of(number)
        self.state = self.state.with_arm(replace(arm, status=status, why=why))
        self.tell(ArmEnded(number, arm.step, str(status), why))

    def looked(self, number: int, share: float, losses: tuple[float, ...], tokens: int) -> None:
        """Take note of an arm's held-out losses; `tokens` were passed through the model for them."""
        self.state = self.state.with_arm(replace(self.of(number), looks=(*self.of(number).looks, Look(share, losses))))
        self.state = replace(self.state, evaluated=self.state.evaluated + tokens)
        if not all(map(math.isfinite, losses)):
            self.end(number, Status.DIVERGED, "its held-out loss is not finite")
        elif share >= 1:
            self.state = self.state.with_arm(replace(self.of(number), status=Status.DONE))

    def tell_looks(self, numbers: Sequence[int], share: float) -> None:
        """Each of these arms beside the best that was judged after the same share of its run."""
        there = {e.arm: e.until(share) for e in self.entries() if e.alive and any(x.share == share for x in e.looks)}
        if not there:
            return
        best = min(there.values(), key=lambda e: mean(e, self.weights))
        for number in (n for n in numbers if n in there):
            gap, loss = paired(there[number], best, self.weights), mean(there[number], self.weights)
            step = math.ceil(share * self.arms[number].plan.updates - 1e-6)
            self.tell(ArmJudged(number, step, share, loss, gap.mean, gap.error))

    # ── what follows ─────────────────────────────────────────────────────────────────────────────────────────────────

    def judge(self, elapsed: float) -> tuple[int, ...]:
        """Act on the looks of this share, once all arms have theirs; the numbers of arms that begin now.

        Those must catch up before anything else is decided.

        Args:
            elapsed: seconds so far.
        """
        begun = self._asked(elapsed)
        if begun:
            return begun
        last = self.share_now >= 1
        if last or self.state.target > 0:  # the first look is there for its slope only
            begun = self._act(self.decide(), last, elapsed)
        if not begun:
            self.state = replace(self.state, target=self.state.target + 1)
        return begun

    def decide(self) -> Decision:
        first = {arm.group: arm for arm in reversed(self.arms.values())}
        centre = self.rules.advised
        priors = {g: prior_of(arm, centre.get(g, arm.plan.value(RATE))) for g, arm in first.items()}
        following = self.shares[min(self.state.target + 1, len(self.shares) - 1)]
        extended, rates = self.state.extended, self.rules.rates
        return decide(self.entries(), self.weights, priors, extended=extended, rates=rates, following=following)

    def _act(self, decision: Decision, last: bool, elapsed: float) -> tuple[int, ...]:
        self.last_decision = decision
        self._record(decision)
        settled = self.rules.grid or self.state.winner is not None
        if last and (settled or decision.add is None):
            self.state = replace(self.state, winner=decision.leader, ended=True)
            return ()
        if self.rules.grid:
            return ()
        for number, why in decision.drop.items():
            self.end(number, Status.DROPPED, why)
        if decision.stop is not None:
            self._settle(decision.leader, f"the search stopped: {decision.stop}")
        elif not last:
            self._keep_to_time(decision.leader, elapsed)
        if decision.add is None or self.state.winner is not None or not self._has_time(1, elapsed):
            if last:  # no time for another arm
                self.state = replace(self.state, winner=decision.leader, ended=True)
            return ()
        return (self._extend(decision),)

    def _settle(self, leader: int, why: str) -> None:
        """The leader goes on alone."""
        for arm in self.state.alive:
            if arm.number != leader:
                self.end(arm.number, Status.DROPPED, why)
        self.state = replace(self.state, winner=leader)

    def _extend(self, decision: Decision) -> int:
        """Another arm in the leader's group."""
        assert decision.add is not None
        x, why = decision.add
        leader = self.arms[decision.leader]
        rate = leader.plan.value(RATE) * math.exp(x - leader.x)
        self.state = replace(self.state, extended=self.state.extended or "edge" in why)
        return self._begin({**leader.settings, RATE: float(f"{rate:.1e}")}, why)

    def _begin(self, settings: Mapping[str, object], why: str) -> int:
        number = len(self.state.arms)
        self.arms[number] = arm_of(self.plan, number, settings)
        state = ArmState(number=number, settings=self.arms[number].settings)
        self.state = replace(self.state, arms=(*self.state.arms, state))
        self.tell_arm(number, why)
        return number

    # ── a sampler's arms ─────────────────────────────────────────────────────────────────────────────────────────────

    def _asked(self, elapsed: float) -> tuple[int, ...]:
        """At the first rung: the next batch of a sampler's arms, after those that cannot win have ended."""
        sampler = self.rules.sampler
        rung = 1 if len(self.shares) > 1 else 0
        left = 0 if sampler is None else sampler.trials - len(self.state.arms) - self.state.refused
        if sampler is None or self.state.target != rung or left <= 0:
            return ()
        if self.share_now < 1:
            for number, why in self.decide().drop.items():
                self.end(number, Status.DROPPED, why)
        if not self._has_time(sampler.batch, elapsed):
            assert self.rules.seconds is not None
            self.tell(Note(f"{left} arms are not tried: {minutes_words(self.rules.seconds)} do not suffice for more"))
            self.state = replace(self.state, refused=self.state.refused + left)
            return ()
        begun = []
        for settings in sampler.ask(self._told(self.shares[rung]), min(left, sampler.batch)):
            try:
                begun.append(self._begin(settings, "proposed by the sampler"))
            except InputError as error:
                self.state = replace(self.state, refused=self.state.refused + 1)
                self.tell(Note(f"a proposed arm was left out: {error}"))
        if not begun:
            self.state = replace(self.state, refused=self.state.refused + left)  # nothing else is left to try
        return tuple(begun)

    def _told(self, share: float) -> list[tuple[Mapping[str, object], float | None]]:
        at = {e.arm: e.until(share) for e in self.entries() if any(look.share == share for look in e.looks)}
        losses = {number: mean(entry, self.weights) for number, entry in at.items()}
        finite = {number: loss for number, loss in losses.items() if math.isfinite(loss)}
        return [(a.settings, finite.get(a.number)) for a in self.state.arms]

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _seconds_of_run(self, elapsed: float) -> float:
        """What one whole run takes, by what was measured so far: evaluations and saves are in it."""
        runs = sum(a.step / self.arms[a.number].plan.updates for a in self.state.arms)
        return elapsed / runs if runs else math.inf

    def _has_time(self, arms: int, elapsed: float) -> bool:
        """Whether so many more arms could be trained as far as the others, and one to its end."""
        if self.rules.seconds is None:
            return True
        needed = (arms * self.share_now + 1 - self.share_now) * self._seconds_of_run(elapsed)
        return elapsed + needed <= self.rules.seconds

    def _keep_to_time(self, leader: int, elapsed: float) -> None:
        """Drop the arms behind for which the time does not suffice as far as the next look."""
        if self.rules.seconds is None or self.state.winner is not None:
            return
        following = self.shares[min(self.state.target + 1, len(self.shares) - 1)]
        left = (self.rules.seconds - elapsed) / self._seconds_of_run(elapsed)
        order = sorted((e for e in self.entries() if e.alive), key=lambda e: mean(e, self.weights))
        others = [e.arm for e in order if e.arm != leader]
        many = affordable(left, self.share_now, following)
        for number in others[many - 1 :]:
            self.end(number, Status.DROPPED, f"behind, and {minutes_words(self.rules.seconds)} do not suffice for all")
        if many > 1:
            return
        self.state = replace(self.state, winner=leader)
        if 1 - self.share_now > left:
            needs = span_words((1 - self.share_now) * self._seconds_of_run(elapsed))
            what = f"{self.arms[leader].name} alone needs about {needs} to its end, which is beyond"
            self.tell(Note(f"{what} the {minutes_words(self.rules.seconds)}; it is not cut short"))

    # ── what is remembered ───────────────────────────────────────────────────────────────────────────────────────────

    def _record(self, decision: Decision) -> None:
        curve, leader = decision.curve, self.arms[decision.leader]
        share = self.share_now
        best = None if curve is None else leader.plan.value(RATE) * math.exp(curve.x - leader.x)
        said = [f"arm {n} ({self.arms[n].name}): {why}" for n, why in decision.drop.items()]
        stop = decision.stop if self.state.winner is None else None  # else it stopped before
        said += [stop] if stop is not None else []
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
        at = ""
        if best is not None and curve is not None:
            at = f"; the best rate is about {shown(two_digits(best))} (×/÷ {math.exp(curve.x_error):.2f})"
        what = "it is" if share >= 1 else "to choose it now is"
        text = f"at {share:.0%} {leader.name} leads; {what} expected to cost {decision.regret:.2%} of the loss{at}"
        text += f". The search stops: {stop}" if stop is not None else ""
        if share >= 1 or len(self.state.alive) > 1:  # alone there is nothing to lead
            self.tell(Note(text))


def shares_of(updates: Iterable[int]) -> tuple[float, ...]:
    """After which shares of its run each arm is judged, by the shortest: half-way to the first rung, and the rungs."""
    shortest = min(updates)
    found = rungs(shortest)
    steps = ((found[0] + 1) // 2, *found) if 1 < found[0] < shortest else found
    return tuple(step / shortest for step in steps)
