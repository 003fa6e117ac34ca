"""Variants of LoRA and the average of weights: never advised by themselves, and what they are worth said when asked.

At a tuned rate nine variants end within 1-2 % of each other (E096), so none is worth more than the rate. What can be
worth it is special: few layers or uneven ranks where memory decides, trained embeddings for new tokens.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from welltuned.advice.learning_rate import two_digits
from welltuned.advice.rules import number, rule
from welltuned.advice.settle import shown
from welltuned.choice import Choice, SetBy
from welltuned.facts.architecture import LinearShape
from welltuned.facts.model import ModelFacts
from welltuned.models.lora_settings import by_pattern
from welltuned.recipe import VARIANTS, Recipe

RULES = {
    "use_dora": "lora_dora",
    "rank_pattern": "lora_patterns",
    "alpha_pattern": "lora_patterns",
    "layers_to_transform": "lora_layers",
    "modules_to_save": "lora_modules_to_save",
    "loraplus_lr_ratio": "lora_plus_ratio",
    "ema_decay": "ema_decay",
}
_WORTH = {
    "use_dora": "at tuned rates it is within 1-2 % of LoRA, and costs time and one number for each output",
    "rank_pattern": "r decides the other layers; worth it where memory decides, since ranks hardly matter otherwise",
    "alpha_pattern": "lora_alpha decides the other layers; it is a rate of their own, which nothing here is tuned for",
    "layers_to_transform": "all other layers stay as they are: less memory, and less is learned at equal size",
    "modules_to_save": "worth it for new tokens or another language; it is most of what the adapter's file holds",
    "loraplus_lr_ratio": "the rate is chosen so that B's is the law's: at a tuned rate the ratio gains 1-2 % at most",
    "ema_decay": "the result stays the last or best weights; the average is judged and written beside it",
}


def variant_choices(recipe: Recipe, model: ModelFacts) -> Mapping[str, Choice]:
    """What the user set of them."""
    return {name: _set(recipe, name, model) for name in RULES if name in VARIANTS & recipe.hyperparameters.keys()}


def rate_choices(recipe: Recipe, rate: float) -> Mapping[str, Choice]:
    """Rates of their own, and the average of the weights; only where the recipe asks for them."""
    given = recipe.hyperparameters
    found = {name: _set(recipe, name) for name in ("loraplus_lr_ratio", "ema_decay") if name in given}
    if "modules_to_save" in given:
        share, rate = number("embedding_rate_share"), rate * given.get("loraplus_lr_ratio", 1.0)
        why = f"{shown(share)} of the adapters' rate, as all weights take a tenth of what adapters take"
        spec, name = rule("embedding_rate_share"), "embedding_learning_rate"
        value = two_digits(rate * share)
        choice = Choice(
            value=value,
            low=two_digits(value * share),
            high=rate,
            reason=f"{why}, {shown(rate)}",
            evidence=spec.evidence,
        )
        if name in given:
            told = f"set by you; the advice would be {shown(value)}: {why}"
            choice = replace(choice, value=given[name], reason=told, set_by=SetBy.USER)
        found[name] = choice
    return found


def for_ratio(advised: Choice, recipe: Recipe) -> Choice:
    """With LoRA+ learning_rate is A's: the law, which the first updates of B decide, speaks of B's."""
    ratio = recipe.hyperparameters.get("loraplus_lr_ratio", 1.0)
    if ratio == 1:
        return advised
    low, high = ((None if end is None else two_digits(end / ratio)) for end in (advised.low, advised.high))
    why = f"{advised.reason}; that is B's rate, and A's is {shown(float(ratio))} times lower (loraplus_lr_ratio)"
    return replace(advised, value=two_digits(advised.value / ratio), low=low, high=high, reason=why)


def _set(recipe: Recipe, name: str, model: ModelFacts | None = None) -> Choice:
    value, spec = recipe.hyperparameters[name], rule(RULES[name])
    span = (spec.low, spec.high) if isinstance(value, float) else (None, None)
    where = f" ({shown(len(value))} of {model.layers} layers)" if name == "layers_to_transform" and model else ""
    return Choice(
        value=value,
        low=span[0],
        high=span[1],
        reason=f"set by you{where}; the advice would be {shown(spec.value)}: {_WORTH[name]}",
        evidence=spec.evidence,
        set_by=SetBy.USER,
    )


def more_parameters(model: ModelFacts, choices: Mapping[str, Choice], targets: Iterable[str] | None) -> int:
    """Trained numbers beyond r for every target (or fewer): what memory and time depend on.

    A pattern that names single layers is counted for the share of the layers that it can mean.
    """
    if "r" not in choices:
        return 0
    given: dict[str, Any] = {name: choice.value for name, choice in choices.items() if name in VARIANTS}
    r, patterns = choices["r"].value, tuple(given.get("rank_pattern", {}).items())
    kept = len(given["layers_to_transform"]) / model.layers if "layers_to_transform" in given else 1.0
    more = 0.0
    for shape in model.adapted(None if targets is None else tuple(targets)):
        plain = r * (shape.inputs + shape.outputs) * shape.count
        one = _rank(shape, patterns, r) * (shape.inputs + shape.outputs) * shape.count * kept
        more += one - plain + (shape.outputs * shape.count * kept if given.get("use_dora") else 0)
    saved = len(given.get("modules_to_save", ()))
    return round(more) + model.head_parameters * (min(saved, 1) if model.tied_head else saved)


def _rank(shape: LinearShape, patterns: tuple[tuple[str, int], ...], r: int) -> int:
    """The rank of a kind of layer; a pattern for one layer of it counts as one for all."""
    whole = by_pattern(patterns, f"model.layers.0.{shape.name}", 0)
    return whole or max((rank for key, rank in patterns if key.rpartition(".")[2] == shape.name), default=r)
