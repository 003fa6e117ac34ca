"""Underfitting: weights that do not move, a loss that does not fall, a loss that was still falling at the end."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from welltuned.advice.plan import Plan
from welltuned.advice.settle import shown
from welltuned.recipe import Method, Tune
from welltuned.training.events import Finding, Remedy, Severity
from welltuned.training.monitor import remedies as r
from welltuned.training.monitor.history import Block, History
from welltuned.training.monitor.overfitting import can_tell
from welltuned.training.monitor.robust import Difference
from welltuned.training.monitor.thresholds import limit

OWN_SIGNS = frozenset({Method.DPO, Method.GRPO})  # their losses say little of learning: see preference.py, rollouts.py


class _Point(NamedTuple):
    """A loss after so much learning rate in sum."""

    rates: float
    loss: float


def unmoved(history: History, plan: Plan) -> Finding | None:
    """The trained weights are where they started."""
    moved = history.updates[-1].weight_change if history.updates else None
    if moved is None or history.done < limit("unmoved_from") or moved >= limit("unmoved"):
        return None
    thing = "weights" if plan.recipe.tune is Tune.FULL else "adapters"
    what = f"the {thing} have changed the model's weights by {moved:.1e} of their size"
    cause = f"At a learning rate of {shown(plan.value('learning_rate'))} the run ends where it began"
    severity = Severity.WARNING if moved else Severity.ERROR
    return Finding("unmoved", severity, history.step, what, cause, _remedies(plan, slow=True))


def not_learning(history: History, plan: Plan) -> Finding | None:
    """Half of the run is over and the loss is where it was."""
    if history.done < limit("judged_from") or plan.recipe.method in OWN_SIGNS:
        return None
    fallen, start, whose = _fall(history, plan)
    if fallen is None or fallen.error is None or Difference(-fallen.mean, fallen.error).is_rise:
        return None
    noise = limit("standard_errors") * fallen.error
    if fallen.mean > max(noise, limit("learned_share") * abs(start)):
        return None
    what = f"the {whose} loss fell by {fallen.mean:.4f} ± {fallen.error:.4f} from {start:.3f}, which is next to nothing"
    return Finding("not_learning", Severity.WARNING, history.step, what, *_why_not(history, plan))


def still_falling(history: History, plan: Plan) -> Finding | None:
    """At the end of the run the loss falls as fast as at its beginning, measured by the summed rate."""
    if not history.finished or plan.recipe.method in OWN_SIGNS:
        return None
    fallen, _, whose = _fall(history, plan)
    points = _points(history, plan)
    if fallen is None or fallen.error is None or len(points) < limit("underfit_evaluations"):
        return None
    half = _between(points, points[-1].rates / 2)
    first, second = points[0].loss - half, half - points[-1].loss
    noise = max(limit("standard_errors") * fallen.error, limit("learned_share") * abs(points[0].loss))
    if second <= max(noise, limit("still_falling") * first):
        return None
    what = (
        f"the {whose} loss was still falling when the run ended: by {first:.3f} in its first half, by {second:.3f} in "
        f"its second (halves of the summed learning rate), to {points[-1].loss:.3f}"
    )
    slow = _slow(history, plan)
    cause = "There is more to learn than this run took in" + (", since the rate is low" if slow else "")
    return Finding("underfitting", Severity.WARNING, history.step, what, cause, _remedies(plan, slow))


def _fall(history: History, plan: Plan) -> tuple[Difference | None, float, str]:
    """How far the loss has fallen at its best, from where, and whose: of held-out rows if there are enough."""
    best = history.best_evaluation
    if best is not None and len(history.evaluations) > 1 and can_tell(history, plan):
        first = history.evaluations[0]
        error = best.fall_error if best is not first else history.evaluations[-1].fall_error
        return Difference(best.fall, error), first.loss, "held-out"
    count = max(1, round(len(history.blocks) / limit("ends")))
    first_part, last_part = _merged(history.blocks[:count]), _merged(history.blocks[-count:])
    if len(history.blocks) < 2 * count or min(first_part.count, last_part.count) < limit("ends"):
        return None, 0.0, "training"
    error = math.hypot(_error(first_part), _error(last_part))
    return Difference(first_part.loss - last_part.loss, error), first_part.loss, "training"


def _merged(blocks: Sequence[Block]) -> Block:
    count = sum(b.count for b in blocks) or 1
    return Block(
        count=count,
        loss=sum(b.loss * b.count for b in blocks) / count,
        square=sum(b.square * b.count for b in blocks) / count,
    )


def _error(block: Block) -> float:
    return math.sqrt(max(0.0, block.square - block.loss**2) / max(1, block.count - 1))


def _points(history: History, plan: Plan) -> list[_Point]:
    if len(history.evaluations) > 1 and can_tell(history, plan):
        return [_Point(e.rates, e.loss) for e in history.evaluations]
    points, rates = [], 0.0
    for block in history.blocks:
        points.append(_Point(rates + block.rates / 2, block.loss))
        rates += block.rates
    return points


def _between(points: Sequence[_Point], rates: float) -> float:
    """The loss at a summed rate, on the straight line between its neighbours."""
    after = next(i for i, point in enumerate(points) if point.rates >= rates)
    if not after:
        return points[0].loss
    low, high = points[after - 1], points[after]
    share = (rates - low.rates) / (high.rates - low.rates) if high.rates > low.rates else 1.0
    return low.loss + share * (high.loss - low.loss)


def _slow(history: History, plan: Plan) -> bool:
    """Whether the rate explains it: below the advice's range, or weights that have hardly moved."""
    choice = plan.choices["learning_rate"]
    moved = history.updates[-1].weight_change if history.updates else None
    low = choice.low is not None and choice.value < choice.low
    return low or (moved is not None and moved < limit("barely_moved"))


def _why_not(history: History, plan: Plan) -> tuple[str, tuple[Remedy, ...]]:
    if _slow(history, plan):
        return f"A learning rate of {shown(plan.value('learning_rate'))} moves too little", _remedies(plan, True)
    start = history.blocks[0].loss
    smooth = history.smooth or start
    if start - smooth > limit("heldout_effect") * abs(start):
        cause = (
            f"The training loss fell from {start:.3f} to {smooth:.3f}: what it learns there is no use to held-out rows"
        )
        return cause, r.present(r.more_data(plan), *_remedies(plan, False))
    return "The weights move, and nothing is gained: a plateau", _remedies(plan, False)


def _remedies(plan: Plan, slow: bool) -> tuple[Remedy, ...]:
    rate, epochs = r.higher_rate(plan, limit("underfit_rate")), r.more_epochs(plan)
    first = (rate, epochs) if slow or rate is None else (epochs, rate)
    return r.present(*first, r.larger_rank(plan), r.smaller_batch(plan), Remedy("add rows of what it should learn"))
