"""Recipe: what the user asks for. Model, data and method; every other value may be left to the advice ("auto").

A recipe comes from three places, the later ones win: a YAML file, options, and `--set key=value`. Whatever is wrong in
it is one `InputError` that names the file and line (or the option) and how to mend it. Nothing is guessed: an unknown
key is an error, because a misspelt `lerning_rate` that is quietly ignored costs a whole run.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from welltuned.errors import InputError


class Method(StrEnum):
    SFT = "sft"
    DPO = "dpo"
    ORPO = "orpo"
    KTO = "kto"
    GRPO = "grpo"


class Tune(StrEnum):
    LORA = "lora"
    QLORA = "qlora"
    FULL = "full"


AUTO = "auto"
ALL_LINEAR = "all-linear"
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")
OPTIMIZERS = ("adamw", "adamw_torch", "adamw_torch_fused")
DTYPES = ("float32", "bfloat16")
BIASES = ("none", "all", "lora_only")
LORA_KEYS = frozenset(["r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "init_lora_weights", "bias"])
METHOD_KEYS = MappingProxyType(
    {
        "beta": frozenset({Method.DPO, Method.ORPO, Method.KTO, Method.GRPO}),
        "num_generations": frozenset({Method.GRPO}),
        "max_completion_length": frozenset({Method.GRPO}),
        "temperature": frozenset({Method.GRPO}),
        "assistant_only_loss": frozenset({Method.SFT}),
    }
)
"""Keys that only some methods read. Setting one where it would be ignored is an error."""


class Key(NamedTuple):
    """What a recipe key holds, and the sentence that explains it (used by --help and by the documentation)."""

    type: type
    doc: str


FIELDS: Mapping[str, Key] = MappingProxyType(
    {
        "model": Key(str, "The model to start from: a hub id, a local folder, or a GGUF file."),
        "data": Key(str, "The training data: a JSONL, JSON, CSV or Parquet file, or a hub dataset id."),
        "method": Key(Method, "What is optimised: sft (default), dpo, orpo, kto or grpo."),
        "tune": Key(Tune, "What is trained: lora (default), qlora (LoRA on a 4-bit base) or full."),
        "eval_data": Key(str, "Held-out data of your own; without it a share of `data` is held out."),
        "eval_fraction": Key(float, "Share of `data` that is held out and never trained on; unset: 5 to 10 %."),
        "subset": Key(str, "Configuration name of a hub dataset."),
        "split": Key(str, "Split of a hub dataset."),
        "memory": Key(int, "Memory that the run may use, such as 24GB or 24GiB; unset: what the machine has free."),
        "instruction_part": Key(str, "Marker that opens a user turn, for chat templates that defeat the structure."),
        "response_part": Key(str, "Marker that opens an assistant turn; only what follows it is trained."),
        "chat_template": Key(str, "A chat template, as a path or inline, instead of the tokenizer's own."),
    }
)

HYPERPARAMETERS: Mapping[str, Key] = MappingProxyType(
    {
        "learning_rate": Key(float, "Peak learning rate of AdamW, reached after the warm-up."),
        "r": Key(int, "Rank of the LoRA matrices: how many directions each layer may change in."),
        "lora_alpha": Key(float, "LoRA scale: the update is multiplied by alpha/r (by alpha/sqrt(r) with use_rslora)."),
        "lora_dropout": Key(float, "Share of the LoRA branch's inputs that is dropped in training."),
        "target_modules": Key(tuple, "Linear layers that get an adapter: all-linear, or a list of module names."),
        "use_rslora": Key(bool, "Scale by alpha/sqrt(r) instead of alpha/r."),
        "init_lora_weights": Key(object, "How A starts: true (PEFT's default, B = 0) or gaussian."),
        "bias": Key(str, "Which biases are trained: none, all or lora_only."),
        "per_device_train_batch_size": Key(int, "Examples of one micro-batch on one device."),
        "gradient_accumulation_steps": Key(int, "Micro-batches that are summed before one update."),
        "effective_batch_size": Key(int, "Examples of one update: micro-batch size times accumulation."),
        "num_train_epochs": Key(float, "Passes over the training data."),
        "max_steps": Key(int, "Upper limit on the number of updates; the run ends at this or at the last epoch."),
        "warmup_steps": Key(int, "Updates over which the learning rate climbs from 0 to its peak."),
        "lr_scheduler_type": Key(str, "Shape of the rate after the warm-up: " + ", ".join(SCHEDULERS) + "."),
        "weight_decay": Key(float, "AdamW's pull of the trained weights towards 0."),
        "adam_beta1": Key(float, "AdamW's memory of the gradient."),
        "adam_beta2": Key(float, "AdamW's memory of the squared gradient."),
        "optim": Key(str, "The optimiser: adamw (all names accepted mean the same AdamW)."),
        "max_grad_norm": Key(float, "Gradients longer than this are scaled down to it."),
        "max_length": Key(int, "Longest example in tokens; what is longer is cut."),
        "packing": Key(bool, "Put several whole examples into one stream without padding."),
        "assistant_only_loss": Key(bool, "Train on the assistant's tokens only, not on the prompt's."),
        "gradient_checkpointing": Key(bool, "Recompute activations in the backward pass: less memory, more time."),
        "dtype": Key(str, "Number format of the base weights and activations: " + " or ".join(DTYPES) + "."),
        "seed": Key(int, "Seed of everything random."),
        "eval_steps": Key(int, "Updates between two evaluations on the held-out rows."),
        "token_budget": Key(int, "Most tokens of one micro-batch; a memory matter only, never changes the result."),
        "beta": Key(float, "Pull towards the reference model (dpo, kto, grpo), or weight of the odds term (orpo)."),
        "num_generations": Key(int, "Answers sampled for each prompt (grpo)."),
        "max_completion_length": Key(int, "Longest sampled answer in tokens (grpo)."),
        "temperature": Key(float, "Sampling temperature (grpo)."),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One request. `hyperparameters` holds only what the user set; everything else is for the advice to choose."""

    model: str
    data: str
    method: Method = Method.SFT
    tune: Tune = Tune.LORA
    eval_data: str | None = None
    eval_fraction: float | None = None
    subset: str | None = None
    split: str | None = None
    memory: int | None = None
    instruction_part: str | None = None
    response_part: str | None = None
    chat_template: str | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


