"""LLaMA-Factory's YAML."""

from collections.abc import Mapping
from types import MappingProxyType

from welltuned.advice.lint.config import Config, Tool
from welltuned.interop.build import Draft, draft_of, judge_keys
from welltuned.interop.known import REMOVED, keys_of
from welltuned.interop.yaml_file import YamlFile
from welltuned.recipe import ALL_LINEAR, Method, Tune

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "model_name_or_path": "model",
        "dataset": "data",
        "eval_dataset": "eval_data",
        "val_size": "eval_share",
        "cutoff_len": "max_length",
        "lora_rank": "r",
        "lora_target": "target_modules",
        "additional_target": "modules_to_save",
        "train_on_prompt": "train_on_prompt",
        "flash_attn": "attn_implementation",
        "pref_beta": "beta",
        "pref_loss": "loss_type",
    }
)
_METHODS = {"sft": Method.SFT, "pt": Method.SFT, "dpo": Method.DPO, "kto": Method.KTO}
# Fields of the transformers releases that LLaMA-Factory 0.9.5 takes (up to 5.6), gone from later ones.
_STILL_TAKEN = frozenset(REMOVED["TrainingArguments"]) - {"evaluation_strategy"}


def read_llamafactory(yaml: YamlFile, file: str) -> Config:
    draft = draft_of(yaml, file, Tool.LLAMAFACTORY, NAMES)
    draft.stage = str(draft.value("stage") or "sft")
    draft.method = _METHODS.get(draft.stage)
    draft.defaults |= {
        "learning_rate": 5e-5,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 3.0,
        "max_steps": -1,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_length": 2048,
        "eval_share": 0.0,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 500,
        "load_best_model_at_end": False,
        "train_on_prompt": False,
        "packing": False,
        "logging_nan_inf_filter": True,
        "fp16": False,
        "beta": 0.1,
        "loss_type": "sigmoid",
    }
    if draft.method is Method.DPO and draft.value("loss_type") == "orpo":
        draft.method = Method.ORPO
    elif draft.method is Method.DPO and draft.value("loss_type") == "simpo":
        draft.method = None
    _settle_tune(draft)
    if draft.value("neat_packing") is True:
        setting = draft.settings["neat_packing"]
        draft.put("packing", True, setting.key, setting.line)
    known = keys_of("llamafactory", "TrainingArguments") | _STILL_TAKEN
    judge_keys(draft, yaml.entries, ("llamafactory",), known, "LLaMA-Factory")
    return draft.finish()


def _settle_tune(draft: Draft) -> None:
    kind = draft.value("finetuning_type") or "lora"
    bits = draft.settings.get("quantization_bit")
    if bits is not None:
        draft.put("load_in_4bit" if bits.value == 4 else "load_in_8bit", True, bits.key, bits.line)
    if kind == "lora":
        draft.tune = Tune.QLORA if bits is not None and bits.value == 4 else Tune.LORA
        rank = draft.value("r") if isinstance(draft.value("r"), int) else 8
        draft.defaults |= {"r": 8, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": ALL_LINEAR}
        draft.defaults["use_rslora"] = False
        _split_targets(draft)
        return
    draft.tune = Tune.FULL if kind == "full" else None
    written = [s for name, s in draft.settings.items() if name in ("r", "lora_alpha", "target_modules")]
    if kind == "full" and written:
        first = min(written, key=lambda setting: setting.line)
        draft.note("adapter_unused", "finetuning_type is full", first.key, first.line)


def _split_targets(draft: Draft) -> None:
    """`lora_target` is `all`, or names with commas between them."""
    setting = draft.settings.get("target_modules")
    if setting is None or not isinstance(setting.value, str):
        return
    names = [name.strip() for name in setting.value.split(",") if name.strip()]
    draft.put("target_modules", ALL_LINEAR if names == ["all"] else names, setting.key, setting.line)
