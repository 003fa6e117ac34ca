"""What a key may hold: types and ranges."""

import math
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from enum import StrEnum
from types import MappingProxyType
from typing import Any, NamedTuple

from welltuned.errors import InputError
from welltuned.recipe.keys import (
    ALL_LINEAR,
    AUTO,
    BIASES,
    DENSE_BASES,
    DPO_LOSSES,
    DTYPES,
    FSDP,
    GRPO_LOSSES,
    HYPERPARAMETERS,
    KEYS,
    LOSS_ON,
    NEVER_KEPT,
    ON_NONFINITE,
    OPTIMIZERS,
    POLICIES,
    REWARD_SCALES,
    SCHEDULERS,
)


class Setting(NamedTuple):
    """A value, and where it was given: file and line, or the option."""

    value: Any
    where: str


SHARDING = "start it with torchrun and say fsdp: full_shard, which cuts every weight (FSDP2)"
NOT_BUILT = MappingProxyType(
    {
        "fsdp_config": f"{SHARDING}; layers are cut one by one, and nothing else is to be set",
        "deepspeed": f"{SHARDING}; ZeRO-3 has been seen to save adapters of 40 bytes",
    }
)
"""What other trainers' keys ask for, that shard one model over several GPUs; and what there is instead."""


def refuse_unknown(key: str, where: str) -> None:
    """Raises InputError where this is no key."""
    if key in KEYS:
        return
    if key in NOT_BUILT:
        raise InputError(f"'{key}' is not built", where=where, mend=NOT_BUILT[key])
    nearest = get_close_matches(key, list(KEYS), n=1, cutoff=0.6)
    mend = f"did you mean '{nearest[0]}'?" if nearest else "`welltuned plan --help` lists the keys"
    raise InputError(f"unknown key '{key}'", where=where, mend=mend)


def checked(key: str, value: Any, where: str) -> Any:
    """The value as the key's type.

    Raises:
        InputError: it is of another type, or outside the key's range.
    """
    refuse_unknown(key, where)
    if value is None:
        raise InputError(f"{key} has no value", where=where, mend=f"write `{key}: {AUTO}` or leave it out")
    if isinstance(value, str) and value == AUTO and key not in {"model", "data"}:
        return AUTO
    if key == "memory":
        return parse_memory(value, where)
    if KEYS[key].many:
        return _several(key, value, where)
    return _within(key, _typed(key, value, where), where)


def _several(key: str, value: Any, where: str) -> Any:
    """A tuple; a single text stays a text for `data` and `eval_data`."""
    if isinstance(value, str) and KEYS[key].type is not str:
        value = [_number(part) for part in value.strip("[]() ").split(",")]
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not items:
        raise InputError(f"{key} is an empty list", where=where, mend="name at least one, or leave it out")
    typed = tuple(_within(key, _typed(key, item, where), where) for item in items)
    if key == "map":
        _check_map(typed, where)
    return typed[0] if len(typed) == 1 and key in {"data", "eval_data"} else typed


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text.strip()


def _check_map(pairs: tuple[str, ...], where: str) -> None:
    ours: set[str] = set()
    for pair in pairs:
        name, equals, _ = (part.strip() for part in pair.partition("="))
        if not name or not equals:  # an empty column is meant: the name is not read
            raise InputError(f"'{pair}' is not of the form ours=theirs", where=where, mend="such as prompt=Frage")
        if name in ours:
            raise InputError(f"map names a column for '{name}' twice", where=where, mend="remove one")
        ours.add(name)


def _within(key: str, value: Any, where: str) -> Any:
    rule = _RULES.get(key)
    if rule is not None and not rule.holds(value):
        raise InputError(f"{key} is {_shown(value)}", where=where, mend=f"it must be {rule.words}")
    return value


def _typed(key: str, value: Any, where: str) -> Any:
    kind = KEYS[key].type
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
    if key == "chat_template_kwargs":
        return _named_values(key, value, where)
    if kind is dict and isinstance(value, Mapping):
        return dict(value)
    if kind is tuple:
        return _module_names(key, value, where)
    if issubclass(kind, StrEnum) and isinstance(value, str):
        return _member(key, kind, value, where)
    words = {float: "a number", int: "a whole number", bool: "true or false", dict: "{name: number}"}.get(kind, "text")
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


def _named_values(key: str, value: Any, where: str) -> dict[str, Any]:
    """Texts, numbers and switches by their names, or lists of these."""
    if not isinstance(value, Mapping) or not value:
        mend = "write, for example, {enable_thinking: false}"
        raise InputError(f"{key} takes names with their values and got {_shown(value)}", where=where, mend=mend)
    for name, held in value.items():
        plain = all(
            isinstance(item, str | int | float) for item in (held if isinstance(held, list | tuple) else [held])
        )
        if not isinstance(name, str) or not name.isidentifier() or not plain:
            what = f"{key} has {_shown(name)}: {_shown(held)}"
            raise InputError(what, where=where, mend="a name has a text, a number, true, false, or a list of these")
    return {name: list(held) if isinstance(held, tuple) else held for name, held in value.items()}


