"""The numbers that rules need, each with its evidence (rules.yaml). A rule holds no number of its own."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import yaml

from welltuned.advice.evidence import unique
from welltuned.recipe import YamlLoader


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """`low` and `high` bound the value where the rule itself names a range."""

    value: Any
    low: Any = None
    high: Any = None
    evidence: tuple[str, ...]
    note: str = ""


@cache
def rules() -> MappingProxyType[str, Rule]:
    return read_rules("welltuned.advice", "rules.yaml")


def read_rules(package: str, name: str) -> MappingProxyType[str, Rule]:
    """Numbers with their evidence from a file of a package; an id that no row has is a KeyError."""
    text = files(package).joinpath(name).read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = yaml.load(text, Loader=YamlLoader)
    return MappingProxyType(
        {name: Rule(**{**entry, "evidence": unique(entry["evidence"])}) for name, entry in entries.items()}
    )


def rule(name: str) -> Rule:
    """A rule by name, with its evidence."""
    return rules()[name]


def number(name: str) -> float:
    """The value of a rule that is one number."""
    return float(rule(name).value)


def cited(*names: str) -> tuple[str, ...]:
    """The evidence of several rules, each id once."""
    return unique(id for name in names for id in rule(name).evidence)


def by_threshold(name: str, size: float) -> Any:
    """The value of the first [limit, value] pair whose limit is above `size`; a limit of null has no end."""
    for limit, value in rule(name).value:
        if limit is None or size < limit:
            return value
    raise KeyError(f"{name} has no entry for {size}")
