"""Dataclasses to plain values and back, by their annotations: what plan.yaml is written and read with."""

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import Any, Union, get_args, get_origin, get_type_hints


def to_plain(value: Any) -> Any:
    """Dictionaries, lists, text and numbers."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, StrEnum):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: Any, value: Any) -> Any:
    """The value that `to_plain` wrote, as the annotated type. Raises KeyError, TypeError or ValueError otherwise."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        choices = [choice for choice in arguments if choice is not types.NoneType]
        if isinstance(value, list):  # `str | tuple[str, ...]`
            choices = [choice for choice in choices if get_origin(choice) is tuple]
        return from_plain(choices[0], value)
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        unknown = set(value) - {field.name for field in fields(kind)}
        if unknown:
            raise KeyError(sorted(unknown)[0])
        return kind(**{name: from_plain(hints[name], item) for name, item in value.items()})
    if origin is tuple:
        return tuple(from_plain(arguments[0], item) for item in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return types.MappingProxyType({key: from_plain(arguments[1], item) for key, item in value.items()})
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return kind(value)
    if kind is Any:
        return tuple(value) if isinstance(value, list) else value
    if not isinstance(value, int | float if kind is float else kind):
        raise TypeError(f"{value!r} is not {kind}")
    return float(value) if kind is float else value
