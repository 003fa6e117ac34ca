"""Every key of a recipe: its type, and the sentence that explains it."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple


class Method(StrEnum):
    SFT = "sft"
    DPO = "dpo"
    ORPO = "orpo"
    KTO = "kto"
    REWARD = "reward"
    GRPO = "grpo"


class Tune(StrEnum):
    LORA = "lora"
    QLORA = "qlora"
    FULL = "full"


class Tracker(StrEnum):
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    TRACKIO = "trackio"


AUTO = "auto"
ALL_LINEAR = "all-linear"
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")
OPTIMIZERS_8BIT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
OPTIMIZERS = ("adamw", "adamw_torch", "adamw_torch_fused", *OPTIMIZERS_8BIT)
DTYPES = ("float32", "bfloat16")
BIASES = ("none", "all", "lora_only")
DENSE_BASES = ("cached", "rebuilt")
FULL_SHARD = "full_shard"
FSDP = ("none", FULL_SHARD)
ON_NONFINITE = ("back", "stop")
LOSS_ON = ("assistant", "last", "everything")
DPO_LOSSES = ("sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "simpo")
GRPO_LOSSES = ("grpo", "dapo", "dr_grpo", "gspo")
REWARD_SCALES = ("group", "batch", "none")
VARIANTS = frozenset(  # of LoRA; those of an adapter that training goes on from are its own
    ["use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save"]
)
LORA_KEYS = VARIANTS | {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "init_lora_weights", "bias"),
    *("loraplus_lr_ratio", "embedding_learning_rate"),
}
UNSERVED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern")  # what adapters in vLLM cannot have
METHOD_KEYS = MappingProxyType(
    {
        "beta": frozenset({Method.DPO, Method.ORPO, Method.KTO, Method.GRPO}),
        "loss_type": frozenset({Method.DPO, Method.GRPO}),
        "assistant_only_loss": frozenset({Method.SFT}),
        "loss_on": frozenset({Method.SFT}),
        **dict.fromkeys(("label_smoothing", "simpo_gamma"), frozenset({Method.DPO})),
        **dict.fromkeys(("desirable_weight", "undesirable_weight"), frozenset({Method.KTO})),
        "center_rewards_coefficient": frozenset({Method.REWARD}),
        **dict.fromkeys(
            (
                *("rewards", "reward_weights", "num_generations", "max_completion_length", "temperature", "top_p"),
                *("epsilon", "epsilon_high", "scale_rewards", "mask_truncated_completions", "num_iterations"),
                *("vllm_server_base_url", "vllm_importance_sampling_clip_max"),
            ),
            frozenset({Method.GRPO}),
        ),
    }
)
"""Keys that only some methods read. Setting one where it would be ignored is an error."""
LOSS_KEYS = MappingProxyType({"label_smoothing": frozenset({"sigmoid", "robust"}), "simpo_gamma": frozenset({"simpo"})})
"""Keys that only some of DPO's losses read."""


class Key(NamedTuple):
    """What a recipe key holds, and the sentence that explains it (used by --help and by the documentation).

    With `many` it holds a list of such values, and one alone is a list of one.
    """

    type: type
    doc: str
    many: bool = False


FIELDS: Mapping[str, Key] = MappingProxyType(
    {
        "model": Key(str, "The model to start from: a hub id, a local folder, or a GGUF file."),
        "data": Key(
            str,
            "The training data: a file (JSONL, JSON, CSV, Parquet, Arrow; also compressed), a folder, a pattern "
            "('*.jsonl'), - for stdin, or a hub dataset id; several are mixed.",
            many=True,
        ),
        "method": Key(Method, "What is optimised: sft (default), dpo, orpo, kto, reward (a reward model) or grpo."),
        "tune": Key(Tune, "What is trained: lora (default), qlora (LoRA on a 4-bit base) or full."),
        "adapter": Key(str, "An adapter that training goes on from: a Run, or a folder in PEFT's format."),
        "rewards": Key(
            str,
            "What rewards an answer (grpo): file.py:function, exact_match, numeric, regex:PATTERN or json_schema:FILE; "
            "several are added.",
            many=True,
        ),
        "reward_weights": Key(float, "Weights of the rewards in their sum, one for each (grpo); unset: 1.", many=True),
        "vllm_server_base_url": Key(str, "A vLLM server that samples the answers (grpo), as http://localhost:8000."),
        "data_weights": Key(float, "Shares of an epoch, one for each of several datasets; no row repeats.", many=True),
        "data_rows": Key(int, "Rows of each dataset in an epoch; where it has fewer, they repeat evenly.", many=True),
        "eval_data": Key(str, "Held-out data of your own; without it a share of `data` is held out.", many=True),
        "eval_fraction": Key(float, "Share of `data` that is held out and never trained on; unset: 5 to 10 %."),
        "group_by": Key(str, "Column whose equal values are held out together; unset: rows of equal prompts are."),
        "format": Key(str, "The rows' format, such as sharegpt; unset: detected from the columns, and said."),
        "map": Key(str, "A column by another name, as ours=theirs: prompt=Frage; several may be given.", many=True),
        "subset": Key(str, "Configuration name of a hub dataset."),
        "split": Key(str, "Split of a hub dataset."),
        "memory": Key(int, "Memory that the run may use, such as 24GB or 24GiB; unset: what the machine has free."),
        "instruction_part": Key(str, "Marker that opens a user turn, for chat templates that defeat the structure."),
        "response_part": Key(str, "Marker that opens an assistant turn; only what follows it is trained."),
        "chat_template": Key(str, "A chat template, as a path or inline, instead of the tokenizer's own."),
        "chat_template_kwargs": Key(
            dict, "Values for the chat template, in training and afterwards: {enable_thinking: false}, for Qwen 3."
        ),
        "on_nonfinite": Key(
            str,
            "After 3 updates in a row that are not finite: back (to the last checkpoint, with half the rate) or stop; "
            "unset: back, but stop where learning_rate is yours.",
        ),
        "report_to": Key(
            Tracker, "Where the run's numbers go besides: tensorboard, wandb or trackio; unset: nowhere.", many=True
        ),
        "trust_remote_code": Key(bool, "Run Python code of the model's repository: it can do all that you can do."),
        "allow_pickle": Key(bool, "Read .bin weights, which are pickles; unset: safetensors and GGUF only."),
        "loss_on": Key(str, "What is trained: assistant (every answer, the default), last (answer) or everything."),
    }
)