class _Setting(NamedTuple):
    value: Any
    where: str


def load_recipe(path: str | None = None, options: Mapping[str, Any] | None = None, sets: Sequence[str] = ()) -> Recipe:
    """Read a recipe: the file, then the options (None = not given), then the `key=value` strings of --set."""
    settings: dict[str, _Setting] = dict(_from_file(path)) if path is not None else {}
    for key, value in (options or {}).items():
        if value is not None:
            settings[key] = _Setting(value, f"--{key.replace('_', '-')}")
    settings.update(_from_sets(sets))
    checked = {key: _Setting(_checked(key, s.value, s.where), s.where) for key, s in settings.items()}
    given = {key: s for key, s in checked.items() if s.value != AUTO}
    for key in ("model", "data"):
        if key not in given:
            raise InputError(f"the recipe names no {key}", where=path, mend=f"add `{key}: …` or give --{key}")
    _refuse_ignored_keys(given)
    values = {key: s.value for key, s in given.items()}
    hyperparameters = MappingProxyType({key: values.pop(key) for key in HYPERPARAMETERS if key in values})
    return Recipe(**values, hyperparameters=hyperparameters)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The recipe as a file that `load_recipe` reads back to an equal recipe."""
    plain = recipe_to_dict(recipe)
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)
    return text


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Flat and made of plain values; unset keys are left out."""
    plain: dict[str, Any] = {
        "model": recipe.model,
        "data": recipe.data,
        "method": str(recipe.method),
        "tune": str(recipe.tune),
        "eval_data": recipe.eval_data,
        "eval_fraction": recipe.eval_fraction,
        "subset": recipe.subset,
        "split": recipe.split,
        "memory": recipe.memory,
        "instruction_part": recipe.instruction_part,
        "response_part": recipe.response_part,
        "chat_template": recipe.chat_template,
    }
    plain = {key: value for key, value in plain.items() if value is not None}
    for key, value in recipe.hyperparameters.items():
        plain[key] = list(value) if isinstance(value, tuple) else value
    return plain


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class YamlLoader(yaml.SafeLoader):
    """Safe YAML in which `2e-4` is a number: PyYAML follows YAML 1.1, where it is a string, a classic trap."""


YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?|\.inf|\.Inf|\.INF|\.nan|\.NaN|\.NAN)$"),
    list("-+.0123456789"),
)


