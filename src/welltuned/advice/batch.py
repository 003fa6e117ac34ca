"""How many examples make one update, and how they are cut into micro-batches.

The effective batch is a hyperparameter. The cut (per device × accumulation, or a budget of tokens) is a matter of
memory and never changes the result, because one place divides the summed loss by the tokens of the whole update.
"""

from dataclasses import dataclass

from welltuned.advice.epoch import Epoch
from welltuned.advice.rules import by_threshold, cited, number, rule
from welltuned.advice.settle import counted, passes_words, settle
from welltuned.choice import Choice
from welltuned.data.stream import steps_per_run
from welltuned.errors import InputError
from welltuned.recipe import Method, Recipe

EFFECTIVE, PER_DEVICE, ACCUMULATION = (
    "effective_batch_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)


@dataclass(frozen=True, slots=True)
class BatchChoices:
    effective: Choice
    per_device: Choice
    accumulation: Choice


def advised_batch(rows: int, epochs: float, max_steps: int | None, method: Method = Method.SFT) -> Choice:
    """By the number of rows, then halved until the run has enough updates to learn from."""
    table = "batch_by_rows" if method is Method.SFT else f"{method}_batch_by_rows"
    start = int(by_threshold(table, rows))
    least, wanted = int(number("kto_batch_floor" if method is Method.KTO else "batch_floor")), number("updates_wanted")
    value = start
    while value > least and max_steps is None and steps_per_run(rows, value, epochs) < wanted:
        value //= 2
    value = max(1, min(value, rows))
    updates = steps_per_run(rows, value, epochs)
    noun = "pair" if method in (Method.DPO, Method.ORPO, Method.REWARD) else "row"
    run = f"{counted(updates, 'update')} of your {counted(rows, noun)} in {passes_words(epochs)}"
    if value < start:
        fewer = f"batches of {start} would make only {steps_per_run(rows, start, epochs):,}"
        why = f"{run}, where {fewer}; below about {wanted:.0f} a run rarely settles"
    elif method is Method.SFT:
        why = f"{run}: small batches learn most per token; this is the usual size for as many rows"
    else:
        why = f"{run}: the size with which the {method} rates in use were found; smaller where rows are few"
    spread = int(number("batch_range"))
    evidence = cited(table, "updates_wanted")
    return Choice(value=value, low=max(1, value // spread), high=value * spread, reason=why, evidence=evidence)


def choose_batch(recipe: Recipe, advised: Choice, typical_length: int, token_budget: int) -> BatchChoices:
    """The three batch numbers, consistent with whichever of them the user set."""
    user = {key: recipe.hyperparameters.get(key) for key in (EFFECTIVE, PER_DEVICE, ACCUMULATION)}
    effective, per_device, accumulation = _consistent(user, int(advised.value), typical_length, token_budget)
    derived = Choice(
        value=effective,
        low=advised.low,
        high=advised.high,
        reason=advised.reason if effective == advised.value else _derived_reason(user, effective, advised),
        evidence=advised.evidence,
    )
    evidence = cited("token_budget_cpu", "token_budget_cuda")
    fits = f"{counted(per_device, 'example')} of {typical_length:,} tokens fit{'' if per_device > 1 else 's'} the "
    fits += f"micro-batch's {token_budget:,}"
    device_reason = f"{fits}; only memory depends on it" if per_device > 1 else f"one at a time: {fits}"
    device = Choice(value=per_device, low=1, high=effective, reason=device_reason, evidence=evidence)
    steps = Choice(
        value=accumulation,
        low=1,
        high=effective,
        reason=_accumulated(accumulation, per_device, effective),
        evidence=evidence,
    )
    return BatchChoices(
        settle(recipe, EFFECTIVE, derived if user[EFFECTIVE] is None else advised),
        settle(recipe, PER_DEVICE, device),
        settle(recipe, ACCUMULATION, steps),
    )


def _accumulated(accumulation: int, per_device: int, effective: int) -> str:
    if accumulation == 1:
        return f"one micro-batch of {per_device} is a whole update: nothing is left to add up"
    return f"{accumulation} micro-batches of {per_device} make the {counted(effective, 'example')} of an update"


def _derived_reason(user: dict[str, int | None], effective: int, advised: Choice) -> str:
    given = [f"{name} {value}" for name, value in user.items() if value is not None]
    if len(given) > 1:
        return f"{' × '.join(given)}, as you set them; the advice would be {advised.value}: {advised.reason}"
    return f"the multiple of your {given[0]} nearest to the advised {advised.value}: {advised.reason}"


def _consistent(user: dict[str, int | None], advised: int, typical: int, budget: int) -> tuple[int, int, int]:
    effective, per_device, accumulation = user[EFFECTIVE], user[PER_DEVICE], user[ACCUMULATION]
    if effective is not None and per_device is not None and accumulation is not None:
        if per_device * accumulation != effective:
            what = f"{PER_DEVICE} {per_device} × {ACCUMULATION} {accumulation} is not {EFFECTIVE} {effective}"
            raise InputError(what, where="recipe", mend="remove one of the three")
        return effective, per_device, accumulation
    if per_device is not None and accumulation is not None:
        return per_device * accumulation, per_device, accumulation
    for name, part in ((PER_DEVICE, per_device), (ACCUMULATION, accumulation)):
        if part is None:
            continue
        if effective is not None and effective % part:
            what = f"{EFFECTIVE} {effective} is not a multiple of {name} {part}"
            raise InputError(what, where="recipe", mend=f"choose a multiple of {part}, or remove one of the two")
        other = max(1, round((advised if effective is None else effective) / part))
        return part * other, *((part, other) if name == PER_DEVICE else (other, part))
    whole = advised if effective is None else effective
    device = max(d for d in range(1, whole + 1) if whole % d == 0 and (d == 1 or d * typical <= budget))
    return whole, device, whole // device


def choose_packing(epoch: Epoch) -> Choice:
    mean = epoch.tokens / (epoch.examples * epoch.sequences)
    sequences = counted(epoch.examples * epoch.sequences, "sequence")
    why = (
        f"your {sequences} average {mean:.0f} of at most {epoch.longest:,} tokens: {1 - mean / epoch.longest:.0%} "
        "would be padding; packed, they still never see each other"
    )
    return Choice(value=rule("packing").value, reason=why, evidence=cited("packing"))


def choose_assistant_only_loss(supervised: int, tokens: int, *, text: bool = False) -> Choice:
    if text:
        why = f"your rows are plain texts without turns: all {supervised:,} tokens count (continued pretraining)"
        return Choice(value=False, reason=why, evidence=cited("completions_only"))
    why = f"{supervised:,} of your {tokens:,} tokens are answers; prompts are given in use and need no learning"
    return Choice(value=rule("completions_only").value, reason=why, evidence=cited("completions_only"))
