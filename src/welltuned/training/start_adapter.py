"""The adapter of an earlier run that training goes on from, and what it fixes of the plan. No torch without one."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from welltuned.advice.plan import Plan
from welltuned.choice import Choice
from welltuned.errors import InputError
from welltuned.models.resolve import resolve
from welltuned.recipe import Recipe
from welltuned.training.rundir import ADAPTER, MODEL, RUN, read_run

CONFIG = "adapter_config.json"
_FIXED = ("r", "lora_alpha", "use_rslora", "bias")
_ITS_OWN = ("target_modules", "init_lora_weights")


@dataclass(frozen=True, slots=True)
class StartAdapter:
    """What is fixed by the adapter that training goes on from.

    Attributes:
        values: hyperparameters by name.
        note: a sentence where something about it should be seen.
        digest: of its numbers, as they lie on disk.
    """

    values: Mapping[str, Any]
    note: str | None
    digest: str


def adapter_folder(adapter: str) -> Path:
    """The PEFT folder that a recipe's `adapter` means: itself, or a Run's."""
    path = Path(adapter).expanduser()
    if (path / CONFIG).is_file():
        return path
    if (path / RUN).is_file():
        if (path / ADAPTER / CONFIG).is_file():
            return path / ADAPTER
        if (path / MODEL).is_dir():
            what, mend = "this Run trained all of a model", f"give its folder as the model: {path / MODEL}"
            raise InputError(what, where=f"adapter: {adapter}", mend=mend)
    if (path / ADAPTER / CONFIG).is_file():
        raise InputError("this Run is not finished", where=f"adapter: {adapter}", mend="resume it first")
    mend = "give the directory of a finished run, or a folder in PEFT's format"
    raise InputError(f"there is no adapter (no {RUN}, no {CONFIG})", where=f"adapter: {adapter}", mend=mend)


def start_adapter(recipe: Recipe) -> StartAdapter | None:
    """What the recipe's start adapter fixes; None without one.

    Raises:
        InputError: there is none there, or the recipe asks for something else.
    """
    if recipe.adapter is None:
        return None
    from welltuned.models.adapter_file import WEIGHTS, adapted_leaves, read_config

    folder = adapter_folder(recipe.adapter)
    config = read_config(folder)
    values = {
        "r": int(config["r"]),
        "lora_alpha": float(config["lora_alpha"]),
        "use_rslora": bool(config.get("use_rslora")),
        "bias": config.get("bias") or "none",
        "target_modules": adapted_leaves(folder),
        "init_lora_weights": True,
    }
    for key, asked in recipe.hyperparameters.items():
        if key in _FIXED and asked != values[key]:
            what = f"{key} is {asked}, and the adapter that training goes on from has {values[key]}"
            raise InputError(what, where=key, mend="remove one of the two")
        if key in _ITS_OWN:
            raise InputError(f"{key} is fixed by the adapter that training goes on from", where=key, mend="remove it")
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    return StartAdapter(MappingProxyType(values), _other_base(recipe, config), digest)


def _other_base(recipe: Recipe, config: Mapping[str, Any]) -> str | None:
    base = config.get("base_model_name_or_path")
    run = Path(recipe.adapter or "").expanduser() / RUN
    trained_on = read_run(run.parent)["model"] if run.is_file() else base
    if not trained_on or _same(trained_on, recipe.model):
        return None
    return f"the adapter that training goes on from was trained on {trained_on}, and is put on {recipe.model} here"


def _same(a: str, b: str) -> bool:
    try:
        first, second = resolve(a, weights_needed=False), resolve(b, weights_needed=False)
    except InputError:
        return False
    if first.path is None or second.path is None:
        return first.name == second.name
    return first.path.resolve() == second.path.resolve()


def with_start_values(recipe: Recipe, start: StartAdapter | None) -> Recipe:
    """The recipe with what its start adapter fixes among the hyperparameters, to be planned by."""
    if start is None:
        return recipe
    return replace(recipe, hyperparameters=MappingProxyType({**recipe.hyperparameters, **start.values}))


def with_start_reasons(plan: Plan, recipe: Recipe, start: StartAdapter | None) -> Plan:
    """The plan as the user's recipe has it, with the reason why the start adapter's values are what they are."""
    if start is None:
        return plan
    why = "as in the adapter that training goes on from"
    fixed = {name: Choice(value=plan.choices[name].value, reason=why) for name in start.values if name in plan.choices}
    return replace(plan, recipe=recipe, choices=MappingProxyType({**plan.choices, **fixed}))
