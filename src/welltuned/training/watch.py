"""The monitor: sees every event of a run, says in words what goes wrong, and when to stop.

A run shows it each event and tells what it finds. It reads numbers only, so that training is bit for bit the same with
it or without, and its state is JSON: a resumed run goes on as if it had never stopped.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from welltuned.advice.plan import Plan
from welltuned.choice import SetBy
from welltuned.training.events import Evaluated, Event, Finding, Updated
from welltuned.training.monitor import divergence, overfitting, preference, rollouts, spikes, throughput, underfitting
from welltuned.training.monitor.history import History
from welltuned.training.monitor.overfitting import judged_by
from welltuned.training.monitor.warmup import never_warm


def is_divergence(ended: str | None, findings: Iterable[Finding]) -> bool:
    """Whether what ended a run early is that it diverged, not a held-out loss that had turned."""
    return ended is not None and any(finding.id == divergence.ID for finding in findings)


Detector = Callable[[History, Plan], Finding | None]

DETECTORS: tuple[Detector, ...] = (
    divergence.diverged,
    spikes.spike,
    spikes.spikes,
    overfitting.overfitting,
    overfitting.memorising,
    overfitting.too_small_to_tell,
    underfitting.unmoved,
    underfitting.not_learning,
    underfitting.still_falling,
    never_warm,
    throughput.slowed,
    preference.untrained_preference,
    rollouts.entropy_collapse,
    rollouts.no_signal,
    rollouts.truncation,
    rollouts.kl_blow_up,
    rollouts.flat_reward,
)
FORMAT = 1


class Watch:
    """Watches one run.

    Attributes:
        findings: all so far, in order. A run tells each kind once.
        stop_reason: why the run should end now, as a sentence; None to go on.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.history = History()
        self.findings: list[Finding] = []
        self.stop_reason: str | None = None

    @property
    def best_step(self) -> int | None:
        """After which update the held-out rows were judged best; None where nothing can tell."""
        return self.history.best if overfitting.can_tell(self.history, self.plan) else None

    def see(self, event: Event) -> tuple[Finding, ...]:
        """What this event shows that was not said before."""
        match event:
            case Updated():
                self.history.add_update(event)
                if event.evaluation_follows:  # judged with it
                    return ()
            case Evaluated():
                self.history.add_evaluation(event)
            case _:
                return ()
        said = {finding.id for finding in self.findings}
        judged = (detector(self.history, self.plan) for detector in DETECTORS)
        new = tuple(finding for finding in judged if finding is not None and finding.id not in said)
        self.findings.extend(new)
        self.stop_reason = self.stop_reason or self._reason_to_stop(new)
        return new

    def _reason_to_stop(self, new: tuple[Finding, ...]) -> str | None:
        """Divergence, unless the user has set a patience of 0; or a held-out loss that has turned for that long."""
        patience = self.plan.choices["early_stopping_patience"]
        never = patience.set_by is SetBy.USER and not patience.value
        diverged = next((finding for finding in new if finding.id == divergence.ID), None)
        if diverged is not None and not never:
            return f"stopped after {diverged.step} updates: {diverged.what}"
        best, count = self.history.best_evaluation, overfitting.rising_evaluations(self.history)
        if not patience.value or best is None or count < patience.value or self.best_step is None:
            return None
        last = self.history.evaluations[-1]
        return (
            f"stopped after {self.history.step} updates: the held-out {judged_by(self.plan)} is {last.loss:.3f} and "
            f"was {best.loss:.3f} after {best.step}; by more than two standard errors in {count} evaluations running"
        )

    def state(self) -> dict[str, Any]:
        """All of it as JSON; `restored` reads it back."""
        return {
            "format": FORMAT,
            "history": self.history.to_json(),
            "findings": [finding.to_json() for finding in self.findings],
            "stop_reason": self.stop_reason,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], plan: Plan) -> "Watch":
        """The watch as it was when `state` was taken; a new one where the state is empty."""
        watch = cls(plan)
        if not state:
            return watch
        watch.history = History.from_json(state["history"])
        watch.findings = [Finding.from_json(finding) for finding in state["findings"]]
        watch.stop_reason = state["stop_reason"]
        return watch


def monitor(plan: Plan, state: Mapping[str, Any]) -> Watch:
    """The watch of a run, from the state that a checkpoint holds of it, empty at the start."""
    return Watch.restored(state, plan) if state else Watch(plan)
