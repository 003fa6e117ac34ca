"""What the engine keeps of a layer for the backward pass, and what it works with while that layer's turn lasts.

All counts are numbers a token, of hidden size h, query and key/value widths q and k, (active) MLP width i, T routed
rows of h, and heads; rules.yaml holds how many of each, read off the engine's code and checked against every
allocation that was alive at the measured peak. A LoRA layer of Llama keeps 4h (two residuals, two normalised inputs),
2q + 2k (what attention takes and gives), the probabilities of short rows, 2i (gate and up) and r for each adapter.
"""

from dataclasses import dataclass

from welltuned.advice.rules import number, rule
from welltuned.facts.machine import Device
from welltuned.facts.model import ModelFacts
from welltuned.recipe import Tune

_ATTENTION_INPUT = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value"})
_ATTENTION_OUTPUT = frozenset({"o_proj", "c_proj", "dense"})
_MLP_INPUT = frozenset({"gate_proj", "up_proj", "gate_up_proj", "c_fc", "dense_h_to_4h"})
_GATED = frozenset({"gate_proj", "up_proj", "down_proj"})


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySetting:
    """What memory depends on.

    Args:
        micro_tokens: the most tokens that pass through the model at once.
        targets: what carries adapters; None for every linear layer.
        more: numbers that are trained beyond r for every target, or fewer: variants of LoRA.
        average: whether an average of the weights is kept beside them.
        eight_bit: whether AdamW's moments are kept in 8 bits.
        layers: how many layers are recomputed with `checkpointing`, the first ones; None for all.
        offload: whether what goes into a recomputed layer waits on the host.
        dense_base: whether 4-bit weights are expanded once and for all.
        parts: into how many the model is cut, of which a process holds one.
        lengths: lengths of the rows, as many as tell short rows from long ones; () for one row of micro_tokens.
    """

    tune: Tune
    dtype: str
    device: Device
    micro_tokens: int
    checkpointing: bool
    r: int = 0
    targets: tuple[str, ...] | None = None
    more: int = 0
    average: bool = False
    eight_bit: bool = False
    layers: int | None = None
    offload: bool = False
    dense_base: bool = False
    lengths: tuple[int, ...] = ()
    parts: int = 1

    @property
    def word(self) -> float:
        """Bytes of a number of the model; full fine-tuning trains float32 weights, whatever the dtype."""
        return number("bytes_float32" if self.tune is Tune.FULL else f"bytes_{self.dtype}")

    def recomputed(self, layers: int) -> int:
        """How many of the model's layers run again in the backward pass."""
        return 0 if not self.checkpointing else layers if self.layers is None else min(self.layers, layers)

    @property
    def half(self) -> bool:
        return self.word < number("bytes_float32")


@dataclass(frozen=True, slots=True)
class Layer:
    """Numbers a token of one layer: kept for the backward pass, and more while its backward pass runs."""

    kept: float
    work: float


def layer_of(model: ModelFacts, s: MemorySetting) -> Layer:
    """The average layer."""
    mlp = rule("memory_mlp").value[mlp_kind(model, s)]
    routed, hidden, width = model.active_experts * model.hidden_size, model.hidden_size, model.intermediate_size
    kept = _norms(model, s) + _attention(model, s) + mlp["kept"][0] * width + mlp["kept"][1] * routed
    if s.tune is not Tune.FULL:
        kept += s.r * sum(shape.active for shape in model.adapted(s.targets)) / model.layers
    work = max(a * width + b * routed + c * hidden for a, b, c in mlp["work"])
    return Layer(kept, work)


def mlp_kind(model: ModelFacts, s: MemorySetting) -> str:
    """How the MLP runs: a key of `memory_mlp`."""
    trained = s.tune is Tune.FULL
    if model.experts:
        if any(shape.expert for shape in model.adapted(s.targets or ())) and not trained:
            return "experts_adapted"
        if s.tune is Tune.QLORA:
            return "experts_in_4_bits"
        return "own_experts_trained" if trained else "own_experts"
    names = _adapted_names(model, s)
    if not model.gated_mlp:
        return "ungated" if trained or names & _MLP_INPUT else "ungated_frozen"
    if trained:
        return "gated_trained"
    if names >= _GATED:
        return "gated_fused"
    return "gated_trained" if names & (_MLP_INPUT | {"down_proj"}) else "gated_frozen"


def attention_kinds(model: ModelFacts, s: MemorySetting) -> set[str]:
    """Which of the engine's ways to attend the rows take: keys of `memory_attention`."""
    if model.plain_attention:
        return {"plain"}
    if s.device is Device.CUDA:
        return {"varlen" if s.half else "sdpa"}
    if s.half:
        return {"sdpa"}
    lengths = s.lengths or (s.micro_tokens,)
    short = number("memory_attention_short")
    return {"blocked" if length <= short else "sdpa" for length in lengths}


def _adapted_names(model: ModelFacts, s: MemorySetting) -> set[str]:
    return {shape.name for shape in model.adapted(s.targets) if not shape.expert}


def _norms(model: ModelFacts, s: MemorySetting) -> float:
    """The residual stream where norms read it, and what they give where somebody keeps it."""
    hidden, heads = model.hidden_size, model.attention_width + model.key_value_width
    kept = model.norms * hidden
    if s.tune is Tune.FULL:
        before_gain = model.gated_mlp * (model.norms * hidden + model.qk_norm * heads)  # LayerNorm keeps its input only
        return kept + model.qk_norm * heads + before_gain + 2 * hidden
    if s.half and s.device is Device.CPU:
        kept *= 2  # torch's norm keeps a float32 copy of its input there
    names = _adapted_names(model, s)
    read_by = bool(names & _ATTENTION_INPUT) + (bool(names & _MLP_INPUT) or mlp_kind(model, s).startswith("experts"))
    return kept + model.qk_norm * heads + read_by * hidden


def _attention(model: ModelFacts, s: MemorySetting) -> float:
    return max(_attended(model, s, kind) for kind in attention_kinds(model, s))


def _attended(model: ModelFacts, s: MemorySetting, kind: str) -> float:
    queries, keys = rule("memory_attention").value[kind]
    kept: float = queries * model.attention_width + keys * model.key_value_width
    unread = s.tune is not Tune.FULL and not _adapted_names(model, s) & _ATTENTION_OUTPUT
    if kind in ("blocked", "plain") and unread:
        kept -= model.attention_width  # a frozen output projection keeps nothing
    lengths = s.lengths or (s.micro_tokens,)
    if kind == "blocked":
        longest = max(length for length in lengths if length <= number("memory_attention_short"))
        block = longest / -(-longest // number("memory_attention_block"))
        kept += model.heads * (longest + block) / 2  # the triangle, in steps of a block
    elif kind == "plain":
        kept += model.heads * max(lengths) * number("memory_plain_logits") * (2 if s.half else 1)
    return kept
