"""TRL's YAML: what `trl sft --config` and TrlParser take, the alignment handbook's recipes, and HF YAML alike."""

from collections.abc import Mapping
from pathlib import PurePath
from types import MappingProxyType
from typing import Any

from welltuned.advice.lint.config import Config, Tool
from welltuned.interop.build import Draft, draft_of, judge_keys
from welltuned.interop.known import HANDBOOK_KEYS, REMOVED, config_keys, keys_of
from welltuned.interop.yaml_file import YamlFile
from welltuned.recipe import Method, Tune

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "eval_strategy": "eval_strategy",
        "max_length": "max_length",
        "dtype": "dtype",
        "gradient_checkpointing": "gradient_checkpointing",
        "model_name_or_path": "model",
        "dataset_name": "data",
        "dataset_mixture": "data",
        "dataset_mixer": "data",
        "torch_dtype": "dtype",
        "max_seq_length": "max_length",
        "lora_r": "r",
        "lora_target_modules": "target_modules",
        "lora_target_parameters": "target_parameters",
        "lora_modules_to_save": "modules_to_save",
        "evaluation_strategy": "eval_strategy",
        "activation_checkpointing": "gradient_checkpointing",
        "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    }
)

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "SFTConfig": Method.SFT,
        "DPOConfig": Method.DPO,
        "GRPOConfig": Method.GRPO,
        "KTOConfig": Method.KTO,
        "ORPOConfig": Method.ORPO,
    }
)
OWNERS: Mapping[Method, str] = MappingProxyType({method: owner for owner, method in METHODS.items()})

_COMMON: Mapping[str, Any] = MappingProxyType(
    {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 3.0,
        "max_steps": -1,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 500,
        "load_best_model_at_end": False,
        "logging_nan_inf_filter": True,
        "fp16": False,
    }
)
_RATES = {Method.SFT: 2e-5, Method.DPO: 1e-6, Method.GRPO: 1e-6, Method.KTO: 1e-6, Method.ORPO: 1e-6}
_ADAPTER = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "use_rslora": False}
PEFT_ADAPTER: Mapping[str, Any] = MappingProxyType(
    {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "init_lora_weights": True}
)


def defaults(method: Method | None) -> dict[str, Any]:
    """TRL 1.16's own values for what a run does not set."""
    found = dict(_COMMON)
    if method is None:
        return found
    found["learning_rate"] = _RATES[method]
    if method is not Method.GRPO:
        found["max_length"] = 1024
    if method is Method.SFT:
        found |= {"packing": False, "packing_strategy": "bfd", "assistant_only_loss": False}
    elif method is Method.GRPO:
        found |= {"num_generations": 8, "temperature": 1.0, "beta": 0.0, "loss_type": "dapo"}
        found |= {"max_completion_length": 512, "scale_rewards": "group"}
    else:
        found["beta"] = 0.1
    if method is Method.DPO:
        found["loss_type"] = ["sigmoid"]
    return found


def read_trl(yaml: YamlFile, file: str, method: Method | None = None) -> Config:
    """A TRL or HF YAML. Its method is the asked one, else what its keys and its path say."""
    draft = draft_of(yaml, file, Tool.TRL, NAMES)
    keys = {entry.key for entry in yaml.entries if entry.top}
    draft.method = method or method_of_keys(keys) or method_of_path(file)
    if draft.method is None and (told := [key for key in _PREFERENCE_KEYS if key in keys]):
        draft.method = Method.DPO  # by far the commonest that has them; said, because KTO and ORPO have them too
        draft.note("method_by", told[0], told[0], 1)
    draft.defaults = defaults(draft.method)
    _settle_tune(draft, keys)
    _settle_evaluation(draft)
    for entry in yaml.entries:
        if entry.top and entry.text_number:
            draft.note("text_number", entry.raw, entry.key, entry.line)
    owner = OWNERS[draft.method] if draft.method else None
    owners = (*((owner,) if owner else METHODS), "TrainingArguments", "ModelConfig", "ScriptArguments")
    known = keys_of(*owners, "DatasetMixtureConfig") | HANDBOOK_KEYS
    known |= config_keys(owner or "TrainingArguments")
    judge_keys(draft, yaml.entries, owners, known, f"TRL's {owner}" if owner else "TRL's configuration")
    return draft.finish()


def method_of_keys(keys: set[str]) -> Method | None:
    """The only method whose own keys, today's or yesterday's, are among these; None where none or several fit."""
    fits = []
    for owner, method in METHODS.items():
        others = keys_of(*(other for other in METHODS if other != owner)) | keys_of("TrainingArguments")
        own = keys_of(owner) | REMOVED.get(owner, {}).keys()
        elsewhere = others | {key for other, gone in REMOVED.items() if other != owner for key in gone}
        if keys & (own - elsewhere) or keys & _TELLING[method]:
            fits.append(method)
    return fits[0] if len(fits) == 1 else None


_TELLING: Mapping[Method, frozenset[str]] = MappingProxyType(
    {
        Method.SFT: frozenset(
            {"max_seq_length", "dataset_text_field", "packing", "assistant_only_loss", "completion_only_loss"}
        ),
        Method.DPO: frozenset(),
        Method.GRPO: frozenset({"num_generations", "reward_funcs"}),
        Method.KTO: frozenset({"desirable_weight", "undesirable_weight"}),
        Method.ORPO: frozenset(),
    }
)
_PREFERENCE_KEYS = ("beta", "precompute_ref_log_probs", "max_prompt_length")


def method_of_path(file: str) -> Method | None:
    """A method that a folder or the file is named after: recipes/zephyr/dpo/config.yaml."""
    words = [
        word
        for part in PurePath(file).parts[-3:]
        for word in part.lower().replace("-", "_").replace(".", "_").split("_")
    ]
    found = {method for method in Method if str(method) in words}
    return found.pop() if len(found) == 1 else None


def _settle_tune(draft: Draft, keys: set[str]) -> None:
    lora = sorted(key for key in keys if key.startswith("lora_"))
    if draft.value("use_peft") is True:
        draft.tune = Tune.QLORA if draft.value("load_in_4bit") is True else Tune.LORA
        draft.defaults |= _ADAPTER
        return
    draft.tune = Tune.FULL
    if lora:
        name = draft.neutral(lora[0])
        draft.note(
            "adapter_unused",
            "use_peft is not true",
            lora[0],
            draft.settings[name].line if name in draft.settings else 1,
        )


def _settle_evaluation(draft: Draft) -> None:
    """TRL's scripts evaluate on the test split as soon as eval_strategy asks for it."""
    strategy = draft.settings.get("eval_strategy")
    if strategy is not None and strategy.value not in (False, "no"):
        draft.put("eval_data", True, strategy.key, strategy.line)
    for key in ("dataset_test_split", "dataset_mixture.test_split_size", "test_split_size"):
        if key in draft.settings:
            draft.put("eval_data", True, key, draft.settings[key].line)
