"""Overfitting: held-out rows get worse while training rows get better. The training loss alone is only a hint."""

from welltuned.advice.plan import Plan
from welltuned.advice.settle import counted, shown
from welltuned.recipe import Method
from welltuned.training.events import Finding, Remedy, Severity
from welltuned.training.monitor import remedies as r
from welltuned.training.monitor.history import Held, History
from welltuned.training.monitor.robust import Difference
from welltuned.training.monitor.thresholds import limit


def overfitting(history: History, plan: Plan) -> Finding | None:
    """The verdict: the held-out loss lies above its best by more than the noise, several times in a row."""
    if plan.recipe.method is Method.GRPO:  # it has no training loss that would fall
        return None
    best, count = history.best_evaluation, rising_evaluations(history)
    if (
        best is None
        or count < limit("overfit_evaluations")
        or not can_tell(history, plan)
        or not _trains(history, best)
    ):
        return None
    last = history.evaluations[-1]
    share = last.rise / abs(best.loss) if best.loss else 0.0
    what = (
        f"the held-out loss is {last.loss:.3f}, {last.rise:.3f} ± {last.rise_error:.3f} ({share:.0%}) above its best "
        f"of {best.loss:.3f} (update {best.step}), in {count} evaluations running, while the training loss "
    )
    what += f"fell to {last.smooth:.3f}" if best.smooth is None else f"fell from {best.smooth:.3f} to {last.smooth:.3f}"
    worse = not _measure_holds(best, last)
    severity = Severity.WARNING if worse else Severity.HINT
    held = "" if worse else "; its accuracy on held-out rows is not worse, so this is memorising more than harm"
    return Finding(
        "overfitting", severity, history.step, what, _cause(history, plan, best) + held, ranked(plan, best.step)
    )


def rising_evaluations(history: History) -> int:
    """How many of the latest evaluations in a row lie above the best by more than the noise."""
    count = 0
    for held in reversed(history.evaluations):
        if not Difference(held.rise, held.rise_error).is_rise:
            break
        count += 1
    return count


def judged_by(plan: Plan) -> str:
    """What evaluations are compared by; lower is better."""
    return "score (minus the reward)" if plan.recipe.method is Method.GRPO else "loss"


def can_tell(history: History, plan: Plan) -> bool:
    """Whether there are held-out rows enough for a standard error to mean something."""
    return bool(history.evaluations) and plan.facts.dataset.heldout_rows >= limit("heldout_least")


def _trains(history: History, best: Held) -> bool:
    smooth = history.smooth
    start = best.smooth if best.smooth is not None else history.blocks[0].loss if history.blocks else None
    return smooth is not None and start is not None and smooth < start


def _measure_holds(best: Held, last: Held) -> bool:
    """Whether an accuracy that counts more than the loss is as good as it was."""
    name = "rewards/accuracies"
    return name in best.measures and last.measures.get(name, 0.0) >= best.measures[name]


def _cause(history: History, plan: Plan, best: Held) -> str:
    epoch, rows = r.epoch_at(plan, best.step), plan.facts.dataset.rows
    if not best.step:
        return "What the training rows teach is not what the held-out rows ask: it was best before the first update"
    rate = plan.choices["learning_rate"]
    if rate.high is not None and rate.value > rate.high:
        return f"The learning rate is above its sound range, and {counted(rows, 'row')} are soon learned by heart"
    return f"From epoch {epoch:.1f} on, your {counted(rows, 'row')} are learned by heart rather than understood"


