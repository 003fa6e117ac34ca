"""Python scripts that call TRL, PEFT and Unsloth, read by `ast`: the calls, and which of them make up a run."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from welltuned.advice.lint.config import Config, Tool
from welltuned.errors import InputError
from welltuned.interop.known import TRL_CONFIGS
from welltuned.interop.script_run import build_run
from welltuned.interop.values import Names
from welltuned.interop.yaml_file import KNOWN_FORMATS

CONFIGS = {
    **{name: name for name in TRL_CONFIGS},
    "TrainingArguments": "TrainingArguments",
    "UnslothTrainingArguments": "SFTConfig",
    "Seq2SeqTrainingArguments": "TrainingArguments",
}
TRAINERS = {
    **{name.replace("Config", "Trainer"): name for name in TRL_CONFIGS},
    "Trainer": "TrainingArguments",
    "UnslothTrainer": "SFTConfig",
}
PARTS = frozenset(
    {
        "LoraConfig",
        "BitsAndBytesConfig",
        "from_pretrained",
        "get_peft_model",
        "train_on_responses_only",
        "merge_and_unload",
        "save_pretrained_merged",
        "DataCollatorForLanguageModeling",
        "EarlyStoppingCallback",
    }
)


@dataclass(slots=True)
class Calls:
    """The calls of a script that matter here, in the order of its lines."""

    names: Names
    tree: ast.Module
    unsloth: bool
    configs: list[ast.Call] = field(default_factory=list)
    trainers: list[ast.Call] = field(default_factory=list)
    parts: dict[str, list[ast.Call]] = field(default_factory=dict)

    def part(self, name: str, line: int) -> ast.Call | None:
        """The last such call before a line, else the first after it."""
        calls = self.parts.get(name, [])
        before = [call for call in calls if call.lineno <= line]
        return before[-1] if before else calls[0] if calls else None


@dataclass(frozen=True, slots=True)
class Run:
    """One training run: its configuration call, its trainer call, and what class the configuration is of."""

    owner: str
    config: ast.Call | None
    trainer: ast.Call | None
    trainer_name: str

    @property
    def line(self) -> int:
        return self.trainer.lineno if self.trainer else self.config.lineno if self.config else 1


def read_script(text: str, path: str, tool: Tool | None = None) -> tuple[Config, ...]:
    """Every run of a script. Raises InputError where it is no Python, or trains nothing that is known here."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        where = f"{path}:{error.lineno}" if error.lineno else path
        version = ".".join(str(part) for part in sys.version_info[:2])
        what = f"not valid Python (read as Python {version}): {error.msg}"
        raise InputError(what, where=where, mend="mend the syntax") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise InputError("cannot be parsed as Python", where=path) from error
    if tool in (Tool.AXOLOTL, Tool.LLAMAFACTORY, Tool.WELLTUNED):
        raise InputError(f"{tool} is configured in YAML, and this is a Python script", where=path)
    try:
        calls = _collected(tree, tool)
        runs = list(_runs(calls))
    except RecursionError as error:
        raise InputError("is nested too deeply", where=path) from error
    if not runs:
        raise InputError("calls no trainer of TRL, Unsloth or transformers", where=path, mend=KNOWN_FORMATS)
    return tuple(build_run(run, calls, path) for run in runs)


def _collected(tree: ast.Module, tool: Tool | None) -> Calls:
    imports = {module.split(".")[0] for node in ast.walk(tree) for module in _modules(node)}
    unsloth = tool is Tool.UNSLOTH or (tool is None and "unsloth" in imports)
    calls = Calls(Names(tree), tree, unsloth)
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(found, key=lambda call: (call.lineno, call.col_offset)):
        name = calls.names.called(call)
        if name in CONFIGS:
            calls.configs.append(call)
        elif name in TRAINERS:
            calls.trainers.append(call)
        elif name in PARTS:
            calls.parts.setdefault(name, []).append(call)
    return calls


def _modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def _runs(calls: Calls) -> Iterator[Run]:
    used: set[int] = set()
    for trainer in calls.trainers:
        name = calls.names.called(trainer)
        given = next((word.value for word in trainer.keywords if word.arg == "args"), None)
        config = _config_of(given, trainer, calls)
        if config is not None:
            used.add(id(config))
        owner = CONFIGS[calls.names.called(config)] if config is not None else TRAINERS[name]
        yield Run(owner, config, trainer, name)
    for config in calls.configs:
        if id(config) not in used:
            yield Run(CONFIGS[calls.names.called(config)], config, None, "")


def _config_of(given: ast.expr | None, trainer: ast.Call, calls: Calls) -> ast.Call | None:
    """The call that made a trainer's `args`: inline, of a function, or the last assignment before the trainer."""
    if given is None:
        return None
    direct = calls.names.call_of(given)
    if direct is not None and calls.names.called(direct) in CONFIGS:
        return direct
    if not isinstance(given, ast.Name):
        return None
    made = [
        node
        for node in calls.names.assigned.get(given.id, [])
        if isinstance(node, ast.Call) and calls.names.called(node) in CONFIGS
    ]
    before = [node for node in made if node.lineno <= trainer.lineno]
    return before[-1] if before else made[0] if made else None
