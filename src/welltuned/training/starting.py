"""What a run begins with: new adapters, those of an earlier run, all parameters, and a reward model's head."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel

from welltuned.advice.plan import Plan
from welltuned.choice import Choice
from welltuned.errors import InputError
from welltuned.models.adapter_file import CONFIG, adapted_leaves, load_adapter, read_config
from welltuned.models.full import FullParameters
from welltuned.models.lora import LoraSettings, attach
from welltuned.models.resolve import resolve
from welltuned.models.reward import SCORE, add_score, initial_score, require_classifier, save_classifier
from welltuned.recipe import Method, Recipe, Tune
from welltuned.training.rundir import ADAPTER, MODEL, RUN, read_run
from welltuned.training.step import Trained

_FROM_ADAPTER = ("r", "lora_alpha", "use_rslora", "bias", "target_modules", "init_lora_weights")


def trained_parts(
    model: PreTrainedModel, plan: Plan, idle: tuple[str, ...], new_adapters: Callable[[], LoraSettings]
) -> Trained:
    """What of a loaded model is trained by this plan, as it is before the first update.

    Args:
        idle: parts that text never reaches.
        new_adapters: settings for adapters that begin at nothing.
    """
    recipe = plan.recipe
    saved: tuple[str, ...] = ()
    if recipe.method is Method.REWARD:
        require_classifier(model)
        add_score(model, plan.value("seed"))
        saved = (SCORE,)
    if recipe.tune is Tune.FULL:
        return FullParameters(model, frozen=(*idle, *(_unused_head(model) if saved else ())))
    if recipe.adapter is None:
        return attach(model, new_adapters(), saved)
    folder = adapter_folder(recipe.adapter)
    return load_adapter(model, folder, dropout=plan.value("lora_dropout"), saved=saved)


def _unused_head(model: PreTrainedModel) -> tuple[str, ...]:
    """The output embedding of a reward model, which nothing runs through; one that is tied learns as the input's."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embedding.weight:
        return ()
    return tuple(name for name, module in model.named_modules() if module is head)


def score_at_start(plan: Plan, base: PreTrainedModel) -> Mapping[str, torch.Tensor]:
    """A reward model's head as it began, by name; nothing for other methods."""
    if plan.recipe.method is not Method.REWARD:
        return MappingProxyType({})
    hidden = base.config.get_text_config().hidden_size
    return {f"{SCORE}.weight": initial_score(hidden, plan.value("seed"))}


def save_model(model: PreTrainedModel, method: Method, folder: Path) -> None:
    """Write a fully tuned model in transformers' format."""
    if method is Method.REWARD:
        save_classifier(model, folder)
    else:
        model.save_pretrained(folder)


# ── the adapter of an earlier run ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class StartAdapter:
    """What is fixed by the adapter that training goes on from.

    Attributes:
        values: hyperparameters by name.
        note: a sentence where something about it should be seen.
    """

    values: Mapping[str, Any]
    note: str | None


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
    for key in _FROM_ADAPTER:
        asked = recipe.hyperparameters.get(key)
        if asked is not None and key in ("r", "lora_alpha", "use_rslora", "bias") and asked != values[key]:
            what = f"{key} is {asked}, and the adapter that training goes on from has {values[key]}"
            raise InputError(what, where=key, mend="remove one of the two")
        if asked is not None and key in ("target_modules", "init_lora_weights"):
            raise InputError(f"{key} is fixed by the adapter that training goes on from", where=key, mend="remove it")
    return StartAdapter(MappingProxyType(values), _other_base(recipe, config))


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
