"""Config: one run as any tool's file describes it, in one set of names, with the file's own words kept beside them.

Names of settings are the field's own (`learning_rate`, `r`, `lora_alpha`, `max_length`, ...), whatever the tool calls
them. A value that a file leaves open (`lr = args.lr` in a script) is unread: no check guesses it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from welltuned.recipe import Method, Tune


class Tool(StrEnum):
    WELLTUNED = "welltuned"
    TRL = "trl"
    AXOLOTL = "axolotl"
    LLAMAFACTORY = "llamafactory"
    UNSLOTH = "unsloth"


class Form(StrEnum):
    YAML = "yaml"
    SCRIPT = "script"


@dataclass(frozen=True, slots=True)
class Setting:
    """A value with the key that it was written under and its line (from 1)."""

    value: Any
    key: str
    line: int


@dataclass(frozen=True, slots=True)
class Unread:
    """A value that stands in the file as an expression that only running it could give."""

    key: str
    line: int
    text: str


class KeyTrouble(StrEnum):
    """What can be wrong with a key itself."""

    UNKNOWN = "unknown"
    REMOVED = "removed"
    DEPRECATED = "deprecated"
    TWICE = "twice"
    IGNORED = "ignored"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadKey:
    """A key that the tool does not take, no longer takes, or takes only for now."""

    trouble: KeyTrouble
    key: str
    line: int
    owner: str  # who would take it: "SFTConfig", "Axolotl's configuration"
    mend: str
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What local files say without being loaded: the first rows of the data, and the model's config.json."""

    rows: int | None = None
    rows_are_all: bool = False
    characters: tuple[int, ...] = ()
    columns: frozenset[str] = frozenset()
    parameters: int | None = None
    family: str | None = None
    context_length: int | None = None
    module_names: tuple[str, ...] = ()


_NO_SETTINGS: Mapping[str, Setting] = MappingProxyType({})
_NO_VALUES: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One run. `method` and `tune` are None where the file does not settle them.

    `settings` and `unread` go by neutral name; `defaults` are the tool's own values for what is not set, and `names`
    what the tool calls a setting. `facts` are words about the file that are no settings: which collator a script
    builds, whether it merges the adapter.
    """

    file: str
    tool: Tool
    form: Form
    method: Method | None = None
    stage: str = ""  # the tool's own word for what the run does: dpo, pt, rm, SFTTrainer
    tune: Tune | None = None
    settings: Mapping[str, Setting] = field(default_factory=lambda: _NO_SETTINGS)
    unread: Mapping[str, Unread] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=lambda: _NO_VALUES)
    names: Mapping[str, str] = field(default_factory=dict)
    bad_keys: tuple[BadKey, ...] = ()
    facts: Mapping[str, Setting] = field(default_factory=lambda: _NO_SETTINGS)
    line: int = 1
    rest_open: bool = False  # what is not set may be set elsewhere: the arguments come from a parser, or from **words
    look: Look = field(default_factory=Look)

    @property
    def trains_adapter(self) -> bool:
        return self.tune in (Tune.LORA, Tune.QLORA)

    def given(self, name: str) -> bool:
        """Whether the file speaks of a setting, readable or not."""
        return name in self.settings or name in self.unread

    def is_open(self, name: str) -> bool:
        """Whether the file leaves a setting to be found out when it runs."""
        return name in self.unread or (self.rest_open and name not in self.settings)

    def value(self, name: str) -> Any:
        """What holds: the file's value, else the tool's default; None where neither is known."""
        if name in self.unread:
            return None
        return self.settings[name].value if name in self.settings else self.defaults.get(name)

    def number(self, name: str) -> float | None:
        """The value where it is a number, or text that is one: what the tools convert."""
        value = self.value(name)
        if isinstance(value, bool) or value is None:
            return None
        try:
            return float(value)
        except (TypeError, ValueError):
            return None

    def whole(self, name: str) -> int | None:
        number = self.number(name)
        return int(number) if number is not None and number == int(number) else None

    def on(self, name: str) -> bool:
        """Whether a switch is known to be on."""
        return self.value(name) is True

    def off(self, name: str) -> bool:
        """Whether a switch is known to be off; one that is unread is neither."""
        return not self.is_open(name) and self.value(name) in (None, False)

    def text(self, name: str) -> str:
        value = self.value(name)
        return value if isinstance(value, str) else ""

    def key(self, name: str) -> str:
        """What the file calls a setting, or what the tool would."""
        if name in self.settings:
            return self.settings[name].key
        return self.unread[name].key if name in self.unread else self.names.get(name, name)

    def line_of(self, name: str) -> int | None:
        if name in self.settings:
            return self.settings[name].line
        return self.unread[name].line if name in self.unread else None
