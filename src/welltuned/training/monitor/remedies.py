"""Ways out, each with exact values for this plan: recipe keys that the next run would set."""

import math
from types import MappingProxyType
from typing import Any

from welltuned.advice.plan import Plan
from welltuned.advice.rules import number
from welltuned.advice.settle import counted, shown
from welltuned.data.stream import steps_per_epoch
from welltuned.recipe import Method, Tune
from welltuned.training.events import Remedy
from welltuned.training.monitor.thresholds import limit


def change(text: str, **changes: Any) -> Remedy:
    return Remedy(text, MappingProxyType(changes))


def rounded(value: float) -> float:
    """Two significant digits, as people write hyperparameters."""
    return float(f"{value:.2g}")


def advised_rate(plan: Plan) -> float:
    """The middle, in logarithms, of the range in which the rate is sound."""
    choice = plan.choices["learning_rate"]
    if choice.low is None or choice.high is None:
        return float(choice.value)
    return rounded(math.sqrt(choice.low * choice.high))


def lower_rate(plan: Plan, divisor: float) -> Remedy:
    """The rate divided, or the advice's where that is lower still."""
    now = plan.value("learning_rate")
    new = rounded(min(now / divisor, advised_rate(plan)) if now > advised_rate(plan) else now / divisor)
    return change(f"lower the learning rate from {shown(now)} to {shown(new)}", learning_rate=new)


def higher_rate(plan: Plan, factor: float) -> Remedy | None:
    """The advice's rate where this one lies below its range, else a multiple within it; None at its upper end."""
    choice = plan.choices["learning_rate"]
    now = choice.value
    new = advised_rate(plan) if choice.low is not None and now < choice.low else rounded(now * factor)
    if choice.high is not None and new > choice.high:
        new = choice.high
    if new <= now:
        return None
    return change(f"raise the learning rate from {shown(now)} to {shown(new)}", learning_rate=new)


def epoch_at(plan: Plan, step: int) -> float:
    rows = plan.facts.dataset.rows
    if plan.recipe.method is Method.GRPO:  # whose batches are counted in answers, each set of them used again
        rows *= plan.value("num_generations") * plan.value("num_iterations")
    return step / steps_per_epoch(rows, plan.value("effective_batch_size"))


def fewer_epochs(plan: Plan, best: int) -> Remedy | None:
    """End where the held-out loss was lowest."""
    epochs = round(epoch_at(plan, best), 2)
    if not epochs:
        return None
    return change(
        f"train for {shown(epochs)} epochs, at whose end the held-out loss was lowest", num_train_epochs=epochs
    )


def more_epochs(plan: Plan) -> Remedy:
    epochs = round(2 * epoch_at(plan, plan.updates), 2)
    text = f"train for {shown(epochs)} epochs instead of {shown(round(epochs / 2, 2))}"
    if "max_steps" in plan.recipe.hyperparameters:
        return change(f"{text}, without max_steps", num_train_epochs=epochs, max_steps="auto")
    return change(text, num_train_epochs=epochs)


def more_data(plan: Plan) -> Remedy:
    rows, epochs = plan.facts.dataset.rows, epoch_at(plan, plan.updates)
    return Remedy(f"add rows: {counted(rows, 'row')} seen {epochs:.1f} times can be learned by heart")


def dropout(plan: Plan) -> Remedy | None:
    """Where it has been seen to help: adapters on models that are not large, over several epochs."""
    value = limit("dropout_try")
    if plan.recipe.tune is Tune.FULL or plan.value("lora_dropout") >= value:
        return None
    large = plan.facts.model.parameters > limit("dropout_largest_model")
    if large or epoch_at(plan, plan.updates) <= limit("dropout_epochs") or plan.facts.model.experts:
        return None
    return change(f"set lora_dropout to {shown(value)}", lora_dropout=value)


def weight_decay(plan: Plan) -> Remedy | None:
    """Only if a usual decay would shrink the weights within this run; the schedule's mean rate is half its peak."""
    needed = rounded(limit("decay_effect") / (plan.value("learning_rate") / 2 * plan.updates))
    if needed > limit("decay_most") or needed <= plan.value("weight_decay"):
        return None
    return change(f"raise weight_decay to {shown(needed)}, from where it acts within this run", weight_decay=needed)


def larger_batch(plan: Plan) -> Remedy | None:
    """Twice the batch, if enough updates remain."""
    batch = 2 * plan.value("effective_batch_size")
    if plan.updates / 2 < number("updates_wanted"):
        return None
    return change(f"double the batch to {batch}", effective_batch_size=batch)


def smaller_batch(plan: Plan) -> Remedy | None:
    """Half the batch, which doubles the updates."""
    batch = plan.value("effective_batch_size") // 2
    if batch < number("batch_floor"):
        return None
    return change(f"halve the batch to {batch}, for twice the updates", effective_batch_size=batch)


def larger_rank(plan: Plan) -> Remedy | None:
    """Twice the rank, alpha with it where rsLoRA does not already keep the scale."""
    if plan.recipe.tune is Tune.FULL or plan.value("r") >= plan.facts.model.hidden_size:
        return None
    r, alpha = 2 * plan.value("r"), 2 * plan.value("lora_alpha")
    return change(f"double r to {r} and lora_alpha to {shown(alpha)}", r=r, lora_alpha=alpha)


def scaled_adapter(plan: Plan) -> Remedy | None:
    """After training, no training needed; nothing measured says which strength."""
    if plan.recipe.tune is Tune.FULL:
        return None
    low = shown(limit("scale_alpha"))
    return Remedy(f"or scale the finished adapter down (try {low} to 1 of its strength on the held-out rows)")


def present(*remedies: Remedy | None) -> tuple[Remedy, ...]:
    """Those that apply to this plan, in the order given."""
    return tuple(remedy for remedy in remedies if remedy is not None)
