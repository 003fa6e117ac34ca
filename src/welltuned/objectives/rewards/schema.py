"""JSON Schema as far as rewards need it: the keywords that describe a document's shape and its values.

A keyword that is not understood is refused when the schema is read: ignoring one would reward what it forbids.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from welltuned.errors import InputError

_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "integer": lambda v: isinstance(v, int | float) and not isinstance(v, bool) and float(v).is_integer(),
}
_SAID_ONLY = {"$schema", "$id", "$comment", "title", "description", "default", "examples", "$defs", "definitions"}
_FENCE = re.compile(r"^\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*$", re.DOTALL)


def read_schema(path: Path) -> Any:
    """The schema in a file, each keyword understood.

    Raises:
        InputError: no such file, not JSON, or a keyword that is not understood.
    """
    where = str(path)
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the JSON schema cannot be read ({error.strerror})", where=where) from error
    except ValueError as error:
        raise InputError(f"the JSON schema is not JSON ({error})", where=where) from error
    _require_known(schema, schema, where)
    return schema


def json_schema(schema: Any, completion: str) -> float:
    """1 where the completion is one JSON document (a ```json fence around it may be) that the schema allows."""
    fenced = _FENCE.match(completion)
    try:
        value = json.loads(fenced[1] if fenced else completion)
    except (ValueError, RecursionError):
        return 0.0
    return float(valid(value, schema, schema))


def valid(value: Any, schema: Any, root: Any) -> bool:
    """Whether the schema, which `$ref` of "#/..." looks up in `root`, allows the value."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and not valid(value, _referred(schema["$ref"], root), root):
        return False
    return all(check(value, schema, root) for key, check in _CHECKS.items() if key in schema)


def _referred(ref: str, root: Any) -> Any:
    found = root
    if not ref.startswith("#"):
        raise KeyError(ref)
    for part in ref.removeprefix("#").strip("/").split("/"):
        found = found[part.replace("~1", "/").replace("~0", "~")] if part else found
    return found


def _type(value: Any, schema: Any, _: Any) -> bool:
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return any(_TYPES[name](value) for name in names)


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON: true is not 1."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _properties(value: Any, schema: Any, root: Any) -> bool:
    return not isinstance(value, dict) or all(
        valid(value[key], part, root) for key, part in schema["properties"].items() if key in value
    )


def _additional(value: Any, schema: Any, root: Any) -> bool:
    if not isinstance(value, dict):
        return True
    known = schema.get("properties", {})
    return all(valid(item, schema["additionalProperties"], root) for key, item in value.items() if key not in known)


def _bound(kind: str, size: Callable[[Any], Any], holds: Callable[[Any, Any], bool], key: str) -> Any:
    def check(value: Any, schema: Any, _: Any) -> bool:
        return not _TYPES[kind](value) or holds(size(value), schema[key])

    return check


def _number_of(value: Any) -> Any:
    return value


_CHECKS: Mapping[str, Callable[[Any, Any, Any], bool]] = {
    "type": _type,
    "enum": lambda v, s, _: any(_same(v, item) for item in s["enum"]),
    "const": lambda v, s, _: _same(v, s["const"]),
    "properties": _properties,
    "required": lambda v, s, _: not isinstance(v, dict) or all(key in v for key in s["required"]),
    "additionalProperties": _additional,
    "items": lambda v, s, r: not isinstance(v, list) or all(valid(item, s["items"], r) for item in v),
    "minItems": _bound("array", len, lambda a, b: a >= b, "minItems"),
    "maxItems": _bound("array", len, lambda a, b: a <= b, "maxItems"),
    "minLength": _bound("string", len, lambda a, b: a >= b, "minLength"),
    "maxLength": _bound("string", len, lambda a, b: a <= b, "maxLength"),
    "pattern": _bound("string", str, lambda a, b: re.search(b, a) is not None, "pattern"),
    "minimum": _bound("number", _number_of, lambda a, b: a >= b, "minimum"),
    "maximum": _bound("number", _number_of, lambda a, b: a <= b, "maximum"),
    "exclusiveMinimum": _bound("number", _number_of, lambda a, b: a > b, "exclusiveMinimum"),
    "exclusiveMaximum": _bound("number", _number_of, lambda a, b: a < b, "exclusiveMaximum"),
    "allOf": lambda v, s, r: all(valid(v, part, r) for part in s["allOf"]),
    "anyOf": lambda v, s, r: any(valid(v, part, r) for part in s["anyOf"]),
    "oneOf": lambda v, s, r: sum(valid(v, part, r) for part in s["oneOf"]) == 1,
    "not": lambda v, s, r: not valid(v, s["not"], r),
}


def _require_known(schema: Any, root: Any, where: str) -> None:
    """Refuse a schema that is none, or says what `valid` would not look at or not find."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise InputError(f"a JSON schema is an object, not {json.dumps(schema)[:40]}", where=where)
    unknown = sorted(schema.keys() - _CHECKS.keys() - _SAID_ONLY - {"$ref"})
    if unknown:
        mend = "say it with other keywords, or check it in a function of your own (file.py:function)"
        raise InputError(f"the JSON schema's keyword '{unknown[0]}' is not understood", where=where, mend=mend)
    names = schema.get("type", [])
    for name in names if isinstance(names, list) else [names]:
        if name not in _TYPES:
            raise InputError(f"the JSON schema names a type '{name}'", where=where, mend=f"one of {', '.join(_TYPES)}")
    if "$ref" in schema:
        try:
            _referred(schema["$ref"], root)
        except (KeyError, TypeError, AttributeError) as error:
            what = f"the JSON schema refers to {schema['$ref']}, which is not in it"
            raise InputError(what, where=where, mend="put it under $defs") from error
    for part in _parts(schema):
        _require_known(part, root, where)


def _parts(schema: Mapping[str, Any]) -> list[Any]:
    inner = [schema[key] for key in ("items", "additionalProperties", "not") if key in schema]
    inner += [part for key in ("allOf", "anyOf", "oneOf") for part in schema.get(key, [])]
    return inner + [part for key in ("properties", "$defs", "definitions") for part in schema.get(key, {}).values()]
