"""Axolotl's YAML."""

from collections.abc import Mapping
from types import MappingProxyType

from welltuned.advice.lint.config import Config, Setting, Tool
from welltuned.interop.build import Draft, draft_of, judge_keys
from welltuned.interop.known import keys_of
from welltuned.interop.yaml_file import YamlFile
from welltuned.recipe import ALL_LINEAR, Method, Tune

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "base_model": "model",
        "datasets": "data",
        "pretraining_dataset": "data",
        "micro_batch_size": "per_device_train_batch_size",
        "batch_size": "effective_batch_size",
        "eval_batch_size": "per_device_eval_batch_size",
        "num_epochs": "num_train_epochs",
        "optimizer": "optim",
        "lr_scheduler": "lr_scheduler_type",
        "sequence_len": "max_length",
        "sample_packing": "packing",
        "lora_r": "r",
        "lora_target_modules": "target_modules",
        "lora_target_parameters": "target_parameters",
        "lora_modules_to_save": "modules_to_save",
        "peft_use_rslora": "use_rslora",
        "peft_use_dora": "use_dora",
        "peft_init_lora_weights": "init_lora_weights",
        "train_on_inputs": "train_on_prompt",
        "val_set_size": "eval_share",
        "test_datasets": "eval_data",
        "eval_strategy": "eval_strategy",
        "evaluation_strategy": "eval_strategy",
        "rl_beta": "beta",
        "dpo_beta": "beta",
        "trl.beta": "beta",
        "trl.num_generations": "num_generations",
        "trl.generation_batch_size": "generation_batch_size",
        "trl.max_completion_length": "max_completion_length",
        "trl.temperature": "temperature",
        "trl.loss_type": "loss_type",
        "special_tokens.pad_token": "pad_token",
        "special_tokens.eos_token": "eos_token",
    }
)
_METHODS = {
    "dpo": Method.DPO,
    "ipo": Method.DPO,
    "gdpo": None,
    "grpo": Method.GRPO,
    "orpo": Method.ORPO,
    "kto": Method.KTO,
    "simpo": None,
    "ebft": None,
}
_ATTENTION_FLAGS = {
    "flash_attention": "flash_attention_2",
    "flex_attention": "flex_attention",
    "sdp_attention": "sdpa",
    "xformers_attention": "xformers",
    "sage_attention": "sage",
    "eager_attention": "eager",
}


def read_axolotl(yaml: YamlFile, file: str) -> Config:
    draft = draft_of(yaml, file, Tool.AXOLOTL, NAMES)
    _settle_method(draft)
    _settle_tune(draft)
    draft.defaults |= {
        "num_train_epochs": 1.0,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 1,
        "max_length": 512,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "eval_share": 0.0,
        "train_on_prompt": False,
        "packing": False,
        "logging_nan_inf_filter": True,
        "eval_strategy": "epoch",  # as soon as there is anything to evaluate on
    }
    if not {"warmup_steps", "warmup_ratio"} & draft.settings.keys():
        draft.defaults["warmup_ratio"] = 0.03
    _settle_evaluation(draft)
    _settle_attention(draft)
    _settle_datasets(draft)
    judge_keys(draft, yaml.entries, ("axolotl",), keys_of("axolotl") | _ATTENTION_FLAGS.keys() | _READ_RAW, "Axolotl")
    return draft.finish()


_READ_RAW = frozenset({"debug", "eta_min", "gptq_groupsize", "gptq_model_v1", "gptq_disable_exllama", "full_finetune"})


def _settle_method(draft: Draft) -> None:
    rl = draft.value("rl")
    draft.stage = str(rl or "")
    if rl is None:
        reward = draft.value("reward_model") or draft.value("process_reward_model")
        pretraining = "pretraining_dataset" in {setting.key for setting in draft.settings.values()}
        draft.stage = "reward" if reward else "pt" if pretraining else ""
        draft.method = None if reward else Method.SFT
        return
    draft.method = _METHODS.get(str(rl).lower())


def _settle_tune(draft: Draft) -> None:
    adapter = draft.value("adapter")
    if adapter in ("lora", "qlora"):
        quantised = adapter == "qlora" or draft.value("load_in_4bit") is True
        draft.tune = Tune.QLORA if quantised else Tune.LORA
        draft.defaults |= {"lora_dropout": 0.0, "use_rslora": False}
        linear = draft.settings.get("lora_target_linear")
        if linear is not None and linear.value is True:
            draft.put("target_modules", ALL_LINEAR, linear.key, linear.line)
        return
    draft.tune = None if adapter else Tune.FULL
    written = [s for name, s in draft.settings.items() if name in ("r", "lora_alpha", "target_modules")]
    if draft.tune is Tune.FULL and written:
        first = min(written, key=lambda setting: setting.line)
        draft.note("adapter_unused", "no adapter is set", first.key, first.line)


def _settle_evaluation(draft: Draft) -> None:
    for key in ("evals_per_epoch", "eval_steps"):
        if draft.value(key) and "eval_strategy" not in draft.settings:
            draft.put("eval_strategy", "steps", key, draft.settings[key].line)


def _settle_attention(draft: Draft) -> None:
    for flag, name in _ATTENTION_FLAGS.items():
        setting = draft.settings.get(flag)
        if setting is not None and setting.value is True and "attn_implementation" not in draft.settings:
            draft.put("attn_implementation", name, flag, setting.line)


def _settle_datasets(draft: Draft) -> None:
    """What single datasets ask for: a removed `type`, and answers whose end is not trained."""
    data = draft.settings.get("data")
    for entry in data.value if data is not None and isinstance(data.value, list) else ():
        if isinstance(entry, dict):
            _settle_dataset(draft, entry, data)


def _settle_dataset(draft: Draft, entry: dict[str, object], data: Setting | None) -> None:
    line = data.line if data else 1
    kind = entry.get("type")
    if isinstance(kind, str) and kind.startswith("sharegpt"):
        draft.note("removed_type", kind, "datasets", line)
    if entry.get("train_on_eos") == "none":
        draft.note("end_untrained", "train_on_eos: none", "datasets", line)
