"""A plan as a Python script for TRL, or for Unsloth, which trains with TRL's trainers on its own models."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from welltuned.advice.plan import Plan
from welltuned.data.templates import preset
from welltuned.facts.machine import Device
from welltuned.interop.emit_code import data_code
from welltuned.interop.emit_missing import (
    missing_everywhere,
    mixture_differs,
    model_there,
    other_rows_held_out,
)
from welltuned.interop.emit_rows import Look, Shape, look_at, loss_of, shape_of, template_code
from welltuned.interop.emit_text import (
    Setting,
    bullets,
    comment,
    optimizer_name,
    python_call,
    python_value,
    reasoned,
    title,
)
from welltuned.recipe import ALL_LINEAR, Method, Tune

TRAINERS = {
    Method.SFT: ("trl", "SFTConfig", "SFTTrainer"),
    Method.DPO: ("trl", "DPOConfig", "DPOTrainer"),
    Method.KTO: ("trl", "KTOConfig", "KTOTrainer"),
    Method.GRPO: ("trl", "GRPOConfig", "GRPOTrainer"),
    Method.ORPO: ("trl.experimental.orpo", "ORPOConfig", "ORPOTrainer"),
    Method.REWARD: ("trl", "RewardConfig", "RewardTrainer"),
}
SHARED = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2"),
    *("max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
)
"""Choices whose names transformers' TrainingArguments have too."""


@dataclass(frozen=True, slots=True)
class Script:
    """The text, and what it leaves out."""

    text: str
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Job:
    """What both scripts are made from."""

    plan: Plan
    looks: tuple[Look, ...]
    held_out: tuple[Look, ...]
    shape: Shape
    unsloth: bool

    @property
    def method(self) -> Method:
        return self.plan.recipe.method

    @property
    def evaluates(self) -> bool:
        return self.plan.facts.dataset.heldout_rows > 0

    @property
    def dtype(self) -> str:
        return str(self.plan.value("dtype"))


def emit_script(plan: Plan, *, unsloth: bool) -> Script:
    recipe = plan.recipe
    looks = look_at(recipe, recipe.datasets)
    held_out = look_at(recipe, recipe.eval_datasets, hub_options=False)
    chat = plan.facts.model.has_chat_template or recipe.chat_template is not None
    job = _Job(plan, looks, held_out, shape_of(recipe, (*looks, *held_out), chat), unsloth)
    missing = tuple(_missing(job))
    parts = [
        _head(job, missing),
        _imports(job),
        _constants(job),
        data_code(job.plan, job.looks, job.held_out, job.shape),
        _settings(job),
        _main(job),
    ]
    return Script("\n\n".join(part.strip("\n") + "\n" for part in parts), missing)


def _missing(job: _Job) -> Iterator[str]:
    plan, recipe = job.plan, job.plan.recipe
    yield from missing_everywhere(plan, (*job.looks, *job.held_out), job.shape)
    if "loraplus_lr_ratio" in plan.choices:
        ratio = plan.value("loraplus_lr_ratio")
        yield (
            f"loraplus_lr_ratio {ratio:g}: pass optimizers=(peft.optimizers.create_loraplus_optimizer(...), None), or "
            f"multiply learning_rate by {ratio:g}: it is A's here"
        )
    if job.evaluates and not job.held_out:
        yield other_rows_held_out(plan)
    if (mixed := mixture_differs(plan)) is not None:
        yield mixed
    if recipe.instruction_part or recipe.response_part:
        yield "instruction_part and response_part: what is trained is found from the chat template there"
    if job.method is Method.SFT and job.shape is Shape.CHAT and loss_of(recipe) == "assistant":
        yield (
            "several answers in a row: assistant_only_loss needs a chat template with {% generation %} marks; TRL has "
            "such ones for common models and refuses others"
        )
    if job.method is Method.GRPO:
        yield "the reward: `reward` below is a stand-in that looks for the reference answer; write your own"
    if job.method in (Method.ORPO, Method.GRPO):
        yield f"max_length {plan.value('max_length')}: {_length_note(job)}"


