"""The adapter: rank from how much there is to learn, alpha, targets, dropout, start.

A LoRA parameter holds about two bits, a trained token brings at most about one (E037): the rank is the smallest whose
parameters number at least half of the supervised tokens, within the band in which ranks have been measured to matter.
"""

from difflib import get_close_matches

from welltuned.advice.rules import cited, number, rule
from welltuned.advice.settle import counted, from_rule, passes_words, settle, shown, size_words
from welltuned.advice.variants import variant_choices
from welltuned.choice import Choice, SetBy
from welltuned.errors import InputError
from welltuned.facts.adapter import AdapterFacts
from welltuned.facts.architecture import EXPERTS, is_meant
from welltuned.facts.data import DatasetFacts
from welltuned.facts.model import ModelFacts
from welltuned.recipe import ALL_LINEAR, Method, Recipe, Tune

_HEADS = ("lm_head", "embed_out", "embed_tokens")


def adapter_choices(
    choices: dict[str, Choice], recipe: Recipe, model: ModelFacts, data: DatasetFacts, adapter: AdapterFacts | None
) -> tuple[str, ...] | None:
    """Add the LoRA choices; the names of the targets, None for all or for full fine-tuning."""
    if recipe.tune is Tune.FULL:
        return None
    if adapter is not None:
        return _as_it_is(choices, recipe, model, adapter)
    choices["target_modules"] = settle(recipe, "target_modules", choose_targets(model))
    targets = target_names(choices["target_modules"].value, model)
    if recipe.method is Method.GRPO:
        rank = choose_rank_by_reward(model, targets, data.rows)
    else:
        rank = choose_rank(model, targets, data.supervised_tokens)
    choices["r"] = settle(recipe, "r", rank)
    r = choices["r"].value
    choices["lora_alpha"] = settle(recipe, "lora_alpha", choose_alpha(r))
    choices["use_rslora"] = settle(recipe, "use_rslora", choose_rslora(r))
    choices["init_lora_weights"] = settle(recipe, "init_lora_weights", choose_init())
    choices["bias"] = settle(recipe, "bias", choose_bias())
    choices |= variant_choices(recipe, model)
    return targets


def _as_it_is(
    choices: dict[str, Choice], recipe: Recipe, model: ModelFacts, adapter: AdapterFacts
) -> tuple[str, ...] | None:
    """The shape of an adapter that training goes on from is not to be chosen."""
    targets = target_names(adapter.target_modules, model) if adapter.target_modules else None
    values = {
        "target_modules": adapter.target_modules or ALL_LINEAR,
        "r": adapter.r,
        "lora_alpha": adapter.lora_alpha,
        "use_rslora": adapter.use_rslora,
        "init_lora_weights": True,
        "bias": adapter.bias,
    }
    for name, value in values.items():
        given = recipe.hyperparameters.get(name, value)
        if name in ("target_modules", "init_lora_weights") and name in recipe.hyperparameters or given != value:
            what = f"{name} is the adapter's own ({shown(value)}), and cannot be {shown(given)}"
            raise InputError(what, where=name, mend="remove it, or leave adapter out to train a new one")
        rules = {"target_modules": "lora_targets", "r": "lora_rank_range", "lora_alpha": "lora_alpha"}
        rules |= {"use_rslora": "lora_rslora", "init_lora_weights": "lora_init", "bias": "lora_bias"}
        number = isinstance(value, int | float) and not isinstance(value, bool)
        choices[name] = Choice(
            value=value,
            low=value if number else None,
            high=value if number else None,
            reason=f"as it is in the adapter that training goes on from, of rank {adapter.r} ({adapter.folder})",
            evidence=cited(rules[name]),
            set_by=SetBy.USER,
        )
    return targets


def choose_rank(model: ModelFacts, targets: tuple[str, ...] | None, supervised_tokens: int) -> Choice:
    """The smallest rank that can hold what the data may teach, between the floor and the cap."""
    large = supervised_tokens > number("lora_large_data_tokens")
    cap = number("lora_rank_cap_large_data" if large else "lora_rank_cap")
    wanted = supervised_tokens * number("lora_parameters_per_token")
    ranks = [rank for rank in rule("lora_ranks").value if number("lora_rank_floor") <= rank <= cap]
    value = next((rank for rank in ranks if model.lora_parameters(rank, targets) >= wanted), ranks[-1])
    parameters = model.lora_parameters(value, targets)
    if parameters >= wanted:
        floor = "; it is the floor, since lower ranks save next to nothing" if value == ranks[0] else ""
        why = f"{size_words(parameters)} parameters hold your {supervised_tokens:,} trained tokens{floor}"
    else:
        why = f"your {supervised_tokens:,} trained tokens could use more than {parameters:,} parameters"
        why += "; a higher rank was measured to gain about 0.1 %"
    span = rule("lora_rank_range").value
    evidence = cited("lora_ranks", "lora_parameters_per_token", "lora_rank_floor", "lora_rank_cap")
    return Choice(value=value, low=span["low"], high=span["high"], reason=why, evidence=evidence)


def choose_rank_by_reward(model: ModelFacts, targets: tuple[str, ...] | None, prompts: int) -> Choice:
    """For reinforcement learning, which tells about a bit an answer: any rank can hold that."""
    spec = rule("lora_rank_reward")
    parameters = model.lora_parameters(spec.value, targets)
    why = (
        f"an answer brings about one bit, so capacity is no matter; r {spec.value} has {parameters:,} parameters for "
        f"those to your {prompts:,} prompts, and sources disagree on whether r 1 would do"
    )
    return from_rule(spec, why)


def choose_alpha(r: int) -> Choice:
    """The sweep's own alpha, so that its rates need no conversion; never below r, so that alpha/r stays at least 1."""
    value = float(max(number("lora_alpha"), r))
    measured = f"at alpha {shown(number('lora_alpha'))}"
    if value == number("lora_alpha"):
        why = f"the rates were measured {measured}; at r {r} it scales the adapter by {shown(value / r)}"
    else:
        why = f"at least r, which scales the adapter by {shown(value / r)}"
        why += f"; the rates were measured {measured}, and yours is converted"
    return Choice(value=value, low=float(r), high=float(max(2 * r, value)), reason=why, evidence=cited("lora_alpha"))


def choose_dropout(epochs: float, rows: int) -> Choice:
    many = epochs > number("lora_dropout_epochs")
    why = f"{passes_words(epochs)} over your {counted(rows, 'row')}: no dropout, which is exact and fastest"
    if many:
        why += f"; should the held-out loss turn up before the end, {shown(number('lora_dropout_try'))} is worth a try"
    return from_rule(rule("lora_dropout"), why)


def choose_targets(model: ModelFacts) -> Choice:
    names = model.module_names
    why = f"attention alone learns less at equal size; these are all {len(names)} kinds of linear layer: {shown(names)}"
    if any(shape.expert for shape in model.lora_shapes):
        why += f"; the experts keep their weights, unless you write [{ALL_LINEAR}, {EXPERTS}]"
    return from_rule(rule("lora_targets"), why)


def choose_bias() -> Choice:
    return from_rule(rule("lora_bias"), "trained biases are files that not every server loads, for no measured gain")


def choose_init() -> Choice:
    why = "A random, B zero: starts at exactly your model; other starts gain 1-2 % at most once rates are tuned"
    return from_rule(rule("lora_init"), why)


def choose_rslora(r: int) -> Choice:
    why = f"alpha/r, for which the rates were measured; at r {r} alpha/sqrt(r) would only be a larger alpha"
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
