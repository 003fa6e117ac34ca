"""Reinforcement learning that stops learning: entropy, groups without signal, cut answers, KL, a flat reward."""

import math
from collections.abc import Sequence
from statistics import fmean, variance

from welltuned.advice.plan import Plan
from welltuned.advice.settle import shown
from welltuned.recipe import Method
from welltuned.training.events import Finding, Severity
from welltuned.training.monitor import remedies as r
from welltuned.training.monitor.history import History
from welltuned.training.monitor.thresholds import limit


def _latest(history: History, plan: Plan, name: str) -> float | None:
    """The mean of a measure over the latest updates, once enough of the run is done."""
    if (
        plan.recipe.method is not Method.GRPO
        or history.count < limit("grpo_least")
        or history.done < limit("grpo_from")
    ):
        return None
    values = [u.measures[name] for u in history.updates[-int(limit("smooth_updates")) :] if name in u.measures]
    return fmean(values) if values else None


def _at_start(history: History, name: str) -> float | None:
    block = history.blocks[0] if history.blocks else None
    return None if block is None or name not in block.measures else block.measures[name] / block.count


def entropy_collapse(history: History, plan: Plan) -> Finding | None:
    now, start = _latest(history, plan, "entropy"), _at_start(history, "entropy")
    if now is None or start is None or now >= limit("entropy_share") * start:
        return None
    what = f"the entropy of the answers fell from {start:.3f} to {now:.3f} nats a token"
    cause = "The policy says the same thing every time, so a group's answers differ too little to learn from"
    wider = plan.choices.get("epsilon_high")
    high = limit("epsilon_high")
    clip = None
    if wider is None or wider.value is None or wider.value < high:
        clip = r.change(f"let rare tokens rise further: epsilon_high {shown(high)}", epsilon_high=high)
    warm = r.change("sample at temperature 1", temperature=1.0) if _value(plan, "temperature", 1.0) < 1 else None
    found = r.present(r.lower_rate(plan, limit("overfit_rate")), clip, warm)
    return Finding("entropy_collapse", Severity.WARNING, history.step, what, cause, found)


def no_signal(history: History, plan: Plan) -> Finding | None:
    share = _latest(history, plan, "frac_reward_zero_std")
    if share is None or share <= limit("no_signal_share"):
        return None
    reward = _latest(history, plan, "reward")
    what = f"{share:.0%} of the groups got the same reward for every answer, and teach nothing"
    if reward is not None:
        what += f" (mean reward {reward:.3f})"
    cause = "The prompts are all too easy or all too hard for this model, or the reward cannot tell answers apart"
    count = 2 * int(_value(plan, "num_generations", limit("groups")))
    more = r.change(f"sample {count} answers a prompt", num_generations=count)
    data = r.change("choose prompts that it solves sometimes, or a reward with more than two values")
    return Finding("no_signal", Severity.WARNING, history.step, what, cause, (data, more))


def truncation(history: History, plan: Plan) -> Finding | None:
    share = _latest(history, plan, "completions/clipped_ratio")
    if share is None or share <= limit("truncated_share"):
        return None
    what = f"{share:.0%} of the answers were cut at max_completion_length"
    cause = "A cut answer is judged by a half of it, and the run learns to be short or to ramble"
    longer = None
    if "max_completion_length" in plan.choices:
        length = 2 * plan.value("max_completion_length")
        longer = r.change(f"allow answers of {length} tokens", max_completion_length=length)
    masked = None
    if not _value(plan, "mask_truncated_completions", False):
        masked = r.change("leave cut answers out of the loss", mask_truncated_completions=True)
    return Finding("truncation", Severity.WARNING, history.step, what, cause, r.present(longer, masked))


def kl_blow_up(history: History, plan: Plan) -> Finding | None:
    kl = _latest(history, plan, "kl")
    if kl is None or kl <= limit("kl_most"):
        return None
    what = f"the policy is {kl:.2f} nats a token away from its reference"
    cause = "It is leaving the language it started from, as happens where a reward is being gamed or the rate is high"
    beta = limit("kl_beta")
    pull = None
    if _value(plan, "beta", 0.0) < beta:
        pull = r.change(f"pull it back with beta {shown(beta)}", beta=beta)
    found = r.present(r.lower_rate(plan, limit("divergence_rate")), pull)
    return Finding("kl_blow_up", Severity.WARNING, history.step, what, cause, found)


def flat_reward(history: History, plan: Plan) -> Finding | None:
    """The mean reward of the latest third of the run is no higher than that of the first."""
    if plan.recipe.method is not Method.GRPO or history.done < limit("reward_from"):
        return None
    means = [b.measures["reward"] / b.count for b in history.blocks if "reward" in b.measures]
    third = len(means) // 3
    if third < 2:
        return None
    first, last = means[:third], means[-third:]
    gain, error = fmean(last) - fmean(first), math.hypot(_error(first), _error(last))
    if gain > limit("standard_errors") * error:
        return None
    what = f"the reward went from {fmean(first):.3f} to {fmean(last):.3f}, a gain of {gain:.3f} ± {error:.3f}"
    cause = (
        "Nothing is learned that the reward sees: the rate is low, the groups carry no signal, or there is no room left"
    )
    found = r.present(r.higher_rate(plan, limit("underfit_rate")), r.more_epochs(plan))
    return Finding("flat_reward", Severity.WARNING, history.step, what, cause, found)


def _error(values: Sequence[float]) -> float:
    return math.sqrt(variance(values) / len(values))


def _value(plan: Plan, name: str, otherwise: float) -> float:
    choice = plan.choices.get(name)
    return otherwise if choice is None or choice.value is None else choice.value
