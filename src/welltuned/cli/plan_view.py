"""How a plan looks in a terminal: one screen of what matters, or all of it with the evidence beside it."""

import re
import shlex
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from welltuned.advice.describe import brief_data, brief_model, data_line, machine_line, model_line, time_line
from welltuned.advice.plan import Plan, PlanLine, plan_lines
from welltuned.advice.settle import bytes_words
from welltuned.choice import SetBy
from welltuned.cli.safe import visible
from welltuned.cli.terminal import console

MOST_IDS = 3  # of the evidence, beside a choice
SMALL = 0.02  # parts of the memory below this share are added up
# What a person weighs first. The other choices stand in a line, unless somebody set them or they are switched on.
WEIGHED = (
    *("learning_rate", "num_train_epochs", "max_steps", "effective_batch_size", "r", "lora_alpha", "target_modules"),
    *("loss_type", "beta", "num_generations", "max_completion_length", "temperature", "center_rewards_coefficient"),
    *("max_length", "warmup_steps", "dtype", "eval_steps"),
)
WHERE_ON = (
    *("gradient_checkpointing", "offload_checkpoints", "lora_dropout", "early_stopping_patience", "label_smoothing"),
)


def print_plan(plan: Plan, out: Console = console, *, whole: bool = False, command: str | None = None) -> None:
    """Facts, choices with reasons, time, memory, warnings, and the command that does it.

    Args:
        whole: every choice has its row, with all of its reason and the evidence's ids.
        command: what to run next.
    """
    facts = plan.facts
    out.print()
    _field(out, "Model", (model_line if whole else brief_model)(facts.model))
    _field(out, "Data", (data_line if whole else brief_data)(facts.dataset))
    for part in facts.dataset.mixture:
        share = f"{part.rows_of_epoch:,} of {part.rows:,} rows, {part.share:.0%} of the tokens, from {part.name}"
        _field(out, "", f"an epoch: {share}")
    _field(out, "Machine", machine_line(facts.machine))
    out.print()
    lines = plan_lines(plan)
    shown = [line for line in lines if whole or _is_weighed(plan, line)]
    out.print(_table(plan, shown, whole))
    rest = [f"{line.name} {line.value}" for line in lines if line not in shown]
    if rest:
        _field(out, "The rest", " · ".join(rest))
    out.print()
    one_of = f"; on one of {facts.machine.gpus} GPUs" if facts.machine.gpus > facts.machine.processes else ""
    _field(out, "Time", time_line(plan.time) + (one_of if facts.machine.gpus > 1 else ""))
    _field(out, "Memory", _memory(plan, whole))
    for warning in plan.warnings:
        out.print(Text("! " + visible(warning if whole else _without_folders(plan, warning)), style="yellow"))
    if command is not None:
        _field(out, "Do it", command)
    if not whole:
        _field(out, "More", "every reason: `welltuned plan --all` · what speaks against one: `welltuned why KEY`")
    out.print()


def train_command(arguments: Namespace, processes: int = 1) -> str:
    """`plan`'s options as a command that trains, in one process or in several that share every update."""
    shared = ["torchrun", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    words = [*shared, "welltuned", "train", *([arguments.recipe] if arguments.recipe else [])]
    given = vars(arguments)
    for option in ("model", "data", "eval_data", "map", "subset", "split", "method", "tune", "memory"):
        value = given.get(option)
        for one in value if isinstance(value, list | tuple) else [] if value is None else [value]:
            words += [f"--{option.replace('_', '-')}", str(one)]
    for item in arguments.sets:
        words += ["--set", item]
    return shlex.join([*words, "--out", "runs/first"])


def _is_weighed(plan: Plan, line: PlanLine) -> bool:
    choice = plan.choices[line.name]
    return line.name in WEIGHED or choice.set_by is SetBy.USER or (line.name in WHERE_ON and bool(choice.value))


def _table(plan: Plan, lines: list[PlanLine], whole: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("choice", "value", "range"):
        table.add_column(column, no_wrap=True)
    table.add_column("why", ratio=1)
    for line in lines:
        choice = plan.choices[line.name]
        style = "cyan" if choice.set_by is SetBy.USER else "bold green"
        reason = Text(visible(line.reason if whole else first_clause(line.reason)))
        if whole:
            reason.append(_evidence(choice.evidence), style="dim")
        table.add_row(line.name, Text(visible(line.value), style=style), line.span, reason)
    return table


def first_clause(reason: str) -> str:
    """What a reason says before its first semicolon outside of brackets, which stands by itself."""
    return re.split(r";(?![^(]*\))", reason, maxsplit=1)[0]


def _memory(plan: Plan, whole: bool) -> str:
    memory, limit = plan.memory, plan.memory.limit_bytes
    of = f" of {bytes_words(limit)}" if limit else ""
    parts = memory.parts if whole else dict(_larger(memory.parts, SMALL * memory.total_bytes))
    named = ", ".join(f"{name} {bytes_words(part)}" for name, part in parts.items() if part >= 1e6)
    return f"about {bytes_words(memory.total_bytes)}{of}: {named}"


def _larger(parts: Mapping[str, int], least: float) -> Iterator[tuple[str, int]]:
    """The largest first; those below `least` together."""
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    yield from ((name, part) for name, part in ordered if part >= least)
    if rest := sum(part for _, part in ordered if part < least):
        yield "rest", rest


def _without_folders(plan: Plan, text: str) -> str:
    """With datasets by their names, where these tell them apart."""
    names = {spec: Path(spec).name for spec in (*plan.recipe.datasets, *plan.recipe.eval_datasets)}
    if len(set(names.values())) < len(names):
        return text
    for spec in sorted(names, key=len, reverse=True):
        text = text.replace(spec, names[spec] or spec)
    return text


def _evidence(ids: tuple[str, ...]) -> str:
    """The first few; `why` has all of them."""
    more = f" +{len(ids) - MOST_IDS}" if len(ids) > MOST_IDS else ""
    return f" [{' '.join(ids[:MOST_IDS])}{more}]" if ids else ""


def _field(out: Console, name: str, text: str) -> None:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=8, style="bold", no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_row(name, Text(visible(text)))
    out.print(grid)
