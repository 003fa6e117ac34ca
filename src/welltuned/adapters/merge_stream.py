"""Merging from file to file: one weight at a time, in shards of at most 2 GB."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from welltuned.adapters.files import AdapterFile, Pair
from welltuned.errors import InputError
from welltuned.kernels.nf4 import NF4Weight
from welltuned.models.experts import expert_stacks
from welltuned.models.frozen import quantisable
from welltuned.models.resolve import SourceKind, resolve

SHARD = 2_000_000_000  # bytes of a file that is written
_SAFETENSORS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file."""

    name: str
    file: Path
    shape: tuple[int, ...]
    floating: bool


def weight_files(base: str) -> list[Path] | None:
    """The safetensors files of a model; None for a GGUF file."""
    source = resolve(base)
    if source.kind is SourceKind.GGUF:
        return None
    folder = source.path if source.path is not None else _downloaded(source.name)
    index = folder / f"{_SAFETENSORS}.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / name for name in names]
    single = folder / _SAFETENSORS
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))


def stored(files: Sequence[Path]) -> list[Stored]:
    """What the files hold, by their headers."""
    found = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                found.append(Stored(name, path, tuple(part.get_shape()), part.get_dtype() in _FLOATS))
    return found


_FLOATS = ("F64", "F32", "F16", "BF16")


def can_stream(base: str, skeleton: PreTrainedModel, pairs: Mapping[str, Pair], adapter: AdapterFile) -> bool:
    """Whether the files name their weights as the model does: all adapted layers, and nothing that it does not know."""
    files = weight_files(base)
    if files is None or adapter.others or expert_stacks(skeleton):
        return False
    shapes = {name: tuple(p.shape) for name, p in skeleton.state_dict().items()}
    there = {one.name: one.shape for one in stored(files)}
    if any(shapes.get(name) != shape for name, shape in there.items()):
        return False
    needed = [f"{name}.weight" for name in (*pairs, *quantisable(skeleton))]
    linear = [isinstance(skeleton.get_submodule(name), torch.nn.Linear) for name in pairs]
    return all(linear) and all(name in there for name in needed)


def merge_stream(
    base: str,
    skeleton: PreTrainedModel,
    pairs: Mapping[str, Pair],
    folder: Path,
    *,
    dtype: torch.dtype,
    requantise: torch.dtype | None,
) -> None:
    """Write the base with the adapter added, and its configuration.

    Args:
        requantise: the base was trained in 4 bits: weights become what they were then, from this format and back.
    """
    files = weight_files(base)
    assert files is not None
    quantised = {f"{name}.weight" for name in quantisable(skeleton)} if requantise is not None else set()
    plan = list(_shards(stored(files), dtype))
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(plan, start=1):
        name = _SAFETENSORS if len(plan) == 1 else f"model-{number:05}-of-{len(plan):05}.safetensors"
        tensors = {}
        for one in shard:
            value = _read(one)
            if one.name in quantised:
                assert requantise is not None
                value = NF4Weight.quantize(value.to(requantise)).dense(requantise)
            pair = pairs.get(one.name.removesuffix(".weight"))
            if pair is not None:
                value = value.float() + delta(pair)[0]
            tensors[one.name] = value.to(dtype).contiguous() if one.floating else value
            total += tensors[one.name].nbytes
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{_SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _copy_configuration(files[0].parent, folder, dtype)


def delta(pair: Pair) -> Tensor:
    """s B A [E, O, I] in float32: what is added to the weights."""
    return pair.scale * (pair.b_EOR @ pair.a_ERI)


def _read(one: Stored) -> Tensor:
    with safe_open(one.file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(one.name)
    return tensor


def _shards(tensors: Sequence[Stored], dtype: torch.dtype) -> Iterator[list[Stored]]:
    shard: list[Stored] = []
    size = 0
    for one in tensors:
        bytes_ = torch.Size(one.shape).numel() * (dtype.itemsize if one.floating else 8)
        if shard and size + bytes_ > SHARD:
            yield shard
            shard, size = [], 0
        shard.append(one)
        size += bytes_
    if shard:
        yield shard


def _copy_configuration(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """config.json with the new number format, and generation_config.json as it is."""
    path = source / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"config.json cannot be read ({error})", where=str(path)) from error
    name = str(dtype).removeprefix("torch.")
    config |= dict.fromkeys([key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"], name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = source / "generation_config.json"
    if generation.is_file():
        (folder / generation.name).write_bytes(generation.read_bytes())
