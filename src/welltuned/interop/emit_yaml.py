"""What the YAML for Axolotl and for LLaMA-Factory has in common: the rows, the header, some settings.

Rows that the tool reads by itself are named as they lie; others are converted by a few lines of Python, which stand in
comments of the file and write JSON Lines beside it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from welltuned.advice.plan import Plan
from welltuned.data.conversation import Format
from welltuned.interop.emit_code import data_code
from welltuned.interop.emit_missing import (
    missing_everywhere,
    mixture_differs,
    other_rows_held_out,
    split_by_row,
)
from welltuned.interop.emit_rows import Look, Shape, look_at, shape_of
from welltuned.interop.emit_text import Setting, bullets, reasoned, title
from welltuned.recipe import Method

READ_THERE = (".json", ".jsonl", ".csv", ".parquet", ".arrow")
TRAIN_ROWS, HELD_OUT_ROWS = "train.rows.jsonl", "heldout.rows.jsonl"


@dataclass(frozen=True, slots=True)
class Written:
    """The text, and what it leaves out."""

    text: str
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """`converted`: the rows are written anew first."""

    plan: Plan
    looks: tuple[Look, ...]
    held_out: tuple[Look, ...]
    shape: Shape
    converted: bool

    @property
    def method(self) -> Method:
        return self.plan.recipe.method

    @property
    def evaluates(self) -> bool:
        return self.plan.facts.dataset.heldout_rows > 0


def job_for(plan: Plan, formats: frozenset[Format]) -> Job:
    """`formats`: those that the target reads by itself, with the model's own chat template."""
    recipe = plan.recipe
    looks, held_out = look_at(recipe, recipe.datasets), look_at(recipe, recipe.eval_datasets, hub_options=False)
    every = (*looks, *held_out)
    shape = shape_of(recipe, every, True)
    shape = Shape.CHAT if shape is Shape.PAIR else shape
    counted = any(part.rows != part.rows_of_epoch for part in plan.facts.dataset.mixture)
    native = all(look.detected.format in formats and _read_there(look) for look in every)
    converted = recipe.method is not Method.SFT or not native or counted or recipe.group_by is not None
    return Job(plan, looks, held_out, shape, converted)


def _read_there(look: Look) -> bool:
    names = {"system", "tools", "input", "history"}
    plain = not look.written and not any(look.column(name) for name in names)
    plain = plain and not (look.nested and not look.spelling)
    return plain and len(look.files) <= 1 and all(file.endswith(READ_THERE) for file in look.files)


def missing_of(job: Job) -> Iterator[str]:
    plan = job.plan
    yield from missing_everywhere(plan, (*job.looks, *job.held_out), job.shape)
    if job.evaluates and not job.held_out:
        yield other_rows_held_out(plan) if job.converted else split_by_row(plan)
    if (mixed := mixture_differs(plan)) is not None:
        yield mixed
    if plan.recipe.instruction_part or plan.recipe.response_part:
        yield "instruction_part and response_part: what is trained is found from the chat template there"
    if plan.value("load_best_model_at_end"):
        yield "load_best_model_at_end and early_stopping_patience: the last state is kept there, and saved once"
    if "bias" in plan.choices and plan.value("bias") != "none":
        yield f"bias {plan.value('bias')}: no biases are trained there"


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def file_text(job: Job, name: str, tool: str, commands: Sequence[str], missing: Sequence[str], body: str) -> str:
    """Header, the converter where one is needed, and the settings."""
    first = [f"sed -n 's/^#py //p' {name} > rows.py && python rows.py"] if job.converted else []
    lines = [
        *title(job.plan),
        f"# For {tool}. Run it where the paths of the data begin:",
        "#",
        *(f"#     {command}" for command in [*first, *commands]),
        "#",
        "# What it cannot say, or says otherwise, than `welltuned train`:",
        *bullets(missing),
        "",
        body.rstrip("\n"),
    ]
    if job.converted:
        written = f"{TRAIN_ROWS} and {HELD_OUT_ROWS}" if job.evaluates else TRAIN_ROWS
        lines += ["", f"# rows.py: the rows in the form that it reads, as {written}."]
        lines += [f"#py {line}" for line in _converter(job).splitlines()]
    return "\n".join(lines) + "\n"


_WRITE = """
def write(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(WRITTEN, ensure_ascii=False) + "\\n" for row in rows)


train, held_out = split(TRAIN)
"""
_ONE_MESSAGE = '{"messages": row["prompt"], "chosen": row["chosen"][-1], "rejected": row["rejected"][-1]}'
_LABELLED = '{"messages": row["prompt"] + row["completion"], "label": row["label"]}'


def _converter(job: Job) -> str:
    head = ["import hashlib", "import json", "import random", "", "from datasets import load_dataset", ""]
    written = {Shape.PREFERENCE: _ONE_MESSAGE, Shape.JUDGED: _LABELLED}.get(job.shape, "row")
    lines = [*head, data_code(job.plan, job.looks, job.held_out, job.shape), _WRITE.replace("WRITTEN", written)]
    lines += ["held_out, _ = split(EVAL)"] if job.held_out else []
    lines.append(f'write("{TRAIN_ROWS}", train)')
    lines += [f'write("{HELD_OUT_ROWS}", held_out)'] if job.evaluates else []
    return "\n".join(lines)


def length_settings(job: Job) -> Iterator[Setting]:
    """How long the run is: updates, or epochs."""
    if "max_steps" in job.plan.choices:
        yield reasoned(job.plan, "max_steps", value=job.plan.updates)


def dtype_setting(job: Job) -> Setting:
    return reasoned(job.plan, "dtype", "bf16", value=job.plan.value("dtype") == "bfloat16")


def alpha_setting(job: Job) -> Setting:
    value = job.plan.value("lora_alpha")
    return reasoned(job.plan, "lora_alpha", value=int(value) if float(value).is_integer() else value)
