"""A YAML file as dotted keys with values and lines. Values are read as YAML 1.2 reads them: `2e-4` is a number."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from welltuned.errors import InputError
from welltuned.recipe import YamlLoader

_TEXT_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?[eE](?:\d+|-\d+)|[-+]?\d+[eE]\+\d+")
_LARGEST = 4_000_000  # bytes: no configuration is larger
_DEEPEST = 60
_MOST_VALUES = 100_000  # within one value, aliases written out: whoever prints or compares it goes through all of them


@dataclass(frozen=True, slots=True)
class Entry:
    """`key` is dotted for nested mappings: `trl.num_generations`. A mapping is an entry, and so is each of its keys."""

    key: str
    value: Any
    line: int
    raw: str = ""

    @property
    def top(self) -> bool:
        return "." not in self.key

    @property
    def text_number(self) -> bool:
        """Whether YAML 1.1, and so PyYAML, reads this number as text: an exponent without a dot or a sign."""
        return isinstance(self.value, float) and not _yaml_1_1_number(self.raw)


@dataclass(frozen=True, slots=True)
class YamlFile:
    entries: tuple[Entry, ...]
    twice: tuple[tuple[str, int, int], ...]  # key, first line, second line


def read_text(path: str) -> str:
    """A file's text, or one sentence that says why it cannot be read."""
    file = Path(path).expanduser()
    if file.is_dir():
        raise InputError("is a folder", where=path, mend="give the configuration file in it")
    try:
        if file.stat().st_size > _LARGEST:
            raise InputError(f"has more than {_LARGEST // 1_000_000} MB and is no configuration", where=path)
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError("the file cannot be read", where=path, mend=error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise InputError("the file is not UTF-8 text", where=path, mend="save it as UTF-8") from error


def parse_yaml(text: str, path: str) -> YamlFile:
    """The file's keys; an InputError where it is no YAML mapping."""
    root = _root(text, path)
    if not isinstance(root, yaml.MappingNode):
        raise InputError("is no configuration: not a list of `key: value` lines", where=path, mend=KNOWN_FORMATS)
    reader = _Reader()
    try:
        entries = tuple(reader.entries(root, "", 0))
    except RecursionError as error:
        raise InputError("is nested too deeply, refers to itself, or repeats itself without end", where=path) from error
    return YamlFile(entries, tuple(reader.twice))


KNOWN_FORMATS = "give a YAML of welltuned, TRL, Axolotl or LLaMA-Factory, or a Python script that calls TRL or Unsloth"


def _root(text: str, path: str) -> yaml.Node | None:
    try:
        loader = YamlLoader(text)  # refuses control characters at once
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"not valid YAML: {error.problem}", where=f"{path}{line}", mend="mend the syntax") from error
    except (yaml.YAMLError, RecursionError) as error:
        what = " ".join(str(error).split()) or "nested too deeply"
        raise InputError(f"not valid YAML: {what}", where=path, mend="mend the syntax") from error


@dataclass(slots=True)
class _Reader:
    """Each node is read once, however often an alias repeats it: repeated aliases of aliases would never end."""

    twice: list[tuple[str, int, int]] = field(default_factory=list)
    values: dict[int, Any] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    entered: set[int] = field(default_factory=set)

    def entries(self, node: yaml.MappingNode, prefix: str, depth: int) -> Iterator[Entry]:
        seen: dict[str, int] = {}
        self.entered.add(id(node))
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            key, line = prefix + str(key_node.value), int(key_node.start_mark.line) + 1
            if key in seen:
                self.twice.append((key, seen[key], line))
            seen[key] = line
            raw = value_node.value if isinstance(value_node, yaml.ScalarNode) else ""
            yield Entry(key, self.value(value_node, depth), line, raw)
            if isinstance(value_node, yaml.MappingNode) and id(value_node) not in self.entered:
                yield from self.entries(value_node, f"{key}.", depth + 1)

    def value(self, node: yaml.Node, depth: int) -> Any:
        if depth > _DEEPEST:
            raise RecursionError
        if id(node) not in self.values:
            self.values[id(node)] = self._read(node, depth)
            self.sizes[id(node)] = 1 + sum(self.sizes.get(id(child), 0) for child in _children(node))
            if self.sizes[id(node)] > _MOST_VALUES:
                raise RecursionError
        return self.values[id(node)]

    def _read(self, node: yaml.Node, depth: int) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, depth + 1) for child in node.value]
        if isinstance(node, yaml.MappingNode):
            pairs = [(key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
            return {str(key.value): self.value(value, depth + 1) for key, value in pairs}
        return _scalar(str(node.value), node.tag)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [value for _, value in node.value]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _scalar(text: str, tag: str) -> Any:
    if tag.endswith(":null"):
        return None
    if tag.endswith(":bool"):
        return text.lower() in {"true", "yes", "on"}
    if tag.endswith((":int", ":float")):
        try:
            return int(text.replace("_", "")) if tag.endswith(":int") else float(text.replace(".inf", "inf"))
        except ValueError:
            return text
    return text


def _yaml_1_1_number(raw: str) -> bool:
    return not _TEXT_NUMBER.fullmatch(raw) or bool(re.fullmatch(r"[-+]?\d[\d_]*\.\d*[eE][-+]\d+", raw))
