"""A plan as YAML for Axolotl."""

from collections.abc import Iterator
from typing import Any

from welltuned.advice.plan import Plan
from welltuned.data.conversation import Format
from welltuned.interop.emit_missing import held_out_share, model_there
from welltuned.interop.emit_rows import Look, Shape, loss_of, template_text
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

AXOLOTL_READS = frozenset({Format.MESSAGES, Format.SHAREGPT, Format.TEXT})


def emit_axolotl(plan: Plan) -> Written:
    """Field names of Axolotl 0.19."""
    job = job_for(plan, AXOLOTL_READS)
    missing = [*missing_of(job)]
    if loss_of(plan.recipe) == "last":
        missing.append("loss_on last: every answer of a conversation is trained there")
    body = "\n".join(yaml_lines(list(_axolotl(job))))
    command = "axolotl train axolotl.yaml"
    return Written(file_text(job, "axolotl.yaml", "Axolotl 0.19", [command], missing, body), tuple(missing))


_AXOLOTL = (
    ("learning_rate", "learning_rate"),
    ("lr_scheduler_type", "lr_scheduler"),
    ("warmup_steps", "warmup_steps"),
    ("weight_decay", "weight_decay"),
    ("adam_beta1", "adam_beta1"),
    ("adam_beta2", "adam_beta2"),
    ("max_grad_norm", "max_grad_norm"),
    ("per_device_train_batch_size", "micro_batch_size"),
    ("gradient_accumulation_steps", "gradient_accumulation_steps"),
    ("max_length", "sequence_len"),
    ("gradient_checkpointing", "gradient_checkpointing"),
    ("seed", "seed"),
)


def _axolotl(job: Job) -> Iterator[Setting]:
    plan, recipe = job.plan, job.plan.recipe
    yield Setting("base_model", model_there(recipe))
    yield from _axolotl_data(job)
    if recipe.tune is not Tune.FULL:
        yield Setting("adapter", str(recipe.tune))
        yield from _axolotl_adapter(job)
    if job.method is Method.DPO:
        yield Setting("rl", "dpo")
        yield reasoned(plan, "beta", "rl_beta")
    yield from length_settings(job)
    if "max_steps" not in plan.choices:
        yield reasoned(plan, "num_train_epochs", "num_epochs", value=float(plan.value("num_train_epochs")))
    for ours, theirs in _AXOLOTL:
        yield reasoned(plan, ours, theirs)
    yield reasoned(plan, "optim", "optimizer", value=optimizer_name(job.plan))
    yield Setting("excess_length_strategy", "truncate", "longer rows are cut, as here; the default drops them")
    yield Setting("sample_packing", False, "as explained at the top")
    yield Setting("pad_to_sequence_len", False)
    yield dtype_setting(job)
    yield Setting("tf32", False)
    if job.evaluates:
        yield Setting("eval_strategy", "steps")
        yield reasoned(plan, "eval_steps")
    yield Setting("save_strategy", "no", "saved once, at the end")
    yield Setting("output_dir", f"runs/{recipe.method}-{recipe.tune}")


def _axolotl_adapter(job: Job) -> Iterator[Setting]:
    plan = job.plan
    yield Setting("load_in_4bit", plan.recipe.tune is Tune.QLORA)
    yield reasoned(plan, "r", "lora_r")
    yield alpha_setting(job)
    yield reasoned(plan, "lora_dropout")
    if plan.value("target_modules") == ALL_LINEAR:
        yield reasoned(plan, "target_modules", "lora_target_linear", value=True)
    else:
        yield reasoned(plan, "target_modules", "lora_target_modules", value=list(plan.value("target_modules")))
    yield reasoned(plan, "use_rslora", "peft_use_rslora")
    yield reasoned(plan, "init_lora_weights", "peft_init_lora_weights")
    if "use_dora" in plan.choices:
        yield reasoned(plan, "use_dora", "peft_use_dora")
    if "loraplus_lr_ratio" in plan.choices:
        yield reasoned(plan, "loraplus_lr_ratio")
    if "rank_pattern" in plan.choices:
        yield reasoned(plan, "rank_pattern", "lora_rank_pattern")
    for name, there in (
        ("modules_to_save", "lora_modules_to_save"),
        ("layers_to_transform", "peft_layers_to_transform"),
    ):
        if name in plan.choices:
            yield reasoned(plan, name, there, value=list(plan.value(name)))


def _axolotl_data(job: Job) -> Iterator[Setting]:
    recipe = job.plan.recipe
    if recipe.chat_template is not None:
        yield Setting("chat_template", "jinja")
        yield Setting("chat_template_jinja", template_text(recipe.chat_template))
    elif job.shape is not Shape.TEXT:
        yield Setting("chat_template", "tokenizer_default", "the model's own")
    if recipe.chat_template_kwargs is not None:
        yield Setting("chat_template_kwargs", dict(recipe.chat_template_kwargs))
    if job.method is Method.SFT:
        everything = loss_of(recipe) == "everything"
        yield reasoned(job.plan, "assistant_only_loss", "train_on_inputs", value=everything)
    if job.converted:
        yield Setting("datasets", [_axolotl_rows(job, TRAIN_ROWS, None)])
    else:
        yield Setting("datasets", [_axolotl_rows(job, look.spec, look) for look in job.looks])
    if job.evaluates and job.converted:
        yield Setting("test_datasets", [{**_axolotl_rows(job, HELD_OUT_ROWS, None), "split": "train"}])
    elif job.held_out:
        rows = [{**_axolotl_rows(job, look.spec, look), "split": "train"} for look in job.held_out]
        yield Setting("test_datasets", rows)
    elif job.evaluates:
        yield Setting("val_set_size", held_out_share(job.plan))


def _axolotl_rows(job: Job, path: str, look: Look | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": path}
    if look is None or look.files:
        entry["ds_type"] = "json" if look is None else look.loading["path"]
    else:
        entry |= {key: value for key, value in look.loading.items() if key in ("name", "split")}
    if job.shape is Shape.TEXT:
        column = look.column("text") if look is not None else "text"
        return {**entry, "type": "completion", "field": column}
    if job.shape is Shape.PREFERENCE:
        return {**entry, "type": "chat_template.default"}
    entry |= {"type": "chat_template", "field_messages": "messages"}
    if look is not None:
        name = "messages" if look.detected.format is Format.MESSAGES else "conversations"
        entry["field_messages"] = look.column(name)
        if look.spelling == "from":
            entry["message_property_mappings"] = {"role": "from", "content": "value"}
    trained = ["system", "user", "assistant", "tool"] if loss_of(job.plan.recipe) == "everything" else ["assistant"]
    return {**entry, "roles_to_train": trained, "train_on_eos": "turn"}
