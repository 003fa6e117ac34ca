"""A cheap look at what lies beside a config: the first rows of a local JSONL or JSON file, a local config.json."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from welltuned.advice.lint.config import Config, Look
from welltuned.errors import InputError

_MOST_ROWS = 2_000  # whose lengths are looked at
_MOST_BYTES = 64_000_000  # of a file whose lines are counted
_JSON_BYTES = 8_000_000  # of a JSON list, which must be read whole


def look_at(config: Config) -> Look:
    """What local files say. Whatever is not local, or cannot be read at once, is not known, and no error here."""
    model, data = _model(config), _data(config)
    return Look(**model, **data)


def _model(config: Config) -> dict[str, Any]:
    name = config.text("model")
    folder = _beside(config, name)
    if not name or folder is None or not (folder / "config.json").is_file():
        return {}
    from welltuned.facts.model import read_model_facts

    try:
        facts = read_model_facts(str(folder), weights_needed=False)
    except (InputError, KeyError, ValueError, TypeError):
        return {}
    found = {"family": facts.family, "context_length": facts.context_length, "module_names": facts.module_names}
    return found | {"parameters": facts.parameters}


def _data(config: Config) -> dict[str, Any]:
    name = config.value("data")
    if isinstance(name, list) and len(name) == 1:
        name = name[0].get("path") if isinstance(name[0], dict) else name[0]
    path = _beside(config, name) if isinstance(name, str) else None
    if path is None or not path.is_file():
        return {}
    try:
        return _read(path)
    except (OSError, ValueError, RecursionError):
        return {}


def _beside(config: Config, name: str) -> Path | None:
    """A path as the file's reader would see it: from the working directory, or from the file's own folder."""
    if not name or "\0" in name or len(name) > 1000:
        return None
    here, there = Path(name).expanduser(), Path(config.file).expanduser().parent / name
    try:
        return here if here.exists() else there if there.exists() else None
    except OSError:
        return None


def _read(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if path.suffix == ".jsonl" and size <= _MOST_BYTES:
        lengths, columns, rows = [], set(), 0
        for record in _lines(path):
            rows += 1
            if rows <= _MOST_ROWS:
                lengths.append(_characters(record := json.loads(record)))
                columns |= set(record) if isinstance(record, dict) else set()
        return {"rows": rows, "rows_are_all": True, "characters": tuple(lengths), "columns": frozenset(columns)}
    if path.suffix == ".json" and size <= _JSON_BYTES:
        records = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(records, list):
            some = records[:_MOST_ROWS]
            columns = {key for record in some if isinstance(record, dict) for key in record}
            lengths = [_characters(record) for record in some]
            found = {"rows": len(records), "rows_are_all": True, "characters": tuple(lengths)}
            return found | {"columns": frozenset(columns)}
    return {}


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield line


def _characters(record: Any) -> int:
    """Characters of all texts in a row: what its tokens must at least cover."""
    if isinstance(record, str):
        return len(record)
    if isinstance(record, dict):
        return sum(_characters(value) for key, value in record.items() if key not in ("role", "from", "id"))
    if isinstance(record, list):
        return sum(_characters(value) for value in record)
    return 0
