"""Names and shapes of stored tensors, read from the headers alone: safetensors and GGUF. No weight is touched.

The GGUF header is read here and not by the `gguf` package, whose reader also parses every token of the vocabulary
(1.8 s for SmolLM2's 49,152); a plan needs shapes and a handful of fields.
"""

import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from welltuned.errors import InputError
from welltuned.models.resolve import WEIGHTS_INDEX, weight_files
from welltuned.models.safetensors_header import read_header

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LONGEST_KEPT_ARRAY = 1024  # longer ones are vocabularies
_MOST_ENTRIES = 1_000_000  # a larger count in a header means a corrupt file
_GGML_TYPES = {0: "float32", 1: "float16", 30: "bfloat16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0"}
_GGML_TYPES |= {10: "q2_k", 11: "q3_k", 12: "q4_k", 13: "q5_k", 14: "q6_k", 15: "q8_k"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """`shape` is torch's: (out, in) for a linear layer."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    fields: dict[str, Any]
    tensors: tuple[StoredTensor, ...]


def safetensors_headers(folder: Path) -> tuple[StoredTensor, ...]:
    """Every tensor of the folder's safetensors files; () where there are none."""
    if (folder / WEIGHTS_INDEX).is_file():
        files = sorted(weight_files(folder))
    else:
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    return tuple(tensor for file in files for tensor in _safetensors_header(file))


def _safetensors_header(path: Path) -> list[StoredTensor]:
    if not path.is_file():
        raise InputError("a weight file is missing", where=str(path), mend="download the model folder again")
    return [StoredTensor(name, shape, dtype) for name, (dtype, shape) in read_header(path).items()]


def gguf_header(path: Path) -> GgufHeader:
    """The fields (long arrays as their length) and the tensors of a GGUF file, version 2 or 3."""
    corrupt = InputError("the GGUF file is corrupt or cut short", where=str(path), mend="download it again")
    try:
        with path.open("rb") as file:
            magic, version, tensor_count, field_count = struct.unpack("<4sIQQ", _exactly(file, 24))
            if magic != b"GGUF" or version not in (2, 3):
                mend = "GGUF versions 2 and 3 are read"
                raise InputError(f"not a GGUF file that can be read (version {version})", where=str(path), mend=mend)
            if tensor_count > _MOST_ENTRIES or field_count > _MOST_ENTRIES:
                raise corrupt
            fields = {_string(file): _field(file) for _ in range(field_count)}
            entries = [_gguf_tensor(file) for _ in range(tensor_count)]
            if file.tell() + max((offset for _, offset in entries), default=0) >= path.stat().st_size:
                raise corrupt
            return GgufHeader(fields, tuple(tensor for tensor, _ in entries))
    except (struct.error, UnicodeDecodeError, EOFError, KeyError, OverflowError, RecursionError) as error:
        raise corrupt from error


def _exactly(file: BinaryIO, count: int) -> bytes:
    if count > os.fstat(file.fileno()).st_size - file.tell():  # before so much memory is asked for
        raise EOFError(count)
    return file.read(count)


def _string(file: BinaryIO) -> str:
    length = struct.unpack("<Q", _exactly(file, 8))[0]
    return _exactly(file, length).decode("utf-8")


def _field(file: BinaryIO) -> Any:
    return _field_value(file, struct.unpack("<I", _exactly(file, 4))[0])


def _field_value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        code = "<" + _SCALARS[kind]
        return struct.unpack(code, _exactly(file, struct.calcsize(code)))[0]
    kind, length = struct.unpack("<IQ", _exactly(file, 12))
    if length <= _LONGEST_KEPT_ARRAY:
        return [_field_value(file, kind) for _ in range(length)]
    if kind == _STRING:
        for _ in range(length):
            _exactly(file, struct.unpack("<Q", _exactly(file, 8))[0])
    else:
        _exactly(file, length * struct.calcsize("<" + _SCALARS[kind]))
    return length


def _gguf_tensor(file: BinaryIO) -> tuple[StoredTensor, int]:
    name = _string(file)
    dimensions = struct.unpack("<I", _exactly(file, 4))[0]
    shape = struct.unpack(f"<{dimensions}Q", _exactly(file, 8 * dimensions))
    kind, offset = struct.unpack("<IQ", _exactly(file, 12))
    return StoredTensor(name, tuple(reversed(shape)), _GGML_TYPES.get(kind, f"ggml{kind}")), offset


# ── GGUF's words for what config.json says ───────────────────────────────────────────────────────────────────────────

_ARCHITECTURES = {"phi3": "phi3", "gemma3": "gemma3_text", "gptneox": "gpt_neox", "qwen2moe": "qwen2_moe"}
_ARCHITECTURES |= {"qwen3moe": "qwen3_moe"}
_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}


def gguf_config(header: GgufHeader, path: Path) -> dict[str, Any]:
    """The header's fields under config.json's names, so that one counting rule serves both."""
    architecture = header.fields.get("general.architecture")
    if not isinstance(architecture, str):
        raise InputError("the GGUF file names no architecture", where=str(path), mend="it is not a language model")
    config: dict[str, Any] = {"model_type": _ARCHITECTURES.get(architecture, architecture)}
    for theirs, ours in _KEYS.items():
        value = header.fields.get(f"{architecture}.{theirs}")
        if isinstance(value, list):  # one entry a layer in a few files
            value = max(value, default=None)
        if value is not None:
            config[ours] = value
    names = {tensor.name: tensor for tensor in header.tensors}
    if config["model_type"] == "llama" and config.get("num_experts"):  # GGUF files Mixtral under "llama"
        config |= {"model_type": "mixtral", "num_local_experts": config.pop("num_experts")}
    embedding = names.get("token_embd.weight")
    if embedding is None:
        raise InputError("the GGUF file has no token embedding", where=str(path), mend="it is not a whole model")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in names
    kinds = [tensor.dtype for tensor in header.tensors if re.search(r"ffn_(up|down)", tensor.name)]
    config["dtype"] = max(set(kinds), key=kinds.count) if kinds else embedding.dtype
    return config
