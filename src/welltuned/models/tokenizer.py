"""The tokenizer of a model, without torch where its kind is plain from the files: planning needs no more.

AutoTokenizer decides by the configuration which class reads a tokenizer, and brings torch with it (3 s). For families
of which that decision is known it is made here. For the rest, and for a tokenizer inside a GGUF file (6 s to convert),
what AutoTokenizer made is kept beside the cached tokens.
"""

import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from welltuned.errors import InputError
from welltuned.models.memo import digest, file_digest, memo_folder, recall, remember, versions
from welltuned.models.resolve import ModelSource, SourceKind, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Whatever transformers raises while it reads a model's files (nearly every type of exception, by which field of
# config.json is wrong) is about those files: hence the `except Exception` here and in `load`. --debug shows it.
MEND_HUB = "check the id and the network, or give a local folder or GGUF file"
# Families for which AutoTokenizer takes the class that tokenizer_config.json names (tests/models/test_tokenizer.py).
_PLAIN_FAMILIES = frozenset({"llama", "qwen3", "qwen3_moe", "smollm3", "gpt_oss"})
_PLAIN_CLASSES = {
    "TokenizersBackend": "PreTrainedTokenizerFast",
    "PreTrainedTokenizerFast": "PreTrainedTokenizerFast",
    "Qwen2Tokenizer": "Qwen2Tokenizer",
    "Qwen2TokenizerFast": "Qwen2Tokenizer",
    "GPT2Tokenizer": "GPT2Tokenizer",
    "GPT2TokenizerFast": "GPT2Tokenizer",
}
_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(model: str) -> "PreTrainedTokenizerBase":
    """The tokenizer that belongs to a model: a hub id, a folder, a GGUF file or the demo's alias."""
    source = resolve(model, weights_needed=False)
    try:
        if source.kind is SourceKind.HUB or source.path is None:
            return _auto(source)
        return _of_gguf(source, source.path) if source.kind is SourceKind.GGUF else _of_folder(source, source.path)
    except Exception as error:
        raise InputError(f"no tokenizer could be loaded ({in_short(error)})", where=model, mend=MEND_HUB) from error


def arguments_of(source: ModelSource) -> dict[str, Any]:
    """What transformers' from_pretrained takes for a source."""
    if source.kind is SourceKind.GGUF:
        assert source.path is not None
        return {"pretrained_model_name_or_path": str(source.path.parent), "gguf_file": source.path.name}
    name = source.name if source.path is None else str(source.path)
    return {"pretrained_model_name_or_path": name, "trust_remote_code": False}  # unset, transformers asks on stdin


def in_short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def _auto(source: ModelSource) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**arguments_of(source))
    return tokenizer


def _of_folder(source: ModelSource, folder: Path) -> "PreTrainedTokenizerBase":
    import transformers

    parts = {"files": {name: file_digest(folder / name) for name in _FILES}, **versions()}
    name = plain_class(folder) or recall("tokenizer", parts)
    if name is not None:
        tokenizer: PreTrainedTokenizerBase = getattr(transformers, name).from_pretrained(str(folder))
        return tokenizer
    tokenizer = _auto(source)
    if type(tokenizer).__name__ in dir(transformers):
        remember("tokenizer", parts, type(tokenizer).__name__)
    return tokenizer


def _of_gguf(source: ModelSource, file: Path) -> "PreTrainedTokenizerBase":
    """Converted once and kept as a folder; used only if it reads back as the same tokenizer."""
    from transformers import PreTrainedTokenizerFast

    stat = file.stat()
    key = digest({"path": str(file.resolve()), "size": stat.st_size, "changed": stat.st_mtime_ns, **versions()})
    kept = memo_folder() / f"tokenizer-{key}"
    if kept.is_dir():
        with suppress(OSError, ValueError):
            again: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(str(kept))
            return again
    tokenizer = _auto(source)
    return _keep(tokenizer, kept) if isinstance(tokenizer, PreTrainedTokenizerFast) else tokenizer


def _keep(tokenizer: "PreTrainedTokenizerFast", place: Path) -> "PreTrainedTokenizerBase":
    """What later calls will read, so that the first one works with the very same."""
    from transformers import PreTrainedTokenizerFast

    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".") as beside:
            tokenizer.save_pretrained(beside)
            again = PreTrainedTokenizerFast.from_pretrained(beside)
            alike = again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
            if alike and again.special_tokens_map == tokenizer.special_tokens_map:
                shutil.copytree(beside, f"{beside}-whole")
                Path(f"{beside}-whole").rename(place)
                return again
    return tokenizer


def plain_class(folder: Path) -> str | None:
    """The class that AutoTokenizer would take, where that is plain from the files; None where it is not."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        chosen = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        family, name = config.get("model_type"), chosen.get("tokenizer_class")
        whole = (folder / "tokenizer.json").is_file() and "auto_map" not in chosen and "auto_map" not in config
    except (OSError, ValueError, AttributeError):
        return None
    known = isinstance(family, str) and family in _PLAIN_FAMILIES and isinstance(name, str)
    return _PLAIN_CLASSES.get(name) if known and whole else None
