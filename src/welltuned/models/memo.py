"""Small answers that are costly to find, kept on disk beside the cached tokens: one JSON file an answer.

A file's name is a digest of all that the answer depends on, so nothing here is ever out of date. Whatever cannot be
read or written is found anew, in silence: a memo is a matter of time only.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "WELLTUNED_CACHE"
LIBRARIES = ("torch", "transformers", "tokenizers")


def memo_folder() -> Path:
    named = os.environ.get(FOLDER_VARIABLE)
    return (Path(named).expanduser() if named else Path.home() / ".cache" / "welltuned") / "known"


def remembered(kind: str, parts: Mapping[str, Any], find: Callable[[], Any]) -> Any:
    """What `find` returned for these parts the last time, or returns now. It must be made of JSON's types."""
    known = recall(kind, parts)
    if known is not None:
        return known
    found = find()
    remember(kind, parts, found)
    return found


def recall(kind: str, parts: Mapping[str, Any]) -> Any:
    """The remembered answer; None where there is none."""
    with suppress(OSError, ValueError):
        return json.loads(_place(kind, parts).read_text(encoding="utf-8"))
    return None


def remember(kind: str, parts: Mapping[str, Any], answer: Any) -> None:
    """Write beside the place and rename, so that a reader sees the whole answer or none."""
    place = _place(kind, parts)
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=place.parent, prefix=".")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(answer, file)
        os.replace(beside, place)


def _place(kind: str, parts: Mapping[str, Any]) -> Path:
    return memo_folder() / f"{kind}-{digest(parts)}.json"


def digest(parts: Mapping[str, Any]) -> str:
    """Names whatever depends on these parts."""
    text = json.dumps(dict(parts), sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=16).hexdigest()


@lru_cache(maxsize=1)
def versions() -> Mapping[str, str]:
    """The libraries that answers about a model depend on, and this room's own code."""
    found: dict[str, str] = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    code = blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    return {**found, "code": code.hexdigest()}


def file_digest(path: Path) -> str | None:
    """Of a small file's content; None where there is none."""
    try:
        return blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return None