def _from_file(path: str) -> Iterator[tuple[str, _Setting]]:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise InputError("the recipe cannot be read", where=path, mend=error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise InputError("the recipe is not UTF-8 text", where=path, mend="save it as UTF-8") from error
    root = _composed(text, path)
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise InputError("a recipe is a list of `key: value` lines", where=f"{path}:{_line(root)}")
    seen: dict[str, int] = {}
    for key_node, value_node in root.value:
        key, where = str(key_node.value), f"{path}:{_line(key_node)}"
        _refuse_unknown(key, where)
        if key in seen:
            raise InputError(f"{key} is set twice, first in line {seen[key]}", where=where, mend="remove one")
        seen[key] = _line(key_node)
        yield key, _Setting(_value(key, value_node, where), where)


def _from_sets(sets: Sequence[str]) -> Iterator[tuple[str, _Setting]]:
    for item in sets:
        key, equals, text = item.partition("=")
        key, where = key.strip(), f"--set {item}"
        if not equals or not key:
            raise InputError("is not of the form key=value", where=where, mend="write, for example, --set r=16")
        _refuse_unknown(key, "--set")
        if _takes_text(key) and not text.startswith(('"', "'")):
            yield key, _Setting(text, where)
            continue
        node = _composed(text, where)
        yield key, _Setting(None if node is None else _value(key, node, where), where)


def _composed(text: str, where: str) -> yaml.Node | None:
    loader = YamlLoader(text)
    try:
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and not where.startswith("--") else ""
        raise InputError(f"not valid YAML: {error.problem}", where=f"{where}{line}", mend="mend the syntax") from error
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML: {error}", where=where, mend="mend the syntax") from error
    finally:
        loader.dispose()


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _value(key: str, node: yaml.Node, where: str) -> Any:
    if isinstance(node, yaml.ScalarNode):
        text = node.value
        if node.tag.endswith(":null"):
            raise InputError(f"{key} has no value", where=where, mend=f"write `{key}: {AUTO}` or remove the line")
        if _takes_text(key) or node.tag.endswith(":str"):
            return text
        return _number_or_switch(text, node.tag)
    if isinstance(node, yaml.SequenceNode):
        return [_value(key, child, where) for child in node.value]
    raise InputError(f"{key} takes one value or a list", where=where, mend="do not nest keys below it")


def _number_or_switch(text: str, tag: str) -> Any:
    if tag.endswith(":bool"):
        return text.lower() in {"true", "yes", "on"}
    try:
        return int(text.replace("_", "")) if tag.endswith(":int") else float(text.replace(".inf", "inf"))
    except ValueError:  # 0x10, 1:30, .nan: numbers to YAML 1.1, text to us
        return text


def _takes_text(key: str) -> bool:
    kind = _kind(key)
    return kind is str and key not in {"optim", "bias", "dtype", "lr_scheduler_type"}


def _kind(key: str) -> type:
    return (FIELDS[key] if key in FIELDS else HYPERPARAMETERS[key]).type


def _refuse_unknown(key: str, where: str) -> None:
    known = [*FIELDS, *HYPERPARAMETERS]
    if key in known:
        return
    nearest = get_close_matches(key, known, n=1, cutoff=0.6)
    mend = f"did you mean '{nearest[0]}'?" if nearest else "`welltuned plan --help` lists the keys"
    raise InputError(f"unknown key '{key}'", where=where, mend=mend)


# ── checking ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _checked(key: str, value: Any, where: str) -> Any:
    _refuse_unknown(key, where)
    if value is None:
        raise InputError(f"{key} has no value", where=where, mend=f"write `{key}: {AUTO}` or leave it out")
    if isinstance(value, str) and value == AUTO and key not in {"model", "data"}:
        return AUTO
    if key == "memory":
        return parse_memory(value, where)
    typed = _typed(key, value, where)
    rule = _RULES.get(key)
    if rule is not None and not rule.holds(typed):
        raise InputError(f"{key} is {_shown(typed)}", where=where, mend=f"it must be {rule.words}")
    return typed


def _typed(key: str, value: Any, where: str) -> Any:
    kind = _kind(key)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number:
        return float(value)
    if kind is int and number and float(value).is_integer():
        return int(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind is object:
        return value
    if kind is tuple:
        return _module_names(key, value, where)
    if issubclass(kind, StrEnum) and isinstance(value, str):
        return _member(key, kind, value, where)
    words = {float: "a number", int: "a whole number", bool: "true or false"}.get(kind, "text")
    raise InputError(f"{key} takes {words} and got {_shown(value)}", where=where, mend=f"write a value or `{AUTO}`")


def _member(key: str, kind: type[StrEnum], value: str, where: str) -> StrEnum:
    names = [str(member) for member in kind]
    if value.lower() in names:
        return kind(value.lower())
    nearest = get_close_matches(value.lower(), names, n=1)
    mend = f"did you mean '{nearest[0]}'?" if nearest else "it must be one of " + ", ".join(names)
    raise InputError(f"unknown {key} '{value}'", where=where, mend=mend)


def _module_names(key: str, value: Any, where: str) -> str | tuple[str, ...]:
    if value == ALL_LINEAR:
        return ALL_LINEAR
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) and name for name in names):
        return tuple(names)
    raise InputError(
        f"{key} takes module names and got {_shown(value)}", where=where, mend=f"write {ALL_LINEAR} or [q_proj, v_proj]"
    )


