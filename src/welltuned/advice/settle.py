"""Where advice meets the user's own value: the user's value stands, the advice keeps its range and its reason."""

from collections.abc import Mapping
from typing import Any

from welltuned.advice.rules import Rule
from welltuned.choice import Choice, SetBy
from welltuned.recipe import Recipe


def settle(recipe: Recipe, name: str, advised: Choice) -> Choice:
    """The advised choice, or the user's value with the advice's range, reason and evidence beside it."""
    if name not in recipe.hyperparameters:
        return advised
    value = recipe.hyperparameters[name]
    same = value == advised.value
    told = "set by you; the advice is the same" if same else f"set by you where the advice is {shown(advised.value)}"
    return Choice(
        value=value,
        low=advised.low,
        high=advised.high,
        reason=f"{told}: {advised.reason}",
        evidence=advised.evidence,
        set_by=SetBy.USER,
    )


def from_rule(rule: Rule, reason: str, value: Any = None) -> Choice:
    """A choice that is a rule's own value and range."""
    return Choice(
        value=rule.value if value is None else value,
        low=rule.low,
        high=rule.high,
        reason=reason,
        evidence=rule.evidence,
    )


def shown(value: Any) -> str:
    """A value as people write it: 2e-4, 0.05, q_proj v_proj, yes.

    >>> shown(0.00021), shown(3.0), shown(True), shown(("q_proj", "v_proj")), shown(134515008)
    ('2.1e-4', '3', 'true', 'q_proj v_proj', '134,515,008')
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        if value == 0 or abs(value) >= 0.01:
            return f"{value:.4g}"
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(item)}" for key, item in value.items())
    if isinstance(value, tuple | list):
        return " ".join(str(item) for item in value)
    return str(value)


def times(factor: float) -> str:
    """×0.42, ×3.5, ×120."""
    return f"×{factor:.2g}" if factor < 100 else f"×{factor:,.0f}"


def counted(number: int, noun: str) -> str:
    """`1 row`, `340 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def passes_words(epochs: float) -> str:
    """`1 epoch`, `2.5 epochs`."""
    return f"{shown(float(epochs))} epoch{'' if epochs == 1 else 's'}"


def size_words(parameters: int) -> str:
    """135M, 8.0B; 36k for the tiniest."""
    for letter, unit in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= unit:
            return f"{parameters / unit:.1f}{letter}" if letter == "B" else f"{parameters / unit:.0f}{letter}"
    return str(parameters)


def bytes_words(count: float) -> str:
    """96.2 GB, 59 MB (powers of ten)."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1.0, count / 1e6):.0f} MB"


def span_words(seconds: float) -> str:
    """0.3 s, 12 s, 4 min, 2 h, 3 days: how long something takes, to be read and not to be computed with."""
    if seconds < 9.5:
        return f"{max(seconds, 0.1):.1f} s"
    for unit, size, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < most * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def duration_words(seconds: float) -> str:
    """42 s, 2 min 05 s, 2 h 02 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
