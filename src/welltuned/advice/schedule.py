"""Epochs, warm-up, decay, optimiser, evaluation: what happens over the course of a run."""

import math

from welltuned.advice.rules import by_threshold, cited, number, rule
from welltuned.advice.settle import counted, from_rule, shown
from welltuned.choice import Choice


def choose_epochs(rows: int) -> Choice:
    value = float(by_threshold("epochs_by_rows", rows))
    span = rule("epochs_range").value
    passes = {1.0: "one pass", 2.0: "two passes"}.get(value, f"{value:.0f} passes")
    why = (
        f"your {counted(rows, 'row')} are worth {passes}; more pays only for long reasoning answers, "
        "and the held-out loss shows when to stop"
    )
    evidence = cited("epochs_by_rows", "epochs_range")
    return Choice(value=value, low=float(span["low"]), high=float(span["high"]), reason=why, evidence=evidence)


def choose_schedule(updates: int) -> Choice:
    run = counted(updates, "update")
    why = f"linear to zero over your {run}, as in the sweep that the rate is from; cosine is as good"
    return from_rule(rule("schedule"), why)


def choose_warmup(updates: int, schedule: str) -> Choice:
    """A small share of the run, at least a few updates, never more than a tenth."""
    share = rule("warmup_share")
    most = max(1, math.floor(share.high * updates))
    value = 0 if schedule == "constant" else min(max(round(share.value * updates), int(number("warmup_least"))), most)
    low = min(value, max(0, math.floor(share.low * updates)))
    why = f"{value} of your {counted(updates, 'update')}: enough for Adam's averages to settle, little of the run"
    if schedule == "constant":
        why = "the constant schedule has no warm-up; constant_with_warmup has"
    return Choice(value=value, low=low, high=most, reason=why, evidence=cited("warmup_share", "warmup_least"))


def choose_weight_decay(rate: float, updates: int) -> Choice:
    spec = rule("weight_decay")
    why = f"the customary {shown(spec.value)}"
    reach = decay_reach(rate, spec.value)
    if is_inert(rate, spec.value, updates):
        why += (
            f", which does nothing here: at a rate of {shown(rate)} it acts over {reach:,.0f} updates and "
            f"your run has {updates:,}"
        )
    else:
        why += f"; at a rate of {shown(rate)} it acts over {reach:,.0f} updates, and your run has {updates:,}"
    return from_rule(spec, why)


def decay_reach(rate: float, decay: float) -> float:
    """Updates over which AdamW's decay forgets: 1/(rate · decay)."""
    return 1 / (rate * decay) if rate * decay else math.inf


def is_inert(rate: float, decay: float, updates: int) -> bool:
    return decay_reach(rate, decay) > number("weight_decay_inert") * updates


def choose_optimizer(trained: int) -> Choice:
    why = (
        f"AdamW, with which the rates were measured; its state for your {trained:,} trained parameters is kept in fp32"
    )
    return from_rule(rule("optimizer"), why)


def choose_betas(updates: int) -> tuple[Choice, Choice]:
    first = from_rule(rule("adam_beta1"), f"the usual 0.9: an average over ten of your {updates:,} updates")
    second = from_rule(
        rule("adam_beta2"),
        f"the usual value; 0.95 to 0.999 made no difference that was measured, nor at {updates:,} updates",
    )
    return first, second


def choose_clip(batch: int) -> Choice:
    why = f"a gradient of your batches of {batch} longer than this is an outlier; clipping it costs nothing otherwise"
    return from_rule(rule("clip"), why)


def choose_seed() -> Choice:
    return from_rule(rule("seed"), "any fixed number: the same seed gives the same adapter, another shows the noise")


def choose_eval_steps(updates: int, train_tokens: float, heldout_tokens: int, heldout_rows: int) -> Choice:
    """About ten evaluations, fewer where the held-out rows are many against the training."""
    spec = rule("evaluations")
    cost = heldout_tokens * number("evaluation_cost_of_token")
    affordable = math.floor(number("evaluation_cost_share") * train_tokens / cost) if cost else spec.value
    times = min(max(min(spec.value, affordable), spec.low), updates)
    value = max(1, math.ceil(updates / times))
    share = math.ceil(updates / value) * cost / train_tokens
    why = (
        f"{math.ceil(updates / value)} looks at your {counted(heldout_rows, 'held-out row')} over "
        f"{counted(updates, 'update')} show when the loss turns, for {share:.0%} of the time"
    )
    low, high = max(1, math.ceil(updates / spec.high)), max(1, math.ceil(updates / spec.low))
    return Choice(value=value, low=min(low, value), high=max(high, value), reason=why, evidence=cited("evaluations"))