def _length_note(job: _Job) -> str:
    return (
        "TRL's ORPO drops nothing but cuts prompts differently"
        if job.method is Method.ORPO
        else ("GRPO bounds the answers (max_completion_length), not the prompts")
    )


# ── the parts of the script ──────────────────────────────────────────────────────────────────────────────────────────


def _head(job: _Job, missing: Sequence[str]) -> str:
    recipe = job.plan.recipe
    tool = "unsloth" if job.unsloth else "trl"
    versions = ("Unsloth 2026.10, " if job.unsloth else "") + "TRL 1.16 and transformers 5.23"
    needs = "unsloth" if job.unsloth else "trl peft" + (" bitsandbytes" if recipe.tune is Tune.QLORA else "")
    lines = [
        *title(job.plan),
        f"# For {versions}. Run it where the paths of the data begin:",
        "#",
        f"#     pip install {needs}",
        f"#     python train_{tool}.py",
        "#",
        "# What it cannot say, or says otherwise, than `welltuned train`:",
        *bullets(missing),
    ]
    return "\n".join(lines)


def _imports(job: _Job) -> str:
    package, config, trainer = TRAINERS[job.method]
    own = [f"from {package} import {config}, {trainer}"]
    if not job.unsloth:
        names = [_auto_class(job), "AutoTokenizer"]
        names += ["BitsAndBytesConfig"] if job.plan.recipe.tune is Tune.QLORA else []
        names += ["EarlyStoppingCallback"] if _stops_early(job) else []
        others = ", ".join(names)
        peft = [] if job.plan.recipe.tune is Tune.FULL else ["from peft import LoraConfig"]
        own = [*peft, f"from transformers import {others}", *own]
    if job.unsloth and _stops_early(job):
        own = ["from transformers import EarlyStoppingCallback", *own]
    first = ["from unsloth import FastLanguageModel  # before the libraries that it changes", ""] if job.unsloth else []
    third = sorted(["from datasets import Dataset, load_dataset", *own], key=lambda line: line.split()[1])
    standard = ["import hashlib", "import json", "import random"]
    return "\n".join([*first, *standard, "", "import torch", *third])


def _constants(job: _Job) -> str:
    recipe = job.plan.recipe
    out = f"runs/{recipe.method}-{recipe.tune}"
    return f"MODEL = {python_value(model_there(recipe))}\nOUT = {python_value(out)}"


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _settings(job: _Job) -> str:
    _, config, _ = TRAINERS[job.method]
    parts = ["\n".join(python_call("config", config, list(_trainer_settings(job))))]
    if job.plan.recipe.tune is not Tune.FULL and not job.unsloth:
        task = "SEQ_CLS" if job.method is Method.REWARD else "CAUSAL_LM"
        settings = [*_adapter_settings(job), Setting("task_type", task)]
        parts.append("\n".join(python_call("adapter", "LoraConfig", settings)))
    if job.plan.recipe.tune is Tune.QLORA and not job.unsloth:
        quantised = [
            Setting("load_in_4bit", True, "QLoRA: the base lies in memory in 4 bits, as NormalFloat"),
            Setting("bnb_4bit_quant_type", "nf4"),
            Setting("bnb_4bit_use_double_quant", True),
        ]
        call = python_call("four_bits", "BitsAndBytesConfig", quantised)
        call.insert(-1, f"    bnb_4bit_compute_dtype=torch.{job.dtype},")
        parts.append("\n".join(call))
    if job.method is Method.GRPO:
        parts.append(_REWARD)
    return "\n\n".join(part.strip("\n") for part in parts)


_REWARD = '''\
def reward(completions, answer, **columns):
    """1 where the reference answer stands in the completion. A stand-in: write what is right for your task."""
    texts = [completion[-1]["content"] for completion in completions]
    return [float(bool(want) and str(want) in text) for text, want in zip(texts, answer)]
'''


