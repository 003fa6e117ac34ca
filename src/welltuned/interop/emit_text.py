"""How a value, its reason and a sentence are written in a script and in a YAML file."""

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from welltuned.advice.plan import Plan
from welltuned.choice import SetBy
from welltuned.facts.machine import Device
from welltuned.recipe import OPTIMIZERS_8BIT

WIDTH = 110
_PLAIN = re.compile(r"[A-Za-z_][\w./-]*")
_RESERVED = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})  # YAML 1.1: not texts


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of a target's configuration. `reason` is the comment above it, empty where none is needed."""

    name: str
    value: Any
    reason: str = ""


def reasoned(plan: Plan, choice: str, name: str | None = None, value: Any = None) -> Setting:
    """A choice of the plan under the target's name, its reason with the ids of its evidence behind it."""
    chosen = plan.choices[choice]
    evidence = f" [{' '.join(chosen.evidence)}]" if chosen.evidence and chosen.set_by is SetBy.ADVICE else ""
    return Setting(name or choice, chosen.value if value is None else value, chosen.reason + evidence)


def optimizer_name(plan: Plan) -> str:
    """As transformers calls it; its names for AdamW in 8 bits are ours too."""
    if plan.value("optim") in OPTIMIZERS_8BIT:
        return str(plan.value("optim"))
    return "adamw_torch_fused" if plan.facts.machine.device is Device.CUDA else "adamw_torch"


def comment(text: str, indent: str = "", first: str = "") -> list[str]:
    """Lines of `# ...`, folded; `first` opens the first one, and the others line up behind it."""
    lead = f"{indent}# "
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=lead + first,
        subsequent_indent=lead + " " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )


def title(plan: Plan) -> list[str]:
    recipe = plan.recipe
    return comment(
        f"{recipe.method} of {recipe.model} ({recipe.tune}) on {', '.join(recipe.datasets)}: welltuned's plan."
    )


def bullets(sentences: Iterable[str]) -> list[str]:
    return [line for sentence in sentences for line in comment(sentence, first="- ")]


def number(value: float) -> str:
    """A float that Python and YAML 1.1 both read as one: PyYAML takes 2e-4 for a text.

    >>> number(2e-4), number(1e-05), number(3.0), number(0.95)
    ('0.0002', '1.0e-05', '3.0', '0.95')
    """
    text = repr(float(value))
    mantissa, exponent, power = text.partition("e")
    return f"{mantissa}.0{exponent}{power}" if exponent and "." not in mantissa else text


def python_value(value: Any) -> str:
    """A literal of Python; a text is written with double quotes."""
    if isinstance(value, bool) or value is None:
        return repr(value)
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(python_value, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{python_value(k)}: {python_value(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def yaml_value(value: Any) -> str:
    """A scalar or a flow list or mapping; texts that YAML could take for something else are quoted."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _RESERVED:
        return value
    return json.dumps(value, ensure_ascii=False)


def python_call(target: str, name: str, settings: Sequence[Setting], indent: str = "") -> list[str]:
    """`TARGET = NAME(key=value, ...)`, a setting a line."""
    lines, inner = [f"{indent}{target} = {name}("], indent + " " * 4
    for setting in settings:
        lines += comment(setting.reason, inner) if setting.reason else []
        lines.append(f"{inner}{setting.name}={python_value(setting.value)},")
    return [*lines, f"{indent})"]


def yaml_lines(settings: Sequence[Setting]) -> list[str]:
    lines: list[str] = []
    for setting in settings:
        lines += comment(setting.reason) if setting.reason else []
        if isinstance(setting.value, list) and setting.value and isinstance(setting.value[0], dict):
            lines.append(f"{setting.name}:")
            for entry in setting.value:
                marks = ("  - ", *["    "] * (len(entry) - 1))
                lines += [f"{mark}{key}: {yaml_value(v)}" for mark, (key, v) in zip(marks, entry.items(), strict=True)]
        else:
            lines.append(f"{setting.name}: {yaml_value(setting.value)}")
    return lines
