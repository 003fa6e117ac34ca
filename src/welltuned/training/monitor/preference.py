"""Preference runs that end where they began, with a loss that looks like one."""

import math
from statistics import fmean

from welltuned.advice.plan import Plan
from welltuned.advice.settle import shown
from welltuned.recipe import Method
from welltuned.training.events import Finding, Severity
from welltuned.training.monitor import remedies as r
from welltuned.training.monitor.history import History
from welltuned.training.monitor.thresholds import limit

ACCURACY, MARGIN = "rewards/accuracies", "rewards/margins"


def untrained_preference(history: History, plan: Plan) -> Finding | None:
    """The loss is ln 2 and chosen answers win as often as a coin: the policy still is the reference."""
    if plan.recipe.method is not Method.DPO or history.done < limit("preference_from"):
        return None
    if history.step <= plan.value("warmup_steps"):  # of a run of few updates: nothing can have moved yet
        return None
    latest = history.updates[-int(limit("smooth_updates")) :]
    wins = [u.measures[ACCURACY] for u in latest if ACCURACY in u.measures]
    if not wins or history.smooth is None or _is_other_loss(plan):
        return None
    loss, accuracy = history.smooth, fmean(wins)
    margin = fmean(u.measures.get(MARGIN, math.inf) for u in latest)
    undecided = abs(margin) < limit("preference_margin")  # then who wins a pair is a matter of rounding
    if abs(loss - math.log(2)) >= limit("preference_loss"):
        return None
    if accuracy >= limit("preference_accuracy") and not undecided:
        return None
    what = f"the loss is {loss:.4f}, next to ln 2 = 0.6931, and the chosen answer wins in {accuracy:.0%} of the pairs"
    what += f", by {margin:.1e} on average" if undecided else ""
    rate, beta = plan.value("learning_rate"), plan.value("beta")
    per = " per token" if plan.value("loss_type") == "sigmoid_norm" else ""
    cause = (
        f"The model is still its own reference: a rate of {shown(rate)} over {plan.updates:,} updates hardly moves it "
        f"(at beta {shown(beta)} the log-probabilities must move by about {2 / beta:.2g}{per})"
    )
    found = r.present(r.higher_rate(plan, limit("preference_rate")), r.more_epochs(plan), r.smaller_batch(plan))
    return Finding("untrained_preference", Severity.WARNING, history.step, what, cause, found)


def _is_other_loss(plan: Plan) -> bool:
    """Whether this loss does not begin at ln 2."""
    choice = plan.choices.get("loss_type")
    return choice is not None and choice.value not in ("sigmoid", "sigmoid_norm")
