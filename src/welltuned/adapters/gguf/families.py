"""What llama.cpp must know of a model: its words for the configuration, and how it wants the weights to lie."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from welltuned.errors import InputError

USE_INSTEAD = "export --to merged gives safetensors, which llama.cpp's own converter may read"


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Args:
        arch: llama.cpp's name.
        permuted: rotary halves are interleaved there, so that q's and k's rows change places.
        norm_shift: what is added to the gains of norms (Gemma stores them less one).
        own_head_size: the head's size is always written, since it is not hidden size over heads.
        windowed: layers with a sliding window, whose size is written.
    """

    arch: str
    permuted: bool = False
    norm_shift: float = 0.0
    own_head_size: bool = False
    windowed: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", permuted=True),
    "mistral": Family("llama", permuted=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3", own_head_size=True),
    "gemma2": Family("gemma2", norm_shift=1.0, own_head_size=True, windowed=True),
    "gemma3_text": Family("gemma3", norm_shift=1.0, own_head_size=True, windowed=True),
    "phi3": Family("phi3", windowed=True),
}
_GEMMA3_PATTERN = 6  # llama.cpp takes every sixth layer for one without a window


def family_of(config: PretrainedConfig) -> Family:
    """The family, or InputError where llama.cpp would compute something else.

    Raises:
        InputError: an architecture that is not known here, or a configuration that llama.cpp has no word for.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        what = f"models of type {kind} are not exported to GGUF (known are {', '.join(FAMILIES)})"
        raise InputError(what, where="--to gguf", mend=USE_INSTEAD)
    family, refused = FAMILIES[kind], _not_said(config)
    if refused:
        raise InputError(f"llama.cpp has no word for {refused}", where="--to gguf", mend=USE_INSTEAD)
    return family


def _not_said(config: PretrainedConfig) -> str | None:
    plain, kind = config.to_dict(), config.model_type
    rope = rope_of(config)
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        return f"rotary embeddings of type {rope['rope_type']}"
    if kind != "phi3" and float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        return "partial rotary embeddings in this architecture"
    if kind == "qwen2" and plain.get("use_sliding_window"):
        return "Qwen 2's sliding windows"
    if kind == "qwen3" and plain.get("use_sliding_window"):
        return "Qwen 3's sliding windows"
    if kind in ("gemma2", "gemma3_text"):
        wanted = plain["query_pre_attn_scalar"] or plain["head_dim"]
        if wanted != plain["head_dim"]:
            return f"queries scaled by {wanted}, which is not the head's size"
        full = [i for i, layer in enumerate(plain["layer_types"]) if layer == "full_attention"]
        every = 2 if kind == "gemma2" else _GEMMA3_PATTERN
        if full != list(range(every - 1, plain["num_hidden_layers"], every)):
            return "this order of layers with and without a sliding window"
    return None


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """The rotary embedding's parameters, of the layers without a window."""
    found: dict[str, Any] = dict(config.to_dict().get("rope_parameters") or {})
    inner = found.get("full_attention")
    return dict(inner) if isinstance(inner, Mapping) else found


def describe(writer: Any, family: Family, config: PretrainedConfig) -> None:
    """Write the configuration in llama.cpp's words."""
    plain, rope = config.to_dict(), rope_of(config)
    heads, hidden = plain["num_attention_heads"], plain["hidden_size"]
    size = plain.get("head_dim") or hidden // heads
    writer.add_block_count(plain["num_hidden_layers"])
    writer.add_context_length(plain["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(plain["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(plain["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(plain["rms_norm_eps"])
    writer.add_vocab_size(plain["vocab_size"])
    writer.add_rope_freq_base(float(rope.get("rope_theta") or plain.get("rope_theta") or 10_000.0))
    rotated = round(size * float(rope.get("partial_rotary_factor") or 1.0))
    if family.arch in ("llama", "phi3"):
        writer.add_rope_dimension_count(rotated)
    if family.own_head_size or size != hidden // heads:
        writer.add_key_length(size)
        writer.add_value_length(size)
    _describe_rope(writer, rope)
    if family.arch == "phi3":
        original = plain.get("original_max_position_embeddings") or plain["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
    if family.windowed:
        writer.add_sliding_window(plain.get("sliding_window") or 0)
    local = (plain.get("rope_parameters") or {}).get("sliding_attention")
    if isinstance(local, Mapping):
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    if plain.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(plain["attn_logit_softcapping"])
    if plain.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(plain["final_logit_softcapping"])


def _describe_rope(writer: Any, rope: Mapping[str, Any]) -> None:
    import gguf

    kind = rope.get("rope_type", "default")
    if kind not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        if rope.get("beta_fast") is not None:
            writer.add_rope_scaling_yarn_beta_fast(float(rope["beta_fast"]))
        if rope.get("beta_slow") is not None:
            writer.add_rope_scaling_yarn_beta_slow(float(rope["beta_slow"]))


def rope_factors(config: PretrainedConfig) -> Tensor | None:
    """By what each frequency is divided (Llama 3.1's scaling, as transformers computes it); None for no such thing."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(scaled)
    plain = float(rope["rope_theta"]) ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / scaled.double()).float()


def arranged(name: str, tensor: Tensor, family: Family, config: PretrainedConfig) -> Tensor:
    """A weight as llama.cpp wants it; `name` is transformers'."""
    if family.norm_shift and name.endswith("norm.weight"):
        return tensor.float() + family.norm_shift
    if family.permuted:
        for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if f".{projection}." in name:
                return interleaved(tensor, config.to_dict()[heads])
    return tensor


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head as pairs (0, D/2), (1, D/2 + 1), ...: llama.cpp rotates neighbours, transformers halves."""
    per_head = rows.shape[0] // heads
    index = torch.arange(per_head).view(2, per_head // 2).t().reshape(-1)
    return rows.view(heads, per_head, *rows.shape[1:])[:, index].reshape(rows.shape)
