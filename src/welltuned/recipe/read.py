"""A recipe from a file, options and `--set`, and back to a file."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from welltuned.errors import InputError
from welltuned.recipe.beside import refuse_ignored_keys
from welltuned.recipe.check import Setting, checked, refuse_unknown
from welltuned.recipe.keys import AUTO, HYPERPARAMETERS, KEYS, POLICIES, Method, Tracker, Tune

_EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """What a model's files may do beyond being read; only the user's own recipe grants it."""

    code: bool = False
    pickle: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One request. `hyperparameters` and `policies` hold only what the user set, by the keys' names.

    `tune_given` is False where nobody named `tune`: then the advice may keep a base that is too large in 4 bits.
    """

    model: str
    data: str | tuple[str, ...]
    method: Method = Method.SFT
    tune: Tune = Tune.LORA
    adapter: str | None = None
    rewards: tuple[str, ...] | None = None
    reward_weights: tuple[float, ...] | None = None
    vllm_server_base_url: str | None = None
    tune_given: bool = field(default=False, compare=False)
    data_weights: tuple[float, ...] | None = None
    data_rows: tuple[int, ...] | None = None
    eval_data: str | tuple[str, ...] | None = None
    eval_fraction: float | None = None
    group_by: str | None = None
    format: str | None = None
    map: tuple[str, ...] | None = None
    subset: str | None = None
    split: str | None = None
    memory: int | None = None
    instruction_part: str | None = None
    response_part: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    report_to: tuple[Tracker, ...] | None = None
    trust_remote_code: bool | None = None
    allow_pickle: bool | None = None
    loss_on: str | None = None
    on_nonfinite: str | None = None
    policies: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    hyperparameters: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)

    @property
    def trust(self) -> Trust:
        return Trust(code=bool(self.trust_remote_code), pickle=bool(self.allow_pickle))

    @property
    def datasets(self) -> tuple[str, ...]:
        return (self.data,) if isinstance(self.data, str) else self.data

    @property
    def eval_datasets(self) -> tuple[str, ...]:
        if self.eval_data is None:
            return ()
        return (self.eval_data,) if isinstance(self.eval_data, str) else self.eval_data


def load_recipe(path: str | None = None, options: Mapping[str, Any] | None = None, sets: Sequence[str] = ()) -> Recipe:
    """Read a recipe: the file, then the options (None = not given), then the `key=value` strings of --set."""
    settings: dict[str, Setting] = dict(_from_file(path)) if path is not None else {}
    for key, value in (options or {}).items():
        if value is not None:
            settings[key] = Setting(value, f"--{key.replace('_', '-')}")
    settings.update(_from_sets(sets))
    every = {key: Setting(checked(key, s.value, s.where), s.where) for key, s in settings.items()}
    given = {key: s for key, s in every.items() if s.value != AUTO}
    for key in ("model", "data"):
        if key not in given:
            raise InputError(f"the recipe names no {key}", where=path, mend=f"add `{key}: …` or give --{key}")
    refuse_ignored_keys(given)
    values = {key: s.value for key, s in given.items()}
    if "loss_on" in values:  # said twice from here on, since the plan knows the second name
        values["assistant_only_loss"] = values["loss_on"] != "everything"
    policies, hyperparameters = (
        MappingProxyType({key: values.pop(key) for key in keys if key in values})
        for keys in (POLICIES, HYPERPARAMETERS)
    )
    return Recipe(**values, tune_given="tune" in values, policies=policies, hyperparameters=hyperparameters)


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
        "adapter": recipe.adapter,
        "rewards": recipe.rewards,
        "reward_weights": recipe.reward_weights,
        "vllm_server_base_url": recipe.vllm_server_base_url,
        "data_weights": recipe.data_weights,
        "data_rows": recipe.data_rows,
        "eval_data": recipe.eval_data,
        "eval_fraction": recipe.eval_fraction,
        "group_by": recipe.group_by,
        "format": recipe.format,
        "map": recipe.map,
        "subset": recipe.subset,
        "split": recipe.split,
        "memory": recipe.memory,
        "instruction_part": recipe.instruction_part,
        "response_part": recipe.response_part,
        "chat_template": recipe.chat_template,
        "chat_template_kwargs": recipe.chat_template_kwargs,
        "report_to": None if recipe.report_to is None else [str(name) for name in recipe.report_to],
        "trust_remote_code": recipe.trust_remote_code,
        "allow_pickle": recipe.allow_pickle,
        "loss_on": recipe.loss_on,
        "on_nonfinite": recipe.on_nonfinite,
        **recipe.policies,
        **recipe.hyperparameters,
    }
    return {key: list(v) if isinstance(v, tuple) else v for key, v in plain.items() if v is not None}


# ── files and --set ──────────────────────────────────────────────────────────────────────────────────────────────────


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


class PlainLoader(YamlLoader):
    """Without aliases: a few lines of them can stand for billions of values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "an alias (*name) stands where a value belongs", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


def _from_file(path: str) -> Iterator[tuple[str, Setting]]:
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
        refuse_unknown(key, where)
        if key in seen:
            raise InputError(f"{key} is set twice, first in line {seen[key]}", where=where, mend="remove one")
        seen[key] = _line(key_node)
        yield key, Setting(_value(key, value_node, where), where)


def _from_sets(sets: Sequence[str]) -> Iterator[tuple[str, Setting]]:
    for item in sets:
        key, equals, text = item.partition("=")
        key, where = key.strip(), f"--set {item}"
        if not equals or not key:
            raise InputError("is not of the form key=value", where=where, mend="write, for example, --set r=16")
        refuse_unknown(key, "--set")
        listed = KEYS[key].many and text.startswith("[") and text.endswith("]")
        if _takes_text(key) and not listed and not text.startswith(('"', "'")):
            yield key, Setting(text, where)
            continue
        node = _composed(text, where)
        yield key, Setting(None if node is None else _value(key, node, where), where)


def _composed(text: str, where: str) -> yaml.Node | None:
    loader = None
    try:
        loader = PlainLoader(text)  # refuses control characters at once
        return loader.get_single_node()
    except RecursionError as error:
        raise InputError("not valid YAML: nested too deeply", where=where, mend="mend the syntax") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and not where.startswith("--") else ""
        raise InputError(f"not valid YAML: {error.problem}", where=f"{where}{line}", mend="mend the syntax") from error
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML: {error}", where=where, mend="mend the syntax") from error
    finally:
        if loader is not None:
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
    if isinstance(node, yaml.MappingNode) and key in KEYS and KEYS[key].type is dict:
        pairs = [(str(name.value), _value(key, child, where)) for name, child in node.value]
        if len(dict(pairs)) < len(pairs):
            raise InputError(f"{key} names one thing twice", where=where, mend="keep one")
        return dict(pairs)
    raise InputError(f"{key} takes one value or a list", where=where, mend="do not nest keys below it")


def _number_or_switch(text: str, tag: str) -> Any:
    if tag.endswith(":bool"):
        return text.lower() in {"true", "yes", "on"}
    try:
        return int(text.replace("_", "")) if tag.endswith(":int") else float(text.replace(".inf", "inf"))
    except ValueError:  # 0x10, 1:30, .nan: numbers to YAML 1.1, text to us
        return text


_WORDS = {"optim", "bias", "dtype", "lr_scheduler_type", "loss_type", "scale_rewards"}  # one of a few, so typed


def _takes_text(key: str) -> bool:
    return KEYS[key].type is str and key not in _WORDS