def ranked(plan: Plan, best: int) -> tuple[Remedy, ...]:
    """All that would act in this run, the most promising first."""
    kept = Remedy(f"use the weights of update {best}, where the held-out loss was lowest")
    if best and not plan.value("load_best_model_at_end"):
        kept = r.change(kept.text, load_best_model_at_end=True)
    rate = r.lower_rate(plan, limit("overfit_rate"))
    few = r.fewer_epochs(plan, best)
    high = plan.choices["learning_rate"].high
    too_high = high is not None and plan.value("learning_rate") > high
    first = (rate, few) if too_high or r.epoch_at(plan, best) < 1 else (few, rate)
    small = plan.facts.dataset.rows < limit("small_data_rows")
    regularisers = (r.dropout(plan), r.weight_decay(plan))
    data = (r.more_data(plan),)
    rest = (*data, *regularisers) if small else (*regularisers, *data)
    return r.present(kept if best else None, *first, *rest, r.larger_batch(plan), r.scaled_adapter(plan))


def memorising(history: History, plan: Plan) -> Finding | None:
    """The hint: a very low training loss that no held-out row confirms."""
    smooth = history.smooth
    if smooth is None or plan.recipe.method is not Method.SFT or history.count < limit("smooth_updates"):
        return None
    last = history.evaluations[-1] if history.evaluations else None
    told = last is not None and can_tell(history, plan)
    if smooth >= limit("overfit_hint") or (told and last is not None and last.rise <= (last.rise_error or 0.0)):
        return None
    what = f"the training loss is {smooth:.3f}, below {shown(limit('overfit_hint'))}"
    cause = "That can be memorising, and it can be a task with short, certain answers: "
    if told and last is not None:
        cause += f"the held-out loss is {last.rise:.3f} ± {last.rise_error or 0:.3f} above its best, no verdict yet"
    else:
        cause += f"{counted(plan.facts.dataset.heldout_rows, 'held-out row')} cannot tell"
    return Finding("memorising", Severity.HINT, history.step, what, cause, (r.more_data(plan),))


def too_small_to_tell(history: History, plan: Plan) -> Finding | None:
    """The held-out rows cannot decide: too few for a standard error, or a rise that matters within the noise."""
    if not history.evaluations:
        return None
    last, best, n = history.evaluations[-1], history.best_evaluation, plan.facts.dataset.heldout_rows
    error = "unknown" if last.error is None else f"± {last.error:.3f}"
    rewarded = plan.recipe.method is Method.GRPO
    value = f"reward is {0.0 - last.loss:.3f}" if rewarded else f"loss is {last.loss:.3f}"
    text = f"the held-out {value}, standard error {error}, over {counted(n, 'row')}"
    least = int(limit("heldout_least"))
    if n < least:
        what, wanted = f"{text}: fewer than {least}, so the standard error is itself a guess", least
    else:
        noise = limit("standard_errors") * (last.rise_error or 0.0)
        if best is None or not _mattering(history, plan, best) < last.rise <= noise:
            return None
        side = "below" if rewarded else "above"
        what = f"{text}; it is {last.rise:.3f} {side} its best, and twice the standard error of that is {noise:.3f}"
        wanted = round(n * (noise / last.rise) ** 2) + 1
    cause = "Noise would decide when to stop and which weights are the best, so early stopping is off for now"
    remedy = Remedy(f"hold out about {wanted:,} rows{_how_many(plan, wanted)}", _fraction(plan, wanted))
    return Finding("heldout_too_small", Severity.HINT, history.step, what, cause, (remedy,))


def _mattering(history: History, plan: Plan, best: Held) -> float:
    """The rise from which on it matters. A score's zero is anywhere: there it is a share of what was gained."""
    if plan.recipe.method is Method.GRPO:
        return limit("heldout_gain") * (history.evaluations[0].loss - best.loss)
    return limit("heldout_effect") * abs(best.loss)


def _fraction(plan: Plan, wanted: int) -> dict[str, float]:
    if plan.recipe.eval_data is not None:
        return {}
    total = plan.facts.dataset.rows + plan.facts.dataset.heldout_rows
    share = r.rounded(wanted / total)
    return {"eval_fraction": share} if share < 1 / 2 else {}


def _how_many(plan: Plan, wanted: int) -> str:
    return "" if _fraction(plan, wanted) else ": add them to the data"
