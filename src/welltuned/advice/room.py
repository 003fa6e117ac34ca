"""Where memory is short: which layers are recomputed, where their inputs wait, and whether a 4-bit base stays dense."""

from collections.abc import Mapping
from typing import Any

from welltuned.advice.memory import Fitted, Fixed
from welltuned.advice.rules import cited, number
from welltuned.advice.settle import bytes_words, settle
from welltuned.choice import Choice
from welltuned.errors import InputError
from welltuned.facts.machine import Device
from welltuned.facts.model import ModelFacts
from welltuned.recipe import DENSE_BASES, Recipe, Tune

CACHED, REBUILT = DENSE_BASES


def fixed_by(user: Mapping[str, Any], model: ModelFacts, device: Device, token_budget: int | None) -> Fixed:
    """What the recipe fixed.

    Raises:
        InputError: more layers than the model has, or a host to offload to where there is no GPU.
    """
    layers = user.get("checkpointed_layers")
    if layers is not None and layers > model.layers:
        what = f"checkpointed_layers is {layers} and the model has {model.layers}"
        raise InputError(what, where="checkpointed_layers", mend=f"{model.layers} recomputes them all")
    if user.get("offload_checkpoints") and device is not Device.CUDA:
        what = "offload_checkpoints moves activations from a GPU to the host, and this run has no GPU"
        raise InputError(what, where="offload_checkpoints", mend="remove it")
    return Fixed(
        token_budget=token_budget,
        checkpointing=user.get("gradient_checkpointing"),
        layers=layers,
        offload=user.get("offload_checkpoints"),
        dense_base=None if "dense_base" not in user else user["dense_base"] == CACHED,
    )


def room_choices(recipe: Recipe, model: ModelFacts, device: Device, fitted: Fitted, limit: int) -> dict[str, Choice]:
    """The choices that trade time for memory; none of them changes a number of the result."""
    room, user = bytes_words(limit), recipe.hyperparameters
    cost = f"about {number('checkpointing_cost') * (fitted.share or 1.0):.0%} more arithmetic"
    again = (
        f"only so does the run fit into {room}, for {cost}"
        if fitted.checkpointing
        else f"all activations fit into your {room}: computing them twice would waste {cost}"
    )
    advised = {"gradient_checkpointing": _why(fitted.checkpointing, again)}
    if fitted.checkpointing or "checkpointed_layers" in user:
        advised["checkpointed_layers"] = _layers(model, fitted, user, room)
    if device is Device.CUDA and (fitted.checkpointing or "offload_checkpoints" in user):
        advised["offload_checkpoints"] = _why(fitted.offload, _place(fitted, room))
    if recipe.tune is Tune.QLORA:
        dense = CACHED if fitted.dense_base else REBUILT
        advised["dense_base"] = Choice(value=dense, reason=_base(fitted, room), evidence=cited("dense_base"))
    return {name: settle(recipe, name, choice) for name, choice in advised.items()}


def _why(value: bool, reason: str) -> Choice:
    return Choice(value=value, reason=reason, evidence=cited("checkpointing_cost"))


def _layers(model: ModelFacts, fitted: Fitted, user: Mapping[str, Any], room: str) -> Choice:
    if fitted.layers == model.layers:
        why = "gradient_checkpointing is yours and means every layer" if "gradient_checkpointing" in user else ""
        reason = why or f"with fewer of its {model.layers} layers recomputed the run would not fit into {room}"
    else:
        reason = f"the fewest of its {model.layers} layers with which the run fits into {room}: each costs time"
    return Choice(value=fitted.layers, low=0, high=model.layers, reason=reason, evidence=cited("checkpointing_cost"))


def _place(fitted: Fitted, room: str) -> str:
    if not fitted.offload:
        return f"what goes into recomputed layers fits into {room} as well, and copying it would take time"
    return f"only so does the run fit into {room}: {bytes_words(fitted.host_bytes)} wait in the host's memory instead"


def _base(fitted: Fitted, room: str) -> str:
    """Both ways have the same bits."""
    if fitted.dense_base:
        takes = bytes_words(fitted.forecast.parts["dense_base"])
        return f"{takes} of your {room} hold the base expanded, so that no pass expands it again; the numbers are equal"
    return f"expanded, the 4-bit base would not fit into {room} too, so every product expands its weight again"
