"""What a run is of: recipe, plan, data, base model and tokenizer, to be compared when it goes on."""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import welltuned
from welltuned.advice.codec import to_plain
from welltuned.advice.plan import Plan
from welltuned.data.cache import tokenizer_digest
from welltuned.data.rows import Rows
from welltuned.facts.machine import launch
from welltuned.models.resolve import ModelSource, SourceKind, resolve
from welltuned.recipe import recipe_to_dict
from welltuned.training.prepare import Prepared

WHOLE = 2**30  # bytes of weights up to which all are read (about a second); of more only pieces, spread evenly
PIECE, PIECES = 2**16, 1024
PROCESSES = "processes"


def identity_of(prepared: Prepared) -> dict[str, Any]:
    """All that decides what the run computes, as plain values and digests."""
    found = {
        "recipe": to_plain(recipe_to_dict(prepared.recipe)),
        "plan": chosen(prepared.plan),
        "data": {**prepared.data_digests, "training rows": _rows(prepared.train), "held out": _rows(prepared.held_out)},
        "base": base_digest(prepared.recipe.model),
        "tokenizer": tokenizer_digest(prepared.tokenizer),
        "chat_template": None if prepared.chat_template is None else _short(prepared.chat_template.encode()),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))  # as it will be read back: lists, text keys
    return plain


def chosen(plan: Plan) -> dict[str, Any]:
    """The plan's values."""
    return {"updates": plan.updates, **{name: to_plain(choice.value) for name, choice in plan.choices.items()}}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A sentence on each part that is not what it was."""
    found = []
    for part in ("recipe", "plan"):
        old, new = then[part], now[part]
        for key in dict.fromkeys((*old, *new)):
            if old.get(key) != new.get(key):
                found.append(f"{part}: {key} was {_shown(old.get(key))} and is {_shown(new.get(key))}")
    for name in dict.fromkeys((*then["data"], *now["data"])):
        if then["data"].get(name) != now["data"].get(name):
            found.append(f"data: {name} changed")
    for part, words in (("base", "base model"), ("tokenizer", "tokenizer"), ("chat_template", "chat template")):
        if then[part] != now[part]:
            found.append(f"the {words} changed")
    return found


def versions() -> dict[str, Any]:
    """What bits depend on beside the run itself: libraries, threads, the processor's instructions."""
    return {
        "welltuned": welltuned.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
        "threads": torch.get_num_threads(),
        PROCESSES: launch().size,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def _short(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _rows(rows: Any) -> str:
    """Their number, and where they are tokenised rows a digest of their tokens and of what is trained of them."""
    if not isinstance(rows, Rows) or not len(rows):
        return f"{len(rows)} rows"
    digest = hashlib.blake2b(digest_size=16)
    for name in ("digest", "trained", "first", "last"):
        digest.update(np.ascontiguousarray(rows.column(name)).tobytes())
    return f"{len(rows)} rows {digest.hexdigest()}"


def base_digest(model: str) -> str:
    """Of a model's configuration and weights as they lie on disk; of a hub model its commit.

    More than 1 GiB of weights is not read in full: another training changes nearly all of a model's bytes, so 1,024
    pieces of 64 KiB in each file, with its size, tell models apart.
    """
    source = resolve(model)
    if source.kind is SourceKind.HUB:
        return _commit(source)
    assert source.path is not None
    files = [source.path]
    if source.path.is_dir():
        files = sorted([*source.path.glob("*.safetensors"), source.path / "config.json"])
    digest, whole = hashlib.blake2b(digest_size=16), sum(file.stat().st_size for file in files) <= WHOLE
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode("utf-8", "surrogateescape"))
        for piece in _pieces(file, whole):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(file: Path, whole: bool) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as handle:
        if whole or size <= PIECE * PIECES:
            yield from iter(partial(handle.read, 2**22), b"")
            return
        for number in range(PIECES):
            handle.seek((size - PIECE) * number // (PIECES - 1))
            yield handle.read(PIECE)


def _commit(source: ModelSource) -> str:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.name, "config.json")
    return f"commit {Path(found).parent.name}" if isinstance(found, str) else f"hub {source.name}"
