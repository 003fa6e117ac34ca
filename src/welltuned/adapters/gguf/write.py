"""A folder of safetensors, or an adapter, as one GGUF file; a tensor at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from welltuned.adapters.files import AdapterFile, pair
from welltuned.adapters.gguf.families import (
    USE_INSTEAD,
    Family,
    arranged,
    describe,
    family_of,
    interleaved,
    rope_factors,
)
from welltuned.adapters.gguf.vocabulary import describe_vocabulary, vocabulary_of
from welltuned.adapters.merge_stream import Stored, stored, weight_files
from welltuned.errors import InputError

_BLOCK = 32  # numbers of a row that Q8_0 stores with one scale
_HALF_MAX = 65_504.0


class Quantization(StrEnum):
    """The number format of matrices; norms and biases are always float32."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"


@dataclass(frozen=True, slots=True)
class Written:
    """What a file holds; `wider`: matrices whose rows Q8_0 cannot divide into blocks, kept in F16."""

    path: Path
    tensors: int
    splitting: str
    wider: tuple[str, ...]


def require_exportable(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what cannot become a GGUF file, before anything large is read."""
    family_of(config)
    vocabulary_of(tokenizer, config.to_dict()["vocab_size"])


def write_model(
    folder: Path,
    out: Path,
    *,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    kind: Quantization,
    name: str,
) -> Written:
    """Write the model that lies in `folder` as safetensors.

    Raises:
        InputError: an unknown architecture or tokenizer, or a tensor without a place.
    """
    import gguf

    family = family_of(config)
    vocabulary = vocabulary_of(tokenizer, config.to_dict()["vocab_size"])
    files = weight_files(str(folder))
    assert files is not None
    place = places(family, config)
    entries = [(place(one.name), one) for one in stored(files) if not _is_tied_head(one.name, config)]
    writer = gguf.GGUFWriter(out, family.arch)
    writer.add_name(name)
    writer.add_file_type(_file_type(kind))
    describe(writer, family, config)
    describe_vocabulary(writer, vocabulary, tokenizer, template)
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    wider = []
    for target, one in entries:
        stored_as = _stored_as(one.shape, kind)
        if kind is Quantization.Q8_0 and len(one.shape) > 1 and stored_as is not Quantization.Q8_0:
            wider.append(one.name)
        array_shape, array_type, size, raw = _layout(one.shape, stored_as)
        writer.add_tensor_info(target, array_shape, array_type, size, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for _, one in entries:
        tensor = arranged(one.name, _read(one), family, config)
        writer.write_tensor_data(_encoded(one.name, tensor, _stored_as(one.shape, kind)))
    writer.close()
    return Written(out, len(entries) + (factors is not None), vocabulary.pre, tuple(wider))


def write_lora(adapter: AdapterFile, out: Path, *, config: PretrainedConfig, name: str) -> Written:
    """Write an adapter for `llama.cpp --lora`: factors in float32, with the alpha that gives their scale.

    llama.cpp scales by alpha / r whatever use_rslora says, so that alpha is written as scale times r.
    """
    import gguf

    family = family_of(config)
    if adapter.others:
        what = f"the adapter trained {adapter.others[0]}, for which LoRA files have no place"
        raise InputError(what, where=str(adapter.folder), mend="export --to gguf")
    pairs = {module.removeprefix("base_model.model."): pair(adapter, module) for module in adapter.modules}
    if any(p.a_ERI.shape[0] > 1 for p in pairs.values()):
        raise InputError("adapters on experts are not exported as LoRA files", mend="export --to merged")
    alphas = {round(p.scale * p.a_ERI.shape[1], 6) for p in pairs.values()}
    if len(alphas) > 1:
        raise InputError("the adapter has several alphas, and a LoRA file holds one", mend="export --to gguf")
    writer = gguf.GGUFWriter(out, family.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alphas.pop())
    place, plain = places(family, config), config.to_dict()
    for module, factors in sorted(pairs.items()):
        target = place(f"{module}.weight")
        b_OR = factors.b_EOR[0]
        for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if family.permuted and module.endswith(f".{projection}"):
                b_OR = interleaved(b_OR.contiguous(), plain[heads])
        writer.add_tensor(f"{target}.lora_a", factors.a_ERI[0].contiguous().numpy())
        writer.add_tensor(f"{target}.lora_b", b_OR.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Written(out, 2 * len(pairs), "", ())


def places(family: Family, config: PretrainedConfig) -> Callable[[str], str]:
    """A function from transformers' name of a tensor to llama.cpp's."""
    import gguf

    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.arch)
    names = gguf.get_tensor_name_map(arch, config.to_dict()["num_hidden_layers"])

    def place(name: str) -> str:
        found: str | None = names.get_name(key=name, try_suffixes=(".weight", ".bias"))
        if found is None:
            what = f"the tensor {name} has no place in a GGUF file of {family.arch}"
            raise InputError(what, where="--to gguf", mend=USE_INSTEAD)
        return found

    return place


def _is_tied_head(name: str, config: PretrainedConfig) -> bool:
    return name == "lm_head.weight" and bool(config.to_dict().get("tie_word_embeddings"))


def _file_type(kind: Quantization) -> Any:
    import gguf

    types = gguf.LlamaFileType
    return {
        Quantization.F32: types.ALL_F32,
        Quantization.F16: types.MOSTLY_F16,
        Quantization.BF16: types.MOSTLY_BF16,
        Quantization.Q8_0: types.MOSTLY_Q8_0,
    }[kind]


def _stored_as(shape: tuple[int, ...], kind: Quantization) -> Quantization:
    if len(shape) < 2:
        return Quantization.F32
    return Quantization.F16 if kind is Quantization.Q8_0 and shape[-1] % _BLOCK else kind


def _layout(shape: tuple[int, ...], kind: Quantization) -> tuple[tuple[int, ...], Any, int, Any]:
    """(shape and type of the array that will be written, its bytes, gguf's own type where numpy has none)."""
    import gguf

    if kind in (Quantization.F32, Quantization.F16):
        dtype = np.dtype(np.float32 if kind is Quantization.F32 else np.float16)
        return shape, dtype, int(np.prod(shape)) * dtype.itemsize, None
    raw = gguf.GGMLQuantizationType.BF16 if kind is Quantization.BF16 else gguf.GGMLQuantizationType.Q8_0
    as_bytes = gguf.quant_shape_to_byte_shape(shape, raw)
    return as_bytes, np.dtype(np.uint8), int(np.prod(as_bytes)), raw


def _encoded(name: str, tensor: Tensor, kind: Quantization) -> np.ndarray:
    import gguf

    values = tensor.float().contiguous().numpy()
    if kind is Quantization.F32:
        return values
    if kind is Quantization.F16:
        if float(np.abs(values).max()) > _HALF_MAX:
            raise InputError(f"{name} holds numbers beyond float16's range", where="--quantize", mend="use bf16")
        return values.astype(np.float16)
    raw = gguf.GGMLQuantizationType.BF16 if kind is Quantization.BF16 else gguf.GGMLQuantizationType.Q8_0
    encoded: np.ndarray = gguf.quants.quantize(values, raw)
    return encoded


def _read(one: Stored) -> Tensor:
    with safe_open(one.file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(one.name)
    return tensor if tensor.is_floating_point() else tensor.to(torch.float32)
