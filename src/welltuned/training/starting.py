"""What a run begins with: new adapters, those of an earlier run, all parameters, and a reward model's head."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from transformers import PreTrainedModel

from welltuned.advice.plan import Plan
from welltuned.models.adapter_file import load_adapter
from welltuned.models.full import FullParameters
from welltuned.models.lora import LoraSettings, attach
from welltuned.models.reward import SCORE, add_score, initial_score, require_classifier, save_classifier
from welltuned.models.saved import named_modules
from welltuned.recipe import Method, Tune
from welltuned.training.start_adapter import adapter_folder
from welltuned.training.step import Trained


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
    elif "modules_to_save" in plan.choices:
        saved = named_modules(model, plan.value("modules_to_save"))
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