def _shown(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


class _Rule(NamedTuple):
    holds: Callable[[Any], bool]
    words: str


def _one_of(names: tuple[str, ...]) -> _Rule:
    return _Rule(lambda value: value in names, "one of " + ", ".join(names))


_POSITIVE = _Rule(lambda value: 0 < value < math.inf, "above 0")
_NOT_NEGATIVE = _Rule(lambda value: 0 <= value < math.inf, "0 or more")
_SHARE = _Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
_WITHIN = _Rule(lambda value: 0 < value < 1, "above 0 and below 1")
_NAMED = _Rule(lambda value: bool(value.strip()), "a name")
_RULES: Mapping[str, _Rule] = MappingProxyType(
    {key: _POSITIVE for key, spec in HYPERPARAMETERS.items() if spec.type in (int, float)}
    | {key: _NOT_NEGATIVE for key in ("warmup_steps", "weight_decay", "beta")}
    | {"seed": _Rule(lambda value: 0 <= value < 2**32, "between 0 and 4294967295")}
    | {key: _SHARE for key in ("lora_dropout", "adam_beta1", "adam_beta2")}
    | {
        "model": _NAMED,
        "data": _NAMED,
        "eval_fraction": _WITHIN,
        "lr_scheduler_type": _one_of(SCHEDULERS),
        "optim": _one_of(OPTIMIZERS),
        "dtype": _one_of(DTYPES),
        "bias": _one_of(BIASES),
        "init_lora_weights": _Rule(lambda value: value is True or value == "gaussian", "true or gaussian"),
    }
)


def _refuse_ignored_keys(given: Mapping[str, _Setting]) -> None:
    """A value that nothing would read is an error, not a surprise after the run."""
    method = given["method"].value if "method" in given else Method.SFT
    tune = given["tune"].value if "tune" in given else Tune.LORA
    for key, setting in given.items():
        if key in LORA_KEYS and tune is Tune.FULL:
            raise InputError(f"{key} has no meaning with tune: full", where=setting.where, mend="remove one of the two")
        if key in METHOD_KEYS and method not in METHOD_KEYS[key]:
            readers = ", ".join(sorted(METHOD_KEYS[key]))
            raise InputError(f"{key} is not read by method {method}", where=setting.where, mend=f"only by: {readers}")
    if "eval_data" in given and "eval_fraction" in given:
        where = given["eval_fraction"].where
        raise InputError("eval_fraction is set although eval_data names held-out rows", where=where, mend="keep one")


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_memory(value: Any, where: str = "--memory") -> int:
    """Bytes from 24GB (10^9), 24GiB (2^30), 500M or a plain number of bytes.

    >>> parse_memory("24GB"), parse_memory("1.5 GiB"), parse_memory(1000)
    (24000000000, 1610612736, 1000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", str(value).lower())
    if isinstance(value, bool) or match is None or (match[3] and not match[2]) or float(match[1]) == 0:
        raise InputError(f"memory '{value}' is not a size", where=where, mend="write, for example, 24GB or 24GiB")
    return int(float(match[1]) * (_BINARY_UNITS[match[2]] if match[3] else _UNITS[match[2]]))
