"""Counts a model's parameters and linear layers from its configuration, without loading it.

One table says how each family departs from Llama's layer (q, k, v, o and a gated MLP, two norms). A family that is not
in the table is counted as Llama's and marked inexact; where weights are at hand, their headers decide (weights.py).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from welltuned.errors import InputError
from welltuned.facts.weights import StoredTensor
from welltuned.recipe import ALL_LINEAR

EXPERTS = "experts"
"""The name that target_modules has for all experts of a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShape:
    """A linear layer, by the last part of its module name. `count` is how many the whole model has.

    `expert` layers are stored by transformers 5 in three-dimensional parameters ("experts.gate_up_proj" and
    "experts.down_proj"), not as modules: all-linear does not reach them, "experts" does. `active` says how many of
    `count` one token passes through.
    """

    name: str
    inputs: int
    outputs: int
    count: int
    active: int
    bias: bool = False
    expert: bool = False

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs * self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What configuration alone tells. `intermediate_size` is the width that one token passes through."""

    family: str
    exact: bool
    parameters: int
    active_parameters: int
    linears: tuple[LinearShape, ...]
    hidden_size: int
    layers: int
    vocabulary: int
    tied_head: bool
    attention_width: int
    key_value_width: int
    intermediate_size: int
    gated_mlp: bool
    experts: int
    active_experts: int
    context_length: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """How a family departs from Llama. `None` for a bias means that the configuration's own switch decides."""

    norms: int = 2
    qk_norm: str = ""  # "head": one weight a head dimension; "full": one a feature
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    joint: bool = False  # q, k, v in one layer; gate and up in one layer
    sinks: bool = False  # one a head
    expert_bias: bool = False  # in experts and routers
    tied: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_GEMMA3 = MappingProxyType(
    {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
    }
)
"""Gemma 3's text configurations leave out what equals the class's defaults."""

_FAMILIES: Mapping[str, _Family] = MappingProxyType(
    {
        "llama": _Family(),
        "mistral": _Family(qkv_bias=False, out_bias=False),
        "ministral": _Family(qkv_bias=False, out_bias=False),
        "qwen2": _Family(qkv_bias=True, out_bias=False),
        "qwen3": _Family(qk_norm="head", defaults={"head_dim": 128}),
        "gemma": _Family(tied=True, defaults={"head_dim": 256}),
        "gemma2": _Family(norms=4, tied=True, defaults={"head_dim": 256}),
        "gemma3_text": _Family(norms=4, qk_norm="head", tied=True, defaults=_GEMMA3),
        "phi3": _Family(joint=True, qkv_bias=False, out_bias=False),
        "olmo2": _Family(qk_norm="full"),
        "olmo3": _Family(qk_norm="full"),
        "granite": _Family(),
        "smollm3": _Family(tied=True),
        "mixtral": _Family(qkv_bias=False, out_bias=False),
        "qwen2_moe": _Family(qkv_bias=True, out_bias=False),
        "qwen3_moe": _Family(qk_norm="head"),
        "olmoe": _Family(qk_norm="full"),
        "gpt_oss": _Family(qkv_bias=True, out_bias=True, sinks=True, expert_bias=True),
    }
)


def is_meant(shape: LinearShape, target: str) -> bool:
    """Whether a name in target_modules stands for this layer, by the last parts of both names."""
    module, _, leaf = target.rpartition(".")
    if leaf == EXPERTS:
        return shape.expert
    if module.rpartition(".")[2] == EXPERTS:
        return shape.expert and (shape.name == "down_proj") == (leaf == "down_proj")
    return not shape.expert and (target == ALL_LINEAR or leaf == shape.name)


def architecture_from_config(config: Mapping[str, Any], where: str) -> Architecture:
    """Count from a configuration (config.json's keys). A multimodal one is counted by its language part."""
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = {**text, "model_type": text.get("model_type", config.get("model_type", ""))}
    family = str(config.get("model_type", ""))
    if family in {"gpt2", "gpt_neox"}:
        return _plain_mlp_architecture(family, config, where)
    return _gated_architecture(family, config, where)


