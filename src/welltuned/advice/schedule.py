"""Epochs, warm-up, decay, optimiser, evaluation: what happens over the course of a run."""

import math

from welltuned.advice.rules import by_threshold, cited, number, rule
from welltuned.advice.settle import bytes_words, counted, from_rule, shown
from welltuned.choice import Choice
from welltuned.recipe import Method


def choose_epochs(rows: int, *, text: bool = False) -> Choice:
    """Passes over answers, or over plain `text`, which is memorised sooner."""
    table = "text_epochs_by_rows" if text else "epochs_by_rows"
    value = float(by_threshold(table, rows))
    span = rule("epochs_range").value
    passes = "one pass" if value == 1 else f"{shown(value)} passes"
    why = (
        f"your {counted(rows, 'row')} are worth {passes}; more pays only for long reasoning answers, "
        "and the held-out loss shows when to stop"
    )
    if text:
        why = f"{passes} over your {counted(rows, 'text')}: repeated texts are memorised sooner than answers"
    evidence = cited(table, "epochs_range")
    return Choice(value=value, low=float(span["low"]), high=float(span["high"]), reason=why, evidence=evidence)


def choose_schedule(updates: int, method: Method = Method.SFT) -> Choice:
    run = counted(updates, "update")
    of = "as in the sweep that the rate is from" if method is Method.SFT else "so that the last ones settle"
    why = f"linear to zero over your {run}, {of}; cosine is as good"
    return from_rule(rule("schedule"), why)


def choose_warmup(updates: int, schedule: str) -> Choice:
    """A small share of the run, at least a few updates, never more than a tenth."""
    share = rule("warmup_share")
    most = max(1, math.floor(share.high * updates))
    value = 0 if schedule == "constant" else min(max(round(share.value * updates), int(number("warmup_least"))), most)
    low = min(value, max(0, math.floor(share.low * updates)))
    why = f"of your {counted(updates, 'update')}, for Adam's averages to settle; more would be taken from the run"
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


def choose_optimizer(trained: int, *, eight_bit: bool, limit: int) -> Choice:
    """AdamW; with its moments in 8 bits where nothing else makes full fine-tuning fit into so many bytes."""
    why = f"AdamW, with which the rates were found; its state for your {trained:,} trained parameters is kept in fp32"
    if not eight_bit:
        return from_rule(rule("optimizer"), why)
    saved = (number("memory_adam_bytes") - number("memory_adam_8bit_bytes")) * trained
    why = f"only so does the run fit into {bytes_words(limit)}: AdamW's two moments in 8 bits save {bytes_words(saved)}"
    return from_rule(rule("optimizer_8bit"), why)


def choose_betas(updates: int) -> tuple[Choice, Choice]:
    run = f"your {counted(updates, 'update')}"
    spec = rule("adam_beta1")
    first = from_rule(spec, f"an average over about {_memory(spec.value)} of {run}, as the rates in use had")
    spec = rule("adam_beta2")
    long = _memory(spec.value)
    corrected = f", which Adam corrects for in {run}" if long > updates else f" of {run}"
    why = f"over about {long:,} updates{corrected}"
    second = from_rule(spec, f"{why}; {shown(spec.low)} to {shown(spec.high)} made no measured difference")
    return first, second


def _memory(beta: float) -> int:
    """Updates over which an average with this weight forgets."""
    return round(1 / (1 - beta))


def choose_clip(batch: int) -> Choice:
    why = f"one odd batch of {batch} cannot throw the run; where most updates are clipped, the rate is in effect lower"
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
        f"{counted(math.ceil(updates / value), 'look')} at your {counted(heldout_rows, 'held-out row')} over "
        f"{counted(updates, 'update')} to see where it turns, for {share:.0%} of the time"
    )
    if not heldout_rows:
        why = f"0 rows are held out: none of your {counted(updates, 'update')} will be followed by a look at them"
    low, high = max(1, math.ceil(updates / spec.high)), max(1, math.ceil(updates / spec.low))
    return Choice(value=value, low=min(low, value), high=max(high, value), reason=why, evidence=cited("evaluations"))