def _shown(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


class _Rule(NamedTuple):
    holds: Callable[[Any], bool]
    words: str


def _one_of(names: tuple[str, ...]) -> _Rule:
    return _Rule(lambda value: value in names, "one of " + ", ".join(names))


def _numbers_by_name(value: Mapping[Any, Any], kind: type) -> bool:
    """Names and their parts, as PEFT matches them, with numbers above 0."""
    numbers = (int,) if kind is int else (int, float)
    return bool(value) and all(
        isinstance(name, str) and _PATTERN.fullmatch(name) and type(number) in numbers and 0 < number < math.inf
        for name, number in value.items()
    )


_PATTERN = re.compile(r"\^?(?:\.\*)?[\w.\\|$-]+(?:\.\*[\w.\\|$-]+){0,2}")  # few ".*": each multiplies the time
_STARTS = re.compile(r"gaussian|pissa|pissa_niter_\d{1,3}|olora|loftq")
_POSITIVE = _Rule(lambda value: 0 < value < math.inf, "above 0")
_NOT_NEGATIVE = _Rule(lambda value: 0 <= value < math.inf, "0 or more")
_SHARE = _Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
_WITHIN = _Rule(lambda value: 0 < value < 1, "above 0 and below 1")
_NAMED = _Rule(lambda value: bool(value.strip()), "a name")
_RULES: Mapping[str, _Rule] = MappingProxyType(
    {key: _POSITIVE for key, spec in HYPERPARAMETERS.items() if spec.type in (int, float)}
    | {
        key: _NOT_NEGATIVE
        for key in (
            *("warmup_steps", "weight_decay", "beta", "early_stopping_patience", "simpo_gamma", "layers_to_transform"),
            "checkpointed_layers",
            *("desirable_weight", "undesirable_weight", "center_rewards_coefficient"),
        )
    }
    | {"seed": _Rule(lambda value: 0 <= value < 2**32, "between 0 and 4294967295")}
    | {"max_length": _Rule(lambda value: value >= 2, "2 or more, since a token is learned from the one before it")}
    | {key: _SHARE for key in ("lora_dropout", "adam_beta1", "adam_beta2")}
    | {key: _NAMED for key in ("model", "data", "eval_data", "group_by", "format", "adapter", "rewards")}
    | {"modules_to_save": _NAMED, "ema_decay": _WITHIN}
    | {
        "rank_pattern": _Rule(lambda value: _numbers_by_name(value, int), "names with whole numbers above 0"),
        "alpha_pattern": _Rule(lambda value: _numbers_by_name(value, float), "names with numbers above 0"),
    }
    | {key: _one_of(("error", "drop") if key in NEVER_KEPT else ("error", "drop", "keep")) for key in POLICIES}
    | {
        "data_weights": _POSITIVE,
        "reward_weights": _Rule(math.isfinite, "a finite number"),
        "label_smoothing": _Rule(lambda value: 0 <= value < 0.5, "at least 0 and below 0.5"),
        "vllm_server_base_url": _Rule(
            lambda value: bool(re.fullmatch(r"https?://[^/\s]+(/\S*)?", value)), "a URL such as http://localhost:8000"
        ),
        "num_generations": _Rule(lambda value: value >= 2, "2 or more: an answer is judged beside others"),
        "top_p": _Rule(lambda value: 0 < value <= 1, "above 0 and at most 1"),
        "epsilon": _Rule(lambda value: 0 < value < 1, "above 0 and below 1"),
        "loss_type": _one_of((*DPO_LOSSES, *GRPO_LOSSES)),
        "scale_rewards": _one_of(REWARD_SCALES),
        "data_rows": _POSITIVE,
        "eval_fraction": _WITHIN,
        "lr_scheduler_type": _one_of(SCHEDULERS),
        "optim": _one_of(OPTIMIZERS),
        "dtype": _one_of(DTYPES),
        "dense_base": _one_of(DENSE_BASES),
        "fsdp": _one_of(FSDP),
        "bias": _one_of(BIASES),
        "loss_on": _one_of(LOSS_ON),
        "on_nonfinite": _one_of(ON_NONFINITE),
        "init_lora_weights": _Rule(
            lambda value: value is True or bool(_STARTS.fullmatch(str(value))),
            "true, gaussian, pissa, pissa_niter_N, olora or loftq",
        ),
    }
)


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
