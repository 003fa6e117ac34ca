"""Putting a Config together: settings under neutral names, and what is wrong with the keys themselves."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from welltuned.advice.lint.config import BadKey, Config, Form, KeyTrouble, Setting, Tool, Unread
from welltuned.interop.known import judge_key
from welltuned.interop.yaml_file import Entry, YamlFile
from welltuned.recipe import Method, Tune


@dataclass(slots=True, kw_only=True)
class Draft:
    """A Config in the making. Later settings win, as they do when the tools read a file."""

    file: str
    tool: Tool
    form: Form
    names: Mapping[str, str]  # the tool's word → the neutral name; what is not in it keeps its own
    method: Method | None = None
    stage: str = ""
    tune: Tune | None = None
    settings: dict[str, Setting] = field(default_factory=dict)
    unread: dict[str, Unread] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    bad_keys: list[BadKey] = field(default_factory=list)
    facts: dict[str, Setting] = field(default_factory=dict)
    line: int = 1
    rest_open: bool = False

    def neutral(self, key: str) -> str:
        return self.names.get(key, key)

    def put(self, name: str, value: Any, key: str, line: int) -> None:
        """A setting by its neutral name."""
        self.settings[name] = Setting(value, key, line)
        self.unread.pop(name, None)

    def leave_open(self, name: str, key: str, line: int, text: str) -> None:
        self.unread[name] = Unread(key, line, text)
        self.settings.pop(name, None)

    def note(self, fact: str, value: Any, key: str, line: int) -> None:
        self.facts.setdefault(fact, Setting(value, key, line))

    def value(self, name: str) -> Any:
        return self.settings[name].value if name in self.settings else None

    def finish(self) -> Config:
        return Config(
            file=self.file,
            tool=self.tool,
            form=self.form,
            method=self.method,
            stage=self.stage,
            tune=self.tune,
            settings=self.settings,
            unread=self.unread,
            defaults=self.defaults,
            names={neutral: theirs for theirs, neutral in reversed(list(self.names.items()))},  # the first of several
            bad_keys=tuple(self.bad_keys),
            facts=self.facts,
            line=self.line,
            rest_open=self.rest_open,
        )


def draft_of(yaml: YamlFile, file: str, tool: Tool, names: Mapping[str, str]) -> Draft:
    """Every entry as a setting; empty ones (`wandb_name:`) are not set. Keys that stand twice are noted."""
    draft = Draft(file=file, tool=tool, form=Form.YAML, names=names)
    for entry in yaml.entries:
        if entry.value is not None:
            draft.put(draft.neutral(entry.key), entry.value, entry.key, entry.line)
    for key, first, second in yaml.twice:
        mend = f"keep one of lines {first} and {second}"
        draft.bad_keys.append(
            BadKey(trouble=KeyTrouble.TWICE, key=key, line=second, owner=str(tool), mend=mend, why=f"{first}")
        )
    return draft


def judge_keys(
    draft: Draft, entries: Iterable[Entry], owners: tuple[str, ...], known: frozenset[str], name: str
) -> None:
    """Note every key of the file's top level that the tool does not take."""
    for entry in entries:
        bad = judge_key(entry.key, entry.line, owners, known, name) if entry.top else None
        if bad is not None and (bad.trouble is not KeyTrouble.UNKNOWN or entry.key not in known):
            draft.bad_keys.append(bad)