def _need(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        what = f"the model's configuration says nothing usable for {key} ({value})"
        raise InputError(what, where=where, mend="give the configuration of a causal language model")
    return value


def _context(config: Mapping[str, Any], where: str) -> int | None:
    """Positions that the model was trained on; None where the configuration does not say."""
    key = "max_position_embeddings"
    return None if config.get(key) is None else _need(config, key, where)


def _gated_architecture(family: str, config: Mapping[str, Any], where: str) -> Architecture:
    spec = _FAMILIES.get(family, _Family())
    config = {**spec.defaults, **{key: value for key, value in config.items() if value is not None}}
    hidden, layers = _need(config, "hidden_size", where), _need(config, "num_hidden_layers", where)
    heads, vocabulary = _need(config, "num_attention_heads", where), _need(config, "vocab_size", where)
    head_dim = _need({"head_dim": hidden // heads, **config}, "head_dim", where)
    groups = _need({"num_key_value_heads": heads, **config}, "num_key_value_heads", where)
    q_width, kv_width = heads * head_dim, groups * head_dim
    switch = bool(config.get("attention_bias", False))
    qkv_bias = switch if spec.qkv_bias is None else spec.qkv_bias
    out_bias = switch if spec.out_bias is None else spec.out_bias
    attention = _attention(spec.joint, hidden, q_width, kv_width, layers, qkv_bias, out_bias)
    mlp, routers, width = _mlp(spec, config, hidden, layers, where)
    linears = (*attention, *mlp)
    qk_norm = {"head": 2 * head_dim, "full": q_width + kv_width, "": 0}[spec.qk_norm]
    tied = bool(config.get("tie_word_embeddings", spec.tied))
    rest = layers * (spec.norms * hidden + qk_norm + heads * spec.sinks) + hidden + routers
    rest += vocabulary * hidden * (1 if tied else 2)
    experts, active = _expert_counts(config)
    return Architecture(
        family=family,
        exact=family in _FAMILIES,
        parameters=_total(linears) + rest,
        active_parameters=_total(linears, active_only=True) + rest,
        linears=linears,
        hidden_size=hidden,
        layers=layers,
        vocabulary=vocabulary,
        tied_head=tied,
        attention_width=q_width,
        key_value_width=kv_width,
        intermediate_size=width,
        gated_mlp=True,
        experts=experts,
        active_experts=active,
        context_length=_context(config, where),
    )


def _attention(
    joint: bool, hidden: int, q: int, kv: int, layers: int, qkv_bias: bool, out_bias: bool
) -> list[LinearShape]:
    shapes = [("qkv_proj", q + 2 * kv)] if joint else [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]
    linears = [_linear(name, hidden, width, layers, bias=qkv_bias) for name, width in shapes]
    return [*linears, _linear("o_proj", q, hidden, layers, bias=out_bias)]


def _mlp(
    spec: _Family, config: Mapping[str, Any], hidden: int, layers: int, where: str
) -> tuple[list[LinearShape], int, int]:
    """The MLP's linears, the routers' parameters, and the width that one token passes through."""
    bias = bool(config.get("mlp_bias", False))
    experts, active = _expert_counts(config)
    if not experts:
        width = _need(config, "intermediate_size", where)
        if spec.joint:
            pair = [_linear("gate_up_proj", hidden, 2 * width, layers), _linear("down_proj", width, hidden, layers)]
            return pair, 0, width
        return _gated(hidden, width, layers, bias), 0, width
    dense_only = {int(layer) for layer in config.get("mlp_only_layers") or []}
    step = int(config.get("decoder_sparse_step") or 1)
    sparse = sum(1 for layer in range(layers) if layer not in dense_only and (layer + 1) % step == 0)
    width = int(config.get("moe_intermediate_size") or _need(config, "intermediate_size", where))
    linears = _gated(hidden, width, sparse * experts, spec.expert_bias, active=sparse * active, expert=True)
    width *= active
    routers = sparse * (hidden + spec.expert_bias) * experts
    if layers > sparse:
        linears += _gated(hidden, _need(config, "intermediate_size", where), layers - sparse, bias)
    if shared := int(config.get("shared_expert_intermediate_size") or 0):
        linears += [*_gated(hidden, shared, sparse, False), _linear("shared_expert_gate", hidden, 1, sparse)]
        width += shared
    return linears, routers, width


def _expert_counts(config: Mapping[str, Any]) -> tuple[int, int]:
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)
    return experts, int(config.get("num_experts_per_tok") or 0) if experts else 0


def _gated(
    hidden: int, width: int, count: int, bias: bool, active: int | None = None, expert: bool = False
) -> list[LinearShape]:
    shapes = [("gate_proj", hidden, width), ("up_proj", hidden, width), ("down_proj", width, hidden)]
    return [_linear(name, i, o, count, bias=bias, active=active, expert=expert) for name, i, o in shapes]


def _linear(
    name: str,
    inputs: int,
    outputs: int,
    count: int,
    *,
    bias: bool = False,
    active: int | None = None,
    expert: bool = False,
) -> LinearShape:
    return LinearShape(
        name=name,
        inputs=inputs,
        outputs=outputs,
        count=count,
        active=count if active is None else active,
        bias=bias,
        expert=expert,
    )


def _total(linears: Iterable[LinearShape], active_only: bool = False) -> int:
    return sum((s.inputs + bool(s.bias)) * s.outputs * (s.active if active_only else s.count) for s in linears)


def _plain_mlp_architecture(family: str, config: Mapping[str, Any], where: str) -> Architecture:
    """GPT-2 and GPT-NeoX: joint q, k, v, an MLP without a gate, LayerNorms with a bias."""
    gpt2 = family == "gpt2"
    hidden = _need(config, "n_embd" if gpt2 else "hidden_size", where)
    layers = _need(config, "n_layer" if gpt2 else "num_hidden_layers", where)
    vocabulary = _need(config, "vocab_size", where)
    positions = int(config.get("n_positions") or config.get("max_position_embeddings") or 0)
    width = int((config.get("n_inner") if gpt2 else config.get("intermediate_size")) or 4 * hidden)
    names = (
        ("c_attn", "c_proj", "c_fc", "c_proj")
        if gpt2
        else ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    )
    attention_bias = gpt2 or bool(config.get("attention_bias", True))
    linears = (
        _linear(names[0], hidden, 3 * hidden, layers, bias=attention_bias),
        _linear(names[1], hidden, hidden, layers, bias=attention_bias),
        _linear(names[2], hidden, width, layers, bias=True),
        _linear(names[3], width, hidden, layers, bias=True),
    )
    tied = bool(config.get("tie_word_embeddings", gpt2))
    norms = (2 * layers + 1) * 2 * hidden
    embeddings = vocabulary * hidden * (1 if tied else 2) + (positions * hidden if gpt2 else 0)
    parameters = _total(linears) + norms + embeddings
    return Architecture(
        family=family,
        exact=True,
        parameters=parameters,
        active_parameters=parameters,
        linears=linears,
        hidden_size=hidden,
        layers=layers,
        vocabulary=vocabulary,
        tied_head=tied,
        attention_width=hidden,
        key_value_width=hidden,
        intermediate_size=width,
        gated_mlp=False,
        experts=0,
        active_experts=0,
        context_length=positions or None,
    )


# ── the same from stored tensors ─────────────────────────────────────────────────────────────────────────────────────

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blk|blocks)\.(\d+)\.(?:.*\.)?([^.]+)\.weight$")
_NO_PARAMETER = re.compile(r"inv_freq$|rope_freqs|masked_bias$|\.attn\.bias$")  # buffers that old files carry along
_OTHER_PARTS = re.compile(r"(?:^|\.)(?:vision_tower|vision_model|visual|multi_modal_projector|audio_tower)\.")
_GGUF_NAMES = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "attn_qkv": "qkv_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}
_FLOATS = ("f", "bf", "q", "bfloat", "float")


def stored_parameters(tensors: Iterable[StoredTensor], tied_head: bool) -> int | None:
    """Exact count from headers; None where weights are stored packed (GPTQ, bitsandbytes) and cannot be counted."""
    total = 0
    for tensor in tensors:
        if _NO_PARAMETER.search(tensor.name) or _OTHER_PARTS.search(tensor.name):
            continue
        if not tensor.dtype.startswith(_FLOATS):
            return None
        if tied_head and tensor.name.endswith(("lm_head.weight", "embed_out.weight")):
            continue  # a copy of the embedding
        total += tensor.elements
    return total


def stored_linears(tensors: Iterable[StoredTensor]) -> tuple[LinearShape, ...]:
    """The linear layers by name and shape, for families whose configuration this module does not know."""
    counts: dict[tuple[str, int, int, bool], int] = {}
    for tensor in tensors:
        match = _LAYER.search(tensor.name)
        if match is None or len(tensor.shape) != 2 or _OTHER_PARTS.search(tensor.name) or "norm" in match[2]:
            continue
        key = (_GGUF_NAMES.get(match[2], match[2]), tensor.shape[1], tensor.shape[0], ".experts." in tensor.name)
        counts[key] = counts.get(key, 0) + 1
    return tuple(
        _linear(name, inputs, outputs, count, expert=expert)
        for (name, inputs, outputs, expert), count in counts.items()
    )
