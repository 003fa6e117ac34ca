"""What a run begins with: new adapters, those of an earlier run, all parameters, and a reward model's head."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from transformers import PreTrainedModel

from welltuned.advice.plan import Plan
from welltuned.errors import InputError
from welltuned.models.adapter_file import load_adapter
from welltuned.models.full import FullParameters
from welltuned.models.load import load_model
from welltuned.models.lora import AdapterBank, LoraLinear, attach, find_targets, start_loftq
from welltuned.models.lora_settings import Bias, Init, LoraSettings, parse_init
from welltuned.models.parts import within
from welltuned.models.reward import SCORE, add_score, initial_score, require_classifier, save_classifier
from welltuned.models.saved import named_modules
from welltuned.recipe import VARIANTS, Method, Tune
from welltuned.training.ranks import Ranks
from welltuned.training.start_adapter import adapter_folder
from welltuned.training.step import Trained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def trained_parts(
    model: PreTrainedModel,
    plan: Plan,
    idle: tuple[str, ...],
    arms: Sequence[Plan] = (),
    device: torch.device | None = None,
) -> Trained:
    """What of a loaded model is trained by this plan, as it is before the first update.

    Args:
        idle: parts that text never reaches.
        arms: the plans of several new adapters, where there is not one only.
        device: of adapters, where the model waits elsewhere.
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
        return attach(model, [reached(model, arm, idle) for arm in arms or [plan]], saved, device)
    folder = adapter_folder(recipe.adapter)
    return load_adapter(model, folder, dropout=plan.value("lora_dropout"), saved=saved, device=device)


def same_start(trained: Trained, ranks: Ranks) -> None:
    """Give all ranks the first one's new adapters: a start taken from the weights is not the same bits everywhere."""
    if ranks.alone or not isinstance(trained, AdapterBank):
        return
    taken = [m.projection.taken for m in trained.modules.values() if isinstance(m, LoraLinear)]
    ranks.spread_([trained.flat_KP, *(half for pair in taken if pair is not None for half in pair)])
    trained.start_KP.copy_(trained.flat_KP)


def fill_loftq(bank: AdapterBank, plan: Plan) -> tuple[str, ...]:
    """Start at what 4 bits lose, where the plan says so; a sentence on how much that is."""
    recipe = plan.recipe
    if recipe.adapter is not None or bank.settings[0].init is not Init.LOFTQ:
        return ()
    dtype = DTYPES[plan.value("dtype")]
    lost = start_loftq(bank, load_model(recipe.model, dtype=dtype, trust=recipe.trust))
    gc.collect()
    return (lost.sentence(),)


def reached(model: PreTrainedModel, plan: Plan, idle: tuple[str, ...]) -> LoraSettings:
    """The LoRA settings without the targets in parts that text never reaches: they could not learn."""
    settings = lora_settings(plan)
    if not idle:
        return settings
    wanted = settings.target_modules, settings.layers_to_transform
    targets = tuple(name for name in find_targets(model, *wanted) if not within(name, idle))
    if not targets:
        what = f"all of the targets lie in {', '.join(idle)}, which text never reaches"
        raise InputError(what, where="target_modules", mend="name layers of the language model")
    return replace(settings, target_modules=targets)


def lora_settings(plan: Plan) -> LoraSettings:
    """The plan's LoRA choices as the adapter bank takes them."""
    targets, start = plan.value("target_modules"), parse_init(plan.value("init_lora_weights"))
    if start is None:
        raise InputError(f"the start {plan.value('init_lora_weights')} is not known", where="init_lora_weights")
    given = {name: choice.value for name, choice in plan.choices.items() if name in VARIANTS}
    return LoraSettings(
        r=plan.value("r"),
        lora_alpha=plan.value("lora_alpha"),
        lora_dropout=plan.value("lora_dropout"),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_rslora=plan.value("use_rslora"),
        bias=Bias(plan.value("bias")),
        init=start[0],
        svd_iterations=start[1],
        seed=plan.value("seed"),
        rank_pattern=tuple(given.get("rank_pattern", {}).items()),
        alpha_pattern=tuple(given.get("alpha_pattern", {}).items()),
        layers_to_transform=tuple(given.get("layers_to_transform", ())),
        use_dora=bool(given.get("use_dora", False)),
    )


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
