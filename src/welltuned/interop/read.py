"""Which tool a file is for, and its reader."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from welltuned.advice.lint.config import Config, Tool
from welltuned.errors import InputError
from welltuned.interop.axolotl import NAMES as AXOLOTL_NAMES
from welltuned.interop.axolotl import read_axolotl
from welltuned.interop.known import HANDBOOK_KEYS, REMOVED, TRL_CONFIGS, keys_of
from welltuned.interop.llamafactory import read_llamafactory
from welltuned.interop.look import look_at
from welltuned.interop.ours import read_ours
from welltuned.interop.trl import METHODS, read_trl
from welltuned.interop.yaml_file import KNOWN_FORMATS, YamlFile, parse_yaml, read_text
from welltuned.recipe import KEYS, Method

_READERS: Mapping[Tool, Callable[[YamlFile, str], Config]] = {
    Tool.TRL: read_trl,
    Tool.AXOLOTL: read_axolotl,
    Tool.LLAMAFACTORY: read_llamafactory,
    Tool.WELLTUNED: read_ours,
}
# Keys that only this tool's users write; one is enough to know it by.
_MARKS: Mapping[Tool, frozenset[str]] = {
    Tool.AXOLOTL: frozenset({"base_model", "micro_batch_size", "sequence_len", "sample_packing", "lora_target_linear"}),
    Tool.LLAMAFACTORY: frozenset({"stage", "finetuning_type", "cutoff_len", "lora_rank", "lora_target", "template"}),
    Tool.TRL: frozenset(
        {"use_peft", "lora_r", "dataset_mixture", "dataset_name", "max_seq_length", "max_prompt_length"}
    ),
    Tool.WELLTUNED: frozenset({"model", "data", "tune", "method", "eval_fraction"}),
}


def read_config(path: str, tool: Tool | None = None, method: Method | None = None) -> tuple[Config, ...]:
    """The runs that a file describes: one for a YAML file, one for each trainer of a script.

    Raises InputError where the file cannot be read, or is of no known format, or of several.
    """
    text = read_text(path)
    if Path(path).suffix.lower() in (".py", ".pyw"):
        from welltuned.interop.script import read_script

        configs = read_script(text, path, tool)
    else:
        yaml = parse_yaml(text, path)
        chosen = tool or tool_of(yaml, path)
        if chosen is Tool.UNSLOTH:
            raise InputError("Unsloth has no YAML that is known here", where=path, mend="give the Python script")
        configs = (read_trl(yaml, path, method) if chosen is Tool.TRL else _READERS[chosen](yaml, path),)
    return tuple(replace(config, look=look_at(config)) for config in configs)


def tool_of(yaml: YamlFile, path: str) -> Tool:
    """The tool whose keys these are. Several or none is an error that names them."""
    keys = {entry.key for entry in yaml.entries if entry.top}
    marked = [tool for tool, marks in _MARKS.items() if keys & marks]
    if len(marked) == 1:
        return marked[0]
    taken = {tool: len(keys & _taken(tool)) for tool in (marked or _READERS)}
    best = max(taken.values(), default=0)
    winners = [tool for tool, count in taken.items() if count == best]
    if best == 0 or (not marked and best < 2):
        raise InputError("is of no known format: no key of it is known here", where=path, mend=KNOWN_FORMATS)
    if set(winners) == {Tool.TRL, Tool.LLAMAFACTORY} and not marked:
        return Tool.TRL  # transformers' own keys, and none that LLaMA-Factory's users write
    if len(winners) > 1:
        words = " and ".join(winners)
        raise InputError(f"could be of {words}: {best} of its keys fit each", where=path, mend="say which with --tool")
    return winners[0]


def _taken(tool: Tool) -> frozenset[str]:
    match tool:
        case Tool.AXOLOTL:
            return keys_of("axolotl") | AXOLOTL_NAMES.keys()
        case Tool.LLAMAFACTORY:
            return keys_of("llamafactory", "TrainingArguments") | REMOVED["TrainingArguments"].keys()
        case Tool.TRL:
            gone = {
                key
                for owner in (*METHODS, "TrainingArguments", "ModelConfig", "ScriptArguments")
                for key in REMOVED[owner]
            }
            return keys_of(*TRL_CONFIGS, "TrainingArguments", "ModelConfig", "ScriptArguments") | HANDBOOK_KEYS | gone
        case _:
            return frozenset(KEYS)
