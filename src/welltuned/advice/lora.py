"""The adapter: rank from how much there is to learn, alpha, targets, dropout, start.

A LoRA parameter holds about two bits, a trained token brings at most about one (E037): the rank is the smallest whose
parameters number at least half of the supervised tokens, within the band in which ranks have been measured to matter.
"""

from difflib import get_close_matches

from welltuned.advice.rules import cited, number, rule
from welltuned.advice.settle import from_rule, shown
from welltuned.choice import Choice
from welltuned.errors import InputError
from welltuned.facts.architecture import EXPERTS, is_meant
from welltuned.facts.model import ModelFacts
from welltuned.recipe import ALL_LINEAR

_HEADS = ("lm_head", "embed_out", "embed_tokens")


def choose_rank(model: ModelFacts, targets: tuple[str, ...] | None, supervised_tokens: int) -> Choice:
    """The smallest rank that can hold what the data may teach, between the floor and the cap."""
    large = supervised_tokens > number("lora_large_data_tokens")
    cap = number("lora_rank_cap_large_data" if large else "lora_rank_cap")
    wanted = supervised_tokens * number("lora_parameters_per_token")
    ranks = [rank for rank in rule("lora_ranks").value if number("lora_rank_floor") <= rank <= cap]
    value = next((rank for rank in ranks if model.lora_parameters(rank, targets) >= wanted), ranks[-1])
    parameters = model.lora_parameters(value, targets)
    if parameters >= wanted:
        floor = " (the floor: lower ranks save next to nothing)" if value == ranks[0] else ""
        why = f"r {value} gives {parameters:,} parameters for your {supervised_tokens:,} trained tokens, enough{floor}"
    else:
        why = (
            f"your {supervised_tokens:,} trained tokens could use more than r {value}'s {parameters:,} parameters, "
            "but beyond it the measured gain is about 0.1 %"
        )
    span = rule("lora_rank_range").value
    evidence = cited("lora_ranks", "lora_parameters_per_token", "lora_rank_floor", "lora_rank_cap")
    return Choice(value=value, low=span["low"], high=span["high"], reason=why, evidence=evidence)


def choose_alpha(r: int) -> Choice:
    """The sweep's own alpha, so that its rates need no conversion; never below r, so that alpha/r stays at least 1."""
    value = float(max(number("lora_alpha"), r))
    why = (
        f"with r {r} this scales the update by {shown(value / r)}; rates were measured at alpha "
        f"{shown(number('lora_alpha'))}, and the rate is chosen to match"
    )
    return Choice(value=value, low=float(r), high=float(max(2 * r, value)), reason=why, evidence=cited("lora_alpha"))


def choose_dropout(epochs: float, rows: int) -> Choice:
    many = epochs > number("lora_dropout_epochs")
    why = f"{shown(epochs)} epochs over your {rows:,} rows: no dropout, which is exact and fastest"
    if many:
        why += f"; should the held-out loss turn up before the end, {shown(number('lora_dropout_try'))} is worth a try"
    return from_rule(rule("lora_dropout"), why)


def choose_targets(model: ModelFacts) -> Choice:
    names = model.module_names
    why = f"all {len(names)} kinds of linear layer ({shown(names)}): attention alone learns less at equal size"
    if any(shape.expert for shape in model.lora_shapes):
        why += f"; the experts keep their weights, unless you write [{ALL_LINEAR}, {EXPERTS}]"
    return from_rule(rule("lora_targets"), why)


def choose_bias() -> Choice:
    return from_rule(rule("lora_bias"), "training biases adds files that not every server loads, and no measured gain")


def choose_init() -> Choice:
    why = "A random, B zero: the run starts at exactly your model; other starts gain 1-2 % at most once rates are tuned"
    return from_rule(rule("lora_init"), why)


def choose_rslora(r: int) -> Choice:
    why = f"alpha/r scaling, for which the rates were measured; at r {r} alpha/sqrt(r) would only be a larger alpha"
    return from_rule(rule("lora_rslora"), why)


def target_names(value: str | tuple[str, ...], model: ModelFacts) -> tuple[str, ...] | None:
    """None for all-linear, else the names, each of which must exist: one that matches nothing would train nothing."""
    if value == ALL_LINEAR:
        return None
    names = (value,) if isinstance(value, str) else value
    for name in names:
        leaf = name.rsplit(".", 1)[-1]
        if leaf in _HEADS or not model.parameters_exact or any(is_meant(shape, name) for shape in model.lora_shapes):
            continue
        nearest = get_close_matches(leaf, model.module_names, n=1)
        mend = f"did you mean '{nearest[0]}'?" if nearest else f"it has {shown(model.module_names)}"
        raise InputError(f"{model.id} has no linear layer named '{name}'", where="target_modules", mend=mend)
    return names