def _trainer_settings(job: _Job) -> Iterator[Setting]:
    plan, choices = job.plan, job.plan.choices
    cuda = plan.facts.machine.device is Device.CUDA
    yield Setting("output_dir", f"runs/{plan.recipe.method}-{plan.recipe.tune}")
    if "max_steps" in choices:
        yield reasoned(plan, "max_steps", value=plan.updates)
    else:
        yield reasoned(plan, "num_train_epochs", value=float(plan.value("num_train_epochs")))
    for name in SHARED:
        yield reasoned(plan, name)
    yield reasoned(plan, "optim", value=optimizer_name(plan))
    yield reasoned(plan, "gradient_checkpointing", "activation_checkpointing")
    mixed = job.dtype == "bfloat16"
    yield Setting("bf16", mixed, "autocast to bfloat16, as the base is" if mixed else "TRL's default is True")
    if not cuda:
        yield Setting("use_cpu", True)
    yield from _method_settings(job)
    if job.evaluates:
        yield Setting("eval_strategy", "steps")
        yield reasoned(plan, "eval_steps")
        size = plan.value("per_device_train_batch_size" if job.method is not Method.GRPO else "num_generations")
        yield Setting("per_device_eval_batch_size", size)
    yield from _saving(plan)
    yield Setting("logging_steps", 1)
    yield Setting("logging_nan_inf_filter", False, "a loss that is not a number is shown, not averaged away")
    yield Setting("report_to", "none")


OBJECTIVE = {
    Method.DPO: ("beta", "label_smoothing"),
    Method.ORPO: ("beta",),
    Method.KTO: ("beta", "desirable_weight", "undesirable_weight"),
    Method.REWARD: ("center_rewards_coefficient",),
    Method.GRPO: (
        *("beta", "num_generations", "max_completion_length", "temperature", "top_p", "epsilon", "epsilon_high"),
        *("scale_rewards", "mask_truncated_completions", "num_iterations"),
    ),
}
"""Choices of a method that TRL has under the same name."""


def _saving(plan: Plan) -> Iterator[Setting]:
    """TRL keeps the best only among checkpoints, so there must be one at every evaluation."""
    best = plan.value("load_best_model_at_end")
    own, between = reasoned(plan, "save_steps"), plan.value("eval_steps")
    yield Setting("save_strategy", "steps")
    aligned = not best or own.value % between == 0
    yield own if aligned else Setting("save_steps", between, "with every evaluation, to keep the best of them")
    yield reasoned(plan, "save_total_limit")
    yield reasoned(plan, "load_best_model_at_end")


def _stops_early(job: _Job) -> bool:
    choices = job.plan.choices
    best = bool(choices["load_best_model_at_end"].value) and job.evaluates
    return best and choices["early_stopping_patience"].value > 0


def _loss_type(plan: Plan) -> Iterator[Setting]:
    """TRL says gspo by the level of its ratios."""
    if plan.value("loss_type") == "gspo":
        yield Setting("importance_sampling_level", "sequence", plan.choices["loss_type"].reason)
        yield Setting("loss_type", "grpo")
    else:
        yield reasoned(plan, "loss_type")


def _method_settings(job: _Job) -> Iterator[Setting]:
    plan, method = job.plan, job.method
    if method is not Method.GRPO:
        yield reasoned(plan, "max_length")
    if method is Method.SFT:
        yield Setting("packing", False, "as explained at the top")
        yield from _loss(job)
        return
    if "loss_type" in plan.choices:
        yield from _loss_type(plan)
    for name in OBJECTIVE[method]:
        if name in plan.choices:
            yield reasoned(plan, name)


def _loss(job: _Job) -> Iterator[Setting]:
    if job.shape is Shape.CHAT:
        yield reasoned(job.plan, "assistant_only_loss")
    elif job.shape is not Shape.TEXT:
        yield reasoned(
            job.plan, "assistant_only_loss", "completion_only_loss", value=loss_of(job.plan.recipe) != "everything"
        )


