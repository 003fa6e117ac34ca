"""Divergence: the loss leaves what was learned and does not come back."""

import math
from itertools import pairwise
from statistics import stdev

from welltuned.advice.plan import Plan
from welltuned.advice.settle import shown
from welltuned.recipe import Method
from welltuned.training.events import Finding, Remedy, Severity
from welltuned.training.monitor.history import History
from welltuned.training.monitor.overfitting import can_tell
from welltuned.training.monitor.remedies import advised_rate, change, lower_rate, present
from welltuned.training.monitor.robust import Difference
from welltuned.training.monitor.thresholds import limit, share_of_run

ID = "divergence"


def diverged(history: History, plan: Plan) -> Finding | None:
    """A loss that is no number or far above its lowest, held-out rows worse than before, weights out of all bounds."""
    what = _broken(history) or _outgrown(history)
    if what is None and plan.recipe.method is not Method.GRPO:  # whose loss goes up and down around zero by nature
        what = _risen(history) or (_worse_than_untrained(history) if can_tell(history, plan) else None)
    if what is None:
        return None
    return Finding(ID, Severity.ERROR, history.step, what, _cause(plan), _remedies(plan))


def _broken(history: History) -> str | None:
    return f"the loss or the gradient of {history.broken} updates was not finite" if history.broken else None


def _risen(history: History) -> str | None:
    count = share_of_run("divergence_updates", history.total)
    latest = history.updates[-count:]
    margin = max(limit("divergence_rise"), limit("divergence_spread") * _spread(history))
    if len(latest) < count or any(u.smooth <= history.least + margin for u in latest):
        return None
    return (
        f"the smoothed training loss rose from {history.least:.3f} (update {history.least_step}) to "
        f"{latest[-1].smooth:.3f} and has been that high for {count} updates"
    )


def _spread(history: History) -> float:
    """How much the loss of an update varies by its rows alone: as it was at the least, or, where that was among the
    first updates and is little more than one batch's luck, from each update to the next."""
    if history.least_step > limit("smooth_updates"):
        return history.least_spread
    losses = [u.loss for u in history.updates]
    steps = [now - before for before, now in pairwise(losses)]
    return max(history.least_spread, stdev(steps) / math.sqrt(2)) if len(steps) > 1 else history.least_spread


def _worse_than_untrained(history: History) -> str | None:
    if len(history.evaluations) < 2 or history.done < limit("divergence_early"):
        return None
    first, last = history.evaluations[0], history.evaluations[-1]
    if first.step or not Difference(-last.fall, last.fall_error).is_rise:
        return None
    start = history.blocks[0].loss
    if last.smooth is None or last.smooth <= start:  # it learns the training rows: overfitting, if anything
        return None
    return (
        f"the held-out loss is {last.loss:.3f}, and was {first.loss:.3f} before the first update "
        f"(± {last.fall_error:.3f}); the training loss is above its start too"
    )


def _outgrown(history: History) -> str | None:
    moved = history.updates[-1].weight_change if history.updates else None
    if moved is None or not moved > limit("divergence_change"):
        return None
    return f"what training added is {moved:,.0f} times as large as the weights that it was added to"


def _cause(plan: Plan) -> str:
    rate, choice = plan.value("learning_rate"), plan.choices["learning_rate"]
    if choice.high is not None and rate > choice.high:
        times = rate / advised_rate(plan)
        return f"The learning rate of {shown(rate)} is {times:,.1f} times what the advice gives for this run"
    return f"Most likely the learning rate of {shown(rate)} is too high for this model and data"


def _remedies(plan: Plan) -> tuple[Remedy, ...]:
    clip, norm = plan.value("max_grad_norm"), limit("clip_norm")
    unclipped = clip == 0 or clip > norm
    clipped = change(f"clip gradients at {shown(norm)}", max_grad_norm=norm) if unclipped else None
    return present(lower_rate(plan, limit("divergence_rate")), clipped)
