"""Which keys today's tools take (known_keys.json, from their own dataclasses), and which they no longer take.

The lists are facts about versions that `versions()` names; a test compares them with TRL where it is installed.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any

from welltuned.advice.lint.config import BadKey, KeyTrouble

TRL_CONFIGS = (
    "SFTConfig",
    "DPOConfig",
    "GRPOConfig",
    "KTOConfig",
    "ORPOConfig",
    "CPOConfig",
    "RewardConfig",
    "RLOOConfig",
)
NEAR = 0.75  # difflib's similarity from which a name is worth suggesting


@cache
def _lists() -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(files("welltuned.interop").joinpath("known_keys.json").read_text())
    return found


def versions() -> Mapping[str, str]:
    found: Mapping[str, str] = _lists()["versions"]
    return found


@cache
def keys_of(*owners: str) -> frozenset[str]:
    """The keys that any of the owners takes: `keys_of("SFTConfig", "TrainingArguments")`."""
    return frozenset(key for owner in owners for key in _lists()[owner])


def config_keys(owner: str) -> frozenset[str]:
    """All keys of a training configuration class, with those that it inherits."""
    return keys_of("TrainingArguments") if owner == "TrainingArguments" else keys_of(owner, "TrainingArguments")


def nearest(key: str, known: Collection[str], cutoff: float = NEAR) -> str | None:
    found = get_close_matches(key, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


@dataclass(frozen=True, slots=True)
class Gone:
    """A key that was taken once: what to write instead, and what became of it."""

    mend: str
    why: str = ""


def _now(new: str) -> Gone:
    return Gone(f"write `{new}`", f"it is called {new} now")


_DROPPED = Gone("remove the line", "nothing reads it any more")
_IN_COLLATOR = Gone("remove the line; TRL masks labels itself", "the trainer builds its labels itself now")
_NO_PROMPT_LIMIT = Gone(
    "remove it, and filter prompts that are too long when you prepare the data",
    "prompts are no longer cut by the trainer",
)
_ACCELERATE = Gone("put it into `accelerator_config`", "it moved to accelerator_config")

REMOVED: Mapping[str, Mapping[str, Gone]] = {
    "TrainingArguments": {
        "warmup_ratio": Gone(
            "write `warmup_steps: 0.1`: below 1 it is a share of the run", "warmup_steps takes shares now"
        ),
        "evaluation_strategy": _now("eval_strategy"),
        "logging_dir": Gone("set the environment variable TENSORBOARD_LOGGING_DIR", "only TensorBoard used it"),
        "group_by_length": Gone("write `train_sampling_strategy: group_by_length`", "it is a sampling strategy now"),
        "overwrite_output_dir": _DROPPED,
        "no_cuda": _now("use_cpu"),
        "use_mps_device": _DROPPED,
        "save_safetensors": Gone("remove the line", "safetensors is the only format"),
        "fp16_opt_level": _DROPPED,
        "half_precision_backend": _DROPPED,
        "fp16_backend": _DROPPED,
        "per_gpu_train_batch_size": _now("per_device_train_batch_size"),
        "per_gpu_eval_batch_size": _now("per_device_eval_batch_size"),
        "tpu_num_cores": _DROPPED,
        "past_index": _DROPPED,
        "jit_mode_eval": _DROPPED,
        "use_ipex": _DROPPED,
        "ray_scope": _DROPPED,
        "include_inputs_for_metrics": Gone("write `include_for_metrics: [inputs]`", "it is a list now"),
        "include_tokens_per_second": _DROPPED,
        "push_to_hub_token": _now("hub_token"),
        "push_to_hub_model_id": _now("hub_model_id"),
        "push_to_hub_organization": _now("hub_model_id"),
        "fsdp_min_num_params": Gone("put it into `fsdp_config`", "it moved to fsdp_config"),
        "fsdp_transformer_layer_cls_to_wrap": Gone("put it into `fsdp_config`", "it moved to fsdp_config"),
        "torchdynamo": _now("torch_compile"),
        "adafactor": Gone("write `optim: adafactor`", "the optimiser is chosen with optim"),
        "dispatch_batches": _ACCELERATE,
        "split_batches": _ACCELERATE,
        "torch_compile_options": _DROPPED,
    },
    "SFTConfig": {
        "max_seq_length": _now("max_length"),
        "dataset_batch_size": _DROPPED,
        "num_of_sequences": _DROPPED,
        "chars_per_token": _DROPPED,
        "use_liger": _now("use_liger_kernel"),
    },
    "DPOConfig": {
        "max_prompt_length": _NO_PROMPT_LIMIT,
        "max_completion_length": Gone("remove it; `max_length` bounds prompt and answer together"),
        "max_target_length": Gone("remove it; `max_length` bounds prompt and answer together"),
        "label_pad_token_id": _IN_COLLATOR,
        "padding_value": _IN_COLLATOR,
        "is_encoder_decoder": _DROPPED,
        "generate_during_eval": _DROPPED,
        "model_adapter_name": _DROPPED,
        "ref_adapter_name": _DROPPED,
        "reference_free": _DROPPED,
        "force_use_ref_model": _DROPPED,
        "ref_model_init_kwargs": _now("model_init_kwargs"),
        "rpo_alpha": Gone(
            "write `loss_type: [sigmoid, sft]` with `loss_weights: [1.0, ALPHA]`", "losses are combined by name"
        ),
        "use_logits_to_keep": _DROPPED,
        "base_model_attribute_name": _DROPPED,
        "tools": _DROPPED,
        "use_liger_loss": _now("use_liger_kernel"),
        "truncation_side": _DROPPED,
    },
    "GRPOConfig": {
        "max_prompt_length": _NO_PROMPT_LIMIT,
        "use_liger_loss": _now("use_liger_kernel"),
        "vllm_device": Gone(
            "write `vllm_mode: colocate`, or start a server", "vLLM runs beside the model or as a server"
        ),
        "vllm_dtype": _DROPPED,
        "vllm_max_model_len": _now("vllm_max_model_length"),
        "vllm_enable_prefix_caching": _DROPPED,
        "vllm_guided_decoding_regex": _now("vllm_structured_outputs_regex"),
        "wandb_log_unique_prompts": _now("log_unique_prompts"),
    },
    "KTOConfig": {
        "max_prompt_length": _NO_PROMPT_LIMIT,
        "max_completion_length": Gone("remove it; `max_length` bounds prompt and answer together"),
        "label_pad_token_id": _IN_COLLATOR,
        "padding_value": _IN_COLLATOR,
        "is_encoder_decoder": _DROPPED,
        "generate_during_eval": _DROPPED,
        "model_adapter_name": _DROPPED,
        "ref_adapter_name": _DROPPED,
        "ref_model_init_kwargs": _now("model_init_kwargs"),
        "base_model_attribute_name": _DROPPED,
        "use_liger_loss": _now("use_liger_kernel"),
    },
    "ORPOConfig": {"max_prompt_length": _NO_PROMPT_LIMIT, "label_pad_token_id": _IN_COLLATOR},
    "CPOConfig": {"max_prompt_length": _NO_PROMPT_LIMIT, "label_pad_token_id": _IN_COLLATOR},
    "RewardConfig": {"remove_padding": _DROPPED},
    "RLOOConfig": {"max_prompt_length": _NO_PROMPT_LIMIT},
    "ModelConfig": {
        "torch_dtype": _now("dtype"),
        "use_flash_attention_2": Gone("write `attn_implementation: flash_attention_2`", "attention is chosen by name"),
        "tokenizer_name_or_path": _DROPPED,
        "base_model_revision": _now("model_revision"),
    },
    "ScriptArguments": {
        "dataset_mixer": Gone("write `dataset_mixture` with a list of datasets", "mixtures are lists now"),
        "dataset_splits": Gone("name the split of each dataset in `dataset_mixture`", "mixtures name their splits"),
        "dataset_configs": Gone("name the config of each dataset in `dataset_mixture`", "mixtures name their configs"),
        "gradient_checkpointing_use_reentrant": Gone(
            "write `gradient_checkpointing_kwargs: {use_reentrant: false}`",
            "it is part of gradient_checkpointing_kwargs",
        ),
        "preprocessing_num_workers": _now("dataset_num_proc"),
    },
    "Trainer": {
        "tokenizer": _now("processing_class"),
        "max_seq_length": Gone("give `max_length` to the configuration class", "it belongs to the configuration class"),
        "dataset_text_field": Gone("give it to the configuration class", "it belongs to the configuration class"),
        "packing": Gone("give it to the configuration class", "it belongs to the configuration class"),
        "dataset_num_proc": Gone("give it to the configuration class", "it belongs to the configuration class"),
        "max_length": Gone("give it to the configuration class", "it belongs to the configuration class"),
        "max_prompt_length": _NO_PROMPT_LIMIT,
        "beta": Gone("give it to the configuration class", "it belongs to the configuration class"),
        "neftune_noise_alpha": Gone("give it to the configuration class", "it belongs to the configuration class"),
        "model_init_kwargs": Gone("give it to the configuration class", "it belongs to the configuration class"),
    },
    "from_pretrained": {
        "load_in_4bit": Gone(
            "give `quantization_config=BitsAndBytesConfig(load_in_4bit=True)`", "it is part of BitsAndBytesConfig"
        ),
        "load_in_8bit": Gone(
            "give `quantization_config=BitsAndBytesConfig(load_in_8bit=True)`", "it is part of BitsAndBytesConfig"
        ),
        "use_flash_attention_2": Gone('give `attn_implementation="flash_attention_2"`', "attention is chosen by name"),
        "use_auth_token": _now("token"),
    },
    "axolotl": {
        "max_packed_sequence_len": Gone("write `sequence_len` with `sample_packing: true`"),
        "rope_scaling": Gone("put it under `overrides_of_model_config`"),
        "dpo_use_logits_to_keep": _DROPPED,
        "dpo_generate_during_eval": _DROPPED,
        "dpo_norm_loss": _DROPPED,
        "rpo_alpha": _DROPPED,
        "s2_attention": _DROPPED,
        "flash_attn_rms_norm": _DROPPED,
        "unsloth_cross_entropy_loss": Gone("use the plugin for cut cross entropy or Liger"),
        "unsloth_lora_mlp": _now("lora_mlp_kernel"),
        "unsloth_lora_qkv": _now("lora_qkv_kernel"),
        "unsloth_lora_o": _now("lora_o_kernel"),
        "unsloth_rms_norm": _DROPPED,
        "unsloth_rope": _DROPPED,
    },
    "llamafactory": {
        "evaluation_strategy": _now("eval_strategy"),
        "lora_modules_to_save": _now("additional_target"),
        "max_source_length": _now("cutoff_len"),
        "max_target_length": _now("cutoff_len"),
        "dpo_beta": _now("pref_beta"),
        "dpo_loss": _now("pref_loss"),
        "dpo_ftx": _now("pref_ftx"),
        "val_ratio": _now("val_size"),
    },
}

DEPRECATED: Mapping[str, Mapping[str, Gone]] = {
    "TrainingArguments": {
        "gradient_checkpointing": _now("activation_checkpointing"),
        "gradient_checkpointing_kwargs": _now("activation_checkpointing_kwargs"),
        "use_liger_kernel": Gone("write `model_init_kwargs: {use_kernels: true}`", "TRL drops it in 2.0"),
    },
    "SFTConfig": {"pad_token": Gone("set `tokenizer.pad_token` and pass the tokenizer", "TRL drops it in 2.0")},
    "DPOConfig": {"pad_token": Gone("set `tokenizer.pad_token` and pass the tokenizer", "TRL drops it in 2.0")},
    "RewardConfig": {"pad_token": Gone("set `tokenizer.pad_token` and pass the tokenizer", "TRL drops it in 2.0")},
    "GRPOConfig": {
        "use_transformers_paged": _now("use_transformers_continuous_batching"),
        "vllm_importance_sampling_cap": _now("vllm_importance_sampling_clip_max"),
    },
    "RLOOConfig": {"use_transformers_paged": _now("use_transformers_continuous_batching")},
    "from_pretrained": {"torch_dtype": _now("dtype")},
    "axolotl": {
        "noisy_embedding_alpha": _now("neftune_noise_alpha"),
        "dpo_beta": _now("rl_beta"),
        "evaluation_strategy": _now("eval_strategy"),
        "eval_table_size": _now("generate_samples"),
        "eval_max_new_tokens": _now("generation_max_new_tokens"),
    },
}

# Not fields of TRL's classes, and none the less taken: by the alignment handbook's scripts, or by every TrlParser.
_HANDBOOK_WORDS = (
    "chat_template dataset_mixture env benchmarks callbacks system_prompt hub_model_revision overwrite_hub_revision "
    "push_to_hub_revision wandb_entity wandb_project wandb_run_group"
)
HANDBOOK_KEYS = frozenset(_HANDBOOK_WORDS.split())


_WORDS = {"TrainingArguments": "transformers 5", "ModelConfig": "TRL's ModelConfig", "ScriptArguments": "TRL"}


def judge_key(key: str, line: int, owners: tuple[str, ...], known: frozenset[str], name: str) -> BadKey | None:
    """What is wrong with a key that `owners` are asked to take; None where nothing is. `name` is the owner in words."""
    for trouble, table in ((KeyTrouble.DEPRECATED, DEPRECATED), (KeyTrouble.REMOVED, REMOVED)):
        if trouble is KeyTrouble.REMOVED and key in known:
            return None
        for owner in owners:
            gone = table.get(owner, {}).get(key)
            if gone is not None:
                words = _WORDS.get(owner, name)
                return BadKey(trouble=trouble, key=key, line=line, owner=words, mend=gone.mend, why=gone.why)
    near = nearest(key, known)
    mend = f"did you mean `{near}`?" if near else "remove it, or look up its name"
    return BadKey(trouble=KeyTrouble.UNKNOWN, key=key, line=line, owner=name, mend=mend)