POLICIES: Mapping[str, Key] = MappingProxyType(
    {
        f"on_{kind}": Key(str, f"{what}: error, drop or keep" + (f" ({note})." if note else "."))
        for kind, what, note in (
            ("bad_row", "Rows that cannot be read as a conversation", "never keep; default error"),
            ("untrained", "Rows without a trained token", "never keep; default error"),
            ("too_long", "Rows longer than max_length", "keep, the default, cuts them"),
            ("duplicate", "Rows with the tokens of an earlier one", "default keep"),
            ("leak", "Training rows that a held-out row repeats, or their prompt", "default keep"),
            ("empty_turn", "Rows with a blank user or system turn", "default keep"),
            ("repeated_turn", "Rows with the same turn twice in a row", "default keep"),
            ("control_token", "Rows that spell a special token in their own text", "default keep, as text"),
            ("bad_encoding", "Rows with characters of a wrong encoding", "default keep"),
            ("lost_thinking", "Rows with a thinking block that the chat template leaves out", "default keep"),
            ("lost_message", "Rows with a message that the chat template leaves out", "default keep"),
            ("lost_tools", "Rows with tools that the chat template leaves out", "default keep"),
            ("end_untrained", "Rows with an answer whose end token is not trained", "default keep"),
            ("equal_pair", "Pairs whose two answers are the same tokens", "never keep; default error"),
            ("prompt_differs", "Pairs whose prompt is rendered differently for its answers", "default keep"),
        )
    }
)
NEVER_KEPT = frozenset({"on_bad_row", "on_untrained", "on_equal_pair"})