def _adapter_settings(job: _Job) -> Iterator[Setting]:
    plan = job.plan
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "bias"):
        value = plan.value(name)
        whole = name == "lora_alpha" and float(value).is_integer()
        yield reasoned(plan, name, value=int(value) if whole else value)
    for name in ("use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save"):
        if name in plan.choices:
            value = plan.value(name)
            yield reasoned(plan, name, value=list(value) if isinstance(value, tuple) else value)
    targets = plan.value("target_modules")
    if targets == ALL_LINEAR and job.unsloth:
        targets = plan.facts.model.module_names
    yield reasoned(plan, "target_modules", value=targets)


# ── the model and the run ────────────────────────────────────────────────────────────────────────────────────────────


def _main(job: _Job) -> str:
    _, _, trainer = TRAINERS[job.method]
    lines = ["def main() -> None:", *(_unsloth_model(job) if job.unsloth else _trl_model(job))]
    if job.plan.recipe.chat_template is not None:
        lines.append(f"    tokenizer.chat_template = {template_code(job.plan.recipe.chat_template)}")
    if job.plan.recipe.chat_template_kwargs is not None:
        values = json.dumps(preset(job.plan.recipe.chat_template_kwargs), ensure_ascii=False)
        lines.append(f"    tokenizer.chat_template = {values} + tokenizer.chat_template")
    lines.append("    train, held_out = split(TRAIN)")
    lines += ["    held_out, _ = split(EVAL)"] if job.held_out else []
    lines += [f"    trainer = {trainer}(", "        model=model,", "        args=config,"]
    lines += ["        reward_funcs=reward,"] if job.method is Method.GRPO else []
    lines += ["        train_dataset=Dataset.from_list(train),"]
    lines += ["        eval_dataset=Dataset.from_list(held_out),"] if job.evaluates else []
    lines += ["        processing_class=tokenizer,"]
    lines += ["        peft_config=adapter,"] if not job.unsloth and job.plan.recipe.tune is not Tune.FULL else []
    if _stops_early(job):
        lines.append(f"        callbacks=[EarlyStoppingCallback({job.plan.value('early_stopping_patience')})],")
    lines += ["    )", "    trainer.train()"]
    lines += ["    print(trainer.evaluate())"] if job.evaluates else []
    lines += ["    trainer.save_model(OUT)", "", "", 'if __name__ == "__main__":', "    main()"]
    return "\n".join(lines)


def _auto_class(job: _Job) -> str:
    return "AutoModelForSequenceClassification" if job.method is Method.REWARD else "AutoModelForCausalLM"


def _trl_model(job: _Job) -> list[str]:
    quantised = ", quantization_config=four_bits" if job.plan.recipe.tune is Tune.QLORA else ""
    labels = ", num_labels=1" if job.method is Method.REWARD else ""
    device = ', device_map={"": 0}' if quantised and job.plan.facts.machine.device is Device.CUDA else ""
    return [
        *comment(job.plan.choices["dtype"].reason, "    "),
        f"    model = {_auto_class(job)}.from_pretrained(MODEL, dtype=torch.{job.dtype}{labels}{quantised}{device})",
        "    tokenizer = AutoTokenizer.from_pretrained(MODEL)",
    ]


def _unsloth_model(job: _Job) -> list[str]:
    plan, tune = job.plan, job.plan.recipe.tune
    loading = [
        Setting("max_seq_length", plan.value("max_length")),
        Setting("load_in_4bit", tune is Tune.QLORA),
        Setting("full_finetuning", tune is Tune.FULL),
    ]
    lines = comment(plan.choices["dtype"].reason, "    ")
    lines += [
        "    model, tokenizer = FastLanguageModel.from_pretrained(",
        "        MODEL,",
        f"        dtype=torch.{job.dtype},",
    ]
    lines += [f"        {setting.name}={python_value(setting.value)}," for setting in loading] + ["    )"]
    if tune is Tune.FULL:
        return lines
    own = [
        *_adapter_settings(job),
        Setting("use_gradient_checkpointing", plan.value("gradient_checkpointing")),
        Setting("random_state", plan.value("seed")),
    ]
    call = python_call("model", "FastLanguageModel.get_peft_model", own, indent="    ")
    return [*lines, call[0], "        model,", *call[1:]]
