"""A plan as YAML for LLaMA-Factory."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from welltuned.advice.plan import Plan
from welltuned.data.conversation import Format
from welltuned.facts.machine import Device
from welltuned.interop.emit_missing import held_out_share, model_there
from welltuned.interop.emit_rows import Look, Shape, loss_of
from welltuned.interop.emit_text import Setting, optimizer_name, reasoned, yaml_lines
from welltuned.interop.emit_yaml import (
    HELD_OUT_ROWS,
    TRAIN_ROWS,
    Job,
    Written,
    alpha_setting,
    dtype_setting,
    file_text,
    job_for,
    length_settings,
    missing_of,
)
from welltuned.recipe import ALL_LINEAR, Method, Tune

LLAMAFACTORY_READS = frozenset(
    {Format.MESSAGES, Format.SHAREGPT, Format.TEXT, Format.ALPACA, Format.QUESTION_ANSWER, Format.PROMPT_COMPLETION}
)
_STAGES = {Method.SFT: "sft", Method.DPO: "dpo", Method.ORPO: "dpo", Method.KTO: "kto"}
_OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
_OPENAI_TAGS |= {"system_tag": "system", "observation_tag": "tool"}


def emit_llamafactory(plan: Plan) -> Written:
    """Field names of LLaMA-Factory 0.9.5; its dataset_info.json stands in comments, since local files need one."""
    job = job_for(plan, LLAMAFACTORY_READS)
    missing = [*missing_of(job)]
    if plan.facts.dataset.length_max > plan.value("max_length"):
        missing.append("max_length: prompt and answer are both shortened there, in proportion; here the end is cut")
    if "init_lora_weights" in plan.choices and plan.value("init_lora_weights") is not True:
        missing.append(f"init_lora_weights {plan.value('init_lora_weights')}: A starts as PEFT's default there")
    missing += [f"{name}: no such setting there" for name in ("rank_pattern", "alpha_pattern") if name in plan.choices]
    if "layers_to_transform" in plan.choices:
        missing.append("layers_to_transform: name the layers in lora_target there")
    if job.shape is not Shape.TEXT:
        missing.append("template: taken from the model's own chat template; set `template` if yours has a name there")
    if plan.recipe.chat_template is not None:
        missing.append("chat_template: put it into the model's tokenizer_config.json, from where it is read")
    if plan.recipe.chat_template_kwargs is not None:
        missing.append("chat_template_kwargs: put the values into the model's chat template")
    info = json.dumps(_dataset_info(job), ensure_ascii=False, indent=2)
    body = "\n".join(yaml_lines(list(_llamafactory(job))))
    body += "\n\n# dataset_info.json:\n" + "\n".join(f"#json {line}" for line in info.splitlines())
    name = "llamafactory.yaml"
    commands = [f"sed -n 's/^#json //p' {name} > dataset_info.json", f"llamafactory-cli train {name}"]
    return Written(file_text(job, name, "LLaMA-Factory 0.9.5", commands, missing, body), tuple(missing))


_OBJECTIVE = {
    "beta": "pref_beta",
    "label_smoothing": "dpo_label_smoothing",
    "simpo_gamma": "simpo_gamma",
    "desirable_weight": "kto_chosen_weight",
    "undesirable_weight": "kto_rejected_weight",
}
_SHARED = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2"),
    *("max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
)


def _llamafactory(job: Job) -> Iterator[Setting]:
    plan, recipe = job.plan, job.plan.recipe
    yield Setting("model_name_or_path", model_there(recipe))
    yield Setting("stage", "pt" if job.shape is Shape.TEXT else _STAGES[job.method])
    yield Setting("do_train", True)
    yield from _llamafactory_adapter(job)
    if job.method is not Method.SFT:
        form = plan.value("loss_type") if job.method is Method.DPO else "sigmoid"
        yield Setting("pref_loss", "orpo" if job.method is Method.ORPO else form)
        for ours, theirs in _OBJECTIVE.items():
            if ours in plan.choices:
                yield reasoned(plan, ours, theirs)
    yield Setting("dataset_dir", ".")
    yield Setting("dataset", ",".join(_names(job, held_out=False)))
    if job.evaluates and (job.held_out or job.converted):
        yield Setting("eval_dataset", ",".join(_names(job, held_out=True)))
    elif job.evaluates:
        yield Setting("val_size", held_out_share(plan))
    if job.method is Method.SFT and job.shape is not Shape.TEXT:
        yield reasoned(plan, "assistant_only_loss", "train_on_prompt", value=loss_of(recipe) == "everything")
        yield Setting("mask_history", loss_of(recipe) == "last")
    yield reasoned(plan, "max_length", "cutoff_len")
    yield Setting("packing", False, "as explained at the top")
    yield from length_settings(job)
    if "max_steps" not in plan.choices:
        yield reasoned(plan, "num_train_epochs", value=float(plan.value("num_train_epochs")))
    for name in _SHARED:
        yield reasoned(plan, name)
    yield reasoned(plan, "optim", value=optimizer_name(job.plan))
    yield reasoned(
        plan, "gradient_checkpointing", "disable_gradient_checkpointing", value=not plan.value("gradient_checkpointing")
    )
    yield dtype_setting(job)
    if plan.facts.machine.device is Device.CPU:
        yield Setting("use_cpu", True)
    if job.evaluates:
        yield Setting("eval_strategy", "steps")
        yield reasoned(plan, "eval_steps")
        yield Setting("per_device_eval_batch_size", plan.value("per_device_train_batch_size"))
    yield Setting("save_strategy", "no", "saved once, at the end")
    yield Setting("logging_steps", 1)
    yield Setting("report_to", "none")
    yield Setting("output_dir", f"runs/{recipe.method}-{recipe.tune}")


def _llamafactory_adapter(job: Job) -> Iterator[Setting]:
    plan, tune = job.plan, job.plan.recipe.tune
    if tune is Tune.FULL:
        yield Setting("finetuning_type", "full")
        return
    yield Setting("finetuning_type", "lora")
    yield reasoned(plan, "r", "lora_rank")
    yield alpha_setting(job)
    yield reasoned(plan, "lora_dropout")
    targets = plan.value("target_modules")
    yield reasoned(plan, "target_modules", "lora_target", value="all" if targets == ALL_LINEAR else ",".join(targets))
    yield reasoned(plan, "use_rslora")
    for name in ("use_dora", "loraplus_lr_ratio"):
        if name in plan.choices:
            yield reasoned(plan, name)
    if "modules_to_save" in plan.choices:
        yield reasoned(plan, "modules_to_save", "additional_target", value=",".join(plan.value("modules_to_save")))
    if tune is Tune.QLORA:
        yield Setting("quantization_bit", 4, "QLoRA: the base lies in memory in 4 bits, as NormalFloat")
        yield Setting("quantization_method", "bnb")
        yield Setting("quantization_type", "nf4")
        yield Setting("double_quantization", True)


def _names(job: Job, *, held_out: bool) -> list[str]:
    word = "heldout" if held_out else "train"
    looks = job.held_out if held_out else job.looks
    return [word] if job.converted or len(looks) == 1 else [f"{word}_{i + 1}" for i in range(len(looks))]


def _dataset_info(job: Job) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for held_out in (False, True) if job.evaluates and (job.held_out or job.converted) else (False,):
        looks: Sequence[Look | None] = [None] if job.converted else job.held_out if held_out else job.looks
        for name, look in zip(_names(job, held_out=held_out), looks, strict=True):
            path = HELD_OUT_ROWS if held_out else TRAIN_ROWS
            entries[name] = _info(job, path if look is None else look.spec, look)
    return entries


def _info(job: Job, path: str, look: Look | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"file_name": path}
    if look is not None and not look.files:
        entry = {"hf_hub_url": path, "split": look.loading["split"]}
        entry |= {"subset": look.loading["name"]} if "name" in look.loading else {}
    if job.shape is Shape.TEXT:
        return {**entry, "columns": {"prompt": "text" if look is None else look.column("text")}}
    if look is not None and look.detected.format in _TEXT_PAIRS:
        question, answer = _TEXT_PAIRS[look.detected.format]
        return {**entry, "columns": {"prompt": look.column(question), "response": look.column(answer)}}
    columns = {"messages": "messages"}
    if job.shape is Shape.PREFERENCE:
        entry |= {"ranking": True}
        columns |= {"chosen": "chosen", "rejected": "rejected"}
    if job.shape is Shape.JUDGED:
        columns |= {"kto_tag": "label"}
    tags = _OPENAI_TAGS
    if look is not None:
        name = "messages" if look.detected.format is Format.MESSAGES else "conversations"
        columns["messages"] = str(look.column(name))
        tags = {} if look.spelling == "from" else _OPENAI_TAGS
    return {**entry, "formatting": "sharegpt", "columns": columns, **({"tags": tags} if tags else {})}


_TEXT_PAIRS = {
    Format.ALPACA: ("instruction", "output"),
    Format.QUESTION_ANSWER: ("question", "answer"),
    Format.PROMPT_COMPLETION: ("prompt", "completion"),
}