HYPERPARAMETERS: Mapping[str, Key] = MappingProxyType(
    {
        "learning_rate": Key(float, "Peak learning rate of AdamW, reached after the warm-up."),
        "r": Key(int, "Rank of the LoRA matrices: how many directions each layer may change in."),
        "lora_alpha": Key(float, "LoRA scale: the update is multiplied by alpha/r (by alpha/sqrt(r) with use_rslora)."),
        "lora_dropout": Key(float, "Share of the LoRA branch's inputs that is dropped in training."),
        "target_modules": Key(tuple, "Linear layers that get an adapter: all-linear, or a list of module names."),
        "use_rslora": Key(bool, "Scale by alpha/sqrt(r) instead of alpha/r."),
        "init_lora_weights": Key(
            object, "How adapters start: true (PEFT's default, B = 0), gaussian, pissa, pissa_niter_N, olora or loftq."
        ),
        "use_dora": Key(bool, "DoRA: the norm of every row of the weights is trained beside its direction."),
        "rank_pattern": Key(dict, "Ranks of layers that differ from r, by endings of their names: {down_proj: 64}."),
        "alpha_pattern": Key(dict, "Alphas of layers that differ from lora_alpha, by endings of their names."),
        "layers_to_transform": Key(int, "Numbers of the decoder layers that get adapters; unset: all.", many=True),
        "modules_to_save": Key(
            str, "Modules that are trained whole beside the adapters: embed_tokens, lm_head.", many=True
        ),
        "loraplus_lr_ratio": Key(float, "LoRA+: B's rate over A's, which is learning_rate."),
        "embedding_learning_rate": Key(float, "Peak rate of what modules_to_save names; unset: learning_rate / 10."),
        "bias": Key(str, "Which biases are trained: none, all or lora_only."),
        "per_device_train_batch_size": Key(int, "Examples of one micro-batch on one device."),
        "gradient_accumulation_steps": Key(int, "Micro-batches that are summed before one update."),
        "effective_batch_size": Key(
            int, "Examples of one update: micro-batch size times accumulation. Pairs count once; grpo counts answers."
        ),
        "num_train_epochs": Key(float, "Passes over the training data."),
        "max_steps": Key(int, "Upper limit on the number of updates; the run ends at this or at the last epoch."),
        "warmup_steps": Key(int, "Updates over which the learning rate climbs from 0 to its peak."),
        "lr_scheduler_type": Key(str, "Shape of the rate after the warm-up: " + ", ".join(SCHEDULERS) + "."),
        "weight_decay": Key(float, "AdamW's pull of the trained weights towards 0."),
        "adam_beta1": Key(float, "AdamW's memory of the gradient."),
        "adam_beta2": Key(float, "AdamW's memory of the squared gradient."),
        "optim": Key(str, "The optimiser: adamw, or adamw_8bit with a quarter of its state; others' names do too."),
        "max_grad_norm": Key(float, "Gradients longer than this are scaled down to it."),
        "max_length": Key(int, "Longest example in tokens; what is longer is cut."),
        "packing": Key(bool, "Put several whole examples into one stream without padding."),
        "assistant_only_loss": Key(bool, "Train on the assistant's tokens only, not on the prompt's."),
        "gradient_checkpointing": Key(bool, "Recompute activations in the backward pass: less memory, more time."),
        "checkpointed_layers": Key(int, "How many layers are recomputed, the first ones; the rest keep activations."),
        "offload_checkpoints": Key(bool, "What goes into recomputed layers waits in the host's memory, not the GPU's."),
        "dense_base": Key(str, "The 4-bit base in training: expanded once and cached, or rebuilt for each product."),
        "fsdp": Key(
            str,
            "Whether processes that torchrun started share the model too: full_shard (each keeps a part of every "
            "weight) or none.",
        ),
        "torch_compile": Key(bool, "Decoder layers are compiled by torch: less time an update, after a warm-up."),
        "dtype": Key(str, "Number format of the base weights and activations: " + " or ".join(DTYPES) + "."),
        "ema_decay": Key(float, "Keep an average of the weights too, which each update moves by 1 - ema_decay."),
        "seed": Key(int, "Seed of everything random."),
        "eval_steps": Key(int, "Updates between two evaluations on the held-out rows."),
        "token_budget": Key(int, "Most tokens of one micro-batch; a memory matter only, never changes the result."),
        "save_steps": Key(int, "Updates between two checkpoints, from which an interrupted run goes on."),
        "save_total_limit": Key(int, "Checkpoints that are kept, the newest; the best is kept besides."),
        "load_best_model_at_end": Key(bool, "Keep the state of the best evaluation instead of the last update's."),
        "early_stopping_patience": Key(int, "Evaluations without a better one after which the run stops; 0: never."),
        "beta": Key(float, "Pull towards the reference model (dpo, kto, grpo), or weight of the odds term (orpo)."),
        "loss_type": Key(str, f"Form of the loss: {', '.join(DPO_LOSSES)} (dpo), or {', '.join(GRPO_LOSSES)} (grpo)."),
        "label_smoothing": Key(float, "Share of the pairs whose preference is taken to be wrong (dpo)."),
        "simpo_gamma": Key(float, "Margin that a chosen answer must win by (dpo, loss_type simpo)."),
        "desirable_weight": Key(float, "Weight of the losses of desirable answers (kto)."),
        "undesirable_weight": Key(float, "Weight of the losses of undesirable answers (kto)."),
        "center_rewards_coefficient": Key(float, "Pull of a pair's two rewards towards a sum of 0 (reward)."),
        "num_generations": Key(int, "Answers sampled for each prompt: a group, compared with its own mean (grpo)."),
        "max_completion_length": Key(int, "Longest sampled answer in tokens (grpo)."),
        "temperature": Key(float, "Sampling temperature (grpo)."),
        "top_p": Key(float, "Share of the probability that is sampled from, the likeliest tokens first (grpo)."),
        "epsilon": Key(float, "How far a token's probability may fall before its gradient is cut off (grpo)."),
        "epsilon_high": Key(float, "How far a token's probability may rise before its gradient is cut off (grpo)."),
        "scale_rewards": Key(
            str, "What rewards are divided by: the spread of their group, of the batch, or none (grpo)."
        ),
        "mask_truncated_completions": Key(
            bool, "Leave answers that were cut at the length limit out of the loss (grpo)."
        ),
        "num_iterations": Key(int, "Updates made of each set of sampled answers (grpo)."),
        "vllm_importance_sampling_clip_max": Key(
            float, "Most that a token counts, where vLLM drew it with less probability than it has in training (grpo)."
        ),
    }
)

KEYS: Mapping[str, Key] = MappingProxyType({**FIELDS, **POLICIES, **HYPERPARAMETERS})
