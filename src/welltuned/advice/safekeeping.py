"""What is kept of a run, and when it ends early: checkpoints, the best evaluation, patience.

Saving costs time, and so does what a crash undoes. Their sum is least when checkpoints are √(2 · cost · time between
failures) apart (Young 1974). A run may stop, or go back to its best evaluation, only where its held-out rows can tell a
change from noise: two standard errors of the change between two evaluations of the same rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from welltuned.advice.rules import cited, number, rule
from welltuned.advice.settle import bytes_words, counted, from_rule, settle, span_words
from welltuned.choice import Choice
from welltuned.recipe import Method, Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """`seconds` are the run's, None where they cannot be forecast; `trained` the numbers that it trains."""

    updates: int
    eval_steps: int
    heldout_rows: int
    seconds: float | None
    trained: int


def safekeeping_choices(recipe: Recipe, course: Course) -> Mapping[str, Choice]:
    """Checkpoints, best state and early stopping, on the user's values where there are some."""
    found = {
        "save_steps": settle(recipe, "save_steps", choose_save_steps(course)),
        "save_total_limit": settle(recipe, "save_total_limit", _limit(course)),
        "load_best_model_at_end": settle(recipe, "load_best_model_at_end", choose_best(recipe.method, course)),
    }
    best = bool(found["load_best_model_at_end"].value)
    found["early_stopping_patience"] = settle(
        recipe, "early_stopping_patience", choose_patience(recipe.method, course, best)
    )
    return found


def save_seconds(trained: int) -> float:
    """Time to write one checkpoint: every trained number with AdamW's two averages of it."""
    seconds = trained * number("save_bytes_per_parameter") / number("save_bytes_per_second")
    return max(number("save_seconds_least"), seconds)


def choose_save_steps(course: Course) -> Choice:
    """As far apart as costs least; a divisor or a multiple of eval_steps, so that the two fall together."""
    cost, size = save_seconds(course.trained), _size(course.trained)
    evidence = cited("save_failure_seconds", "save_bytes_per_second", "save_bytes_per_parameter")
    if course.seconds is None:
        steps = course.eval_steps
        why = f"with every evaluation, since the time of your {counted(course.updates, 'update')} cannot be forecast"
    else:
        apart = math.sqrt(2 * cost * number("save_failure_seconds"))
        steps = min(_aligned(apart * course.updates / max(course.seconds, cost), course.eval_steps), course.updates)
        lost = span_words(steps * course.seconds / course.updates)
        why = f"a crash costs at most {lost} of your {span_words(course.seconds)}"
        if steps == course.updates:
            why = f"only at the end: your run takes {span_words(course.seconds)}"
    why += f"; {size} are written in about {span_words(cost)}"
    high = max(steps, course.updates)
    return Choice(value=steps, low=1, high=high, reason=why, evidence=evidence)


def _aligned(wanted: float, evaluation: int) -> int:
    """The multiple, or below one evaluation the divisor, of `evaluation` that is nearest from below to `wanted`."""
    if wanted >= evaluation:
        return int(wanted // evaluation) * evaluation
    return max(d for d in range(1, evaluation + 1) if evaluation % d == 0 and d <= max(1.0, wanted))


def _limit(course: Course) -> Choice:
    size = _size(course.trained)
    why = f"the newest and, should it not verify, the one before, {size} each; the best is kept besides"
    return from_rule(rule("save_total_limit"), why)


def _size(trained: int) -> str:
    return bytes_words(trained * number("save_bytes_per_parameter"))


def detectable(method: Method, heldout_rows: int) -> float:
    """Two standard errors of the change between two evaluations, as a share of the loss (grpo: of the score)."""
    return (
        float(2 * rule("heldout_spread").value[_kind(method)] / math.sqrt(heldout_rows)) if heldout_rows else math.inf
    )


def choose_best(method: Method, course: Course) -> Choice:
    limit, tells = rule("heldout_tells").value["best"], detectable(method, course.heldout_rows)
    evidence = cited("heldout_tells", "heldout_spread")
    if not course.heldout_rows:
        return Choice(value=False, reason="0 rows are held out, so there is no best to go back to", evidence=evidence)
    rows, what = counted(course.heldout_rows, "held-out row"), "score" if method is Method.GRPO else "loss"
    if tells <= limit:
        why = f"with {rows} changes of the {what} above about {tells:.1%} stand out from noise: enough to know the best"
    else:
        why = f"with {rows} only changes of the {what} above about {tells:.0%} stand out: the best would be luck"
    return Choice(value=tells <= limit, reason=why, evidence=evidence)


def choose_patience(method: Method, course: Course, best: bool) -> Choice:
    """On where a run has evaluations to spare, and held-out rows that can tell a turn from noise."""
    spec, tells = rule("early_stopping_patience"), detectable(method, course.heldout_rows)
    evidence = cited("early_stopping_patience", "heldout_tells", "heldout_spread")
    looks = math.ceil(course.updates / course.eval_steps)
    value, rows = 0, counted(course.heldout_rows, "held-out row")
    if not course.heldout_rows:
        why = "never: 0 rows are held out"
    elif not best:
        why = f"never: with {rows} the run keeps its last state"
    elif tells > rule("heldout_tells").value["stop"]:
        least = math.ceil((2 * rule("heldout_spread").value[_kind(method)] / rule("heldout_tells").value["stop"]) ** 2)
        why = f"never: {rows} cannot tell a turn from noise soon enough, {least:,} could; the best state is kept anyway"
    elif looks <= 2 * spec.value:
        why = f"never: of {counted(looks, 'evaluation')} none is left to save; the best state is kept anyway"
    else:
        value = spec.value
        why = f"{spec.value} of {looks} evaluations of your {rows} without a better one, and the run has turned"
    return Choice(value=value, low=0, high=spec.high, reason=why, evidence=evidence)


def _kind(method: Method) -> str:
    return {Method.SFT: "loss", Method.GRPO: "reward"}.get(method, "preference")
