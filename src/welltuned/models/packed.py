"""Run a transformers model on packed examples: one row, no padding, attention within each example.

Uses transformers' own hooks (AttentionInterface, AttentionMaskInterface); nothing in the model's code is replaced.
A model that would mix packed examples (Falcon and MPT do not use the hooks; Mamba and linear attention carry a state
along the row) is found out by trying, and runs its examples one at a time on its own attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from welltuned.kernels.attention import Branches, Seen, on, packed_attention, seen_by, spans
from welltuned.kernels.flex import block_mask, flex, prove, wanted
from welltuned.kernels.ledger import layout_of
from welltuned.kernels.lora import Dropout
from welltuned.kernels.nodes import attention_node
from welltuned.models.lora import shared_rows
from welltuned.models.static import Static, static_of

ATTENTION = "welltuned_packed"
UNCOMPILED = "soft-capped logits and attention sinks are not compiled"
_PACKABLE_LAYERS = {"full_attention", "sliding_attention"}  # not "linear_attention", "chunked_attention", "conv", ...
_NOT_KNOWN = ("indices", "block_indices", "position_bias", "sinks")  # sparse or biased attention: not ours
_PACKS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_SHARES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class NotPackable(RuntimeError):
    """This attention is not one that packed rows can have."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Whole examples laid end to end.

    Args:
        ids_N: token ids, int64.
        lengths: tokens of each example; they add up to N.
        branches: of each example the tokens of its branches: continuations, laid end to end, of what is before them
            all, which see that and themselves. None where there are no branches; only where the model `shares`.
    """

    ids_N: Tensor
    lengths: list[int]
    branches: Branches | None = None

    @property
    def position_ids_N(self) -> Tensor:
        """Each token's place in its example; every branch goes on from where the trunk ends."""
        position_ids_N = torch.cat([torch.arange(s.shared, s.keys) for s in spans(self.lengths, self.branches)])
        device = self.ids_N.device
        return on(device, position_ids_N)

    def followed_by(self, tail: list[int]) -> "Packed":
        """The same and an inert tail: examples of so many times token 0, in which no label is."""
        ids_N = torch.cat([self.ids_N, self.ids_N.new_zeros(sum(tail))])
        branches = None if self.branches is None else [*self.branches, *((),) * len(tail)]
        return Packed(ids_N, [*self.lengths, *tail], branches)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed_lengths: list[int] | None = None,
    packed_seen: Seen | None = None,
    packed_branches: Branches | None = None,
    packed_ledger: Tensor | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention call: [1, heads, N, D] in, [1, N, heads, D] out.

    In a compiled layer lengths and branches are in the ledger.
    """
    if (packed_lengths is None and packed_ledger is None) or query.shape[0] != 1:
        raise NotPackable(f"{ATTENTION} attention runs packed rows only; use `hidden_states` or standard attention")
    if is_causal is False or any(more.get(key) is not None for key in _NOT_KNOWN):
        raise NotPackable(f"{type(module).__name__} asks for more than causal attention with a window")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packed_ledger is not None and torch.compiler.is_compiling():
        if softcap is not None or s_aux is not None:
            raise NotPackable(UNCOMPILED)
        parts = query[0], key[0], value[0]
        return attention_node(*parts, packed_ledger, packed_seen, scale, sliding_window)[None], None
    assert packed_lengths is not None
    out = packed_attention(
        query[0],
        key[0],
        value[0],
        packed_lengths,
        scale,
        window=sliding_window,
        softcap=softcap,
        sinks_Q=s_aux,
        seen=packed_seen,
        branches=packed_branches,
    )
    return out[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


@contextmanager
def packed_model(model: PreTrainedModel) -> Iterator[None]:
    """Within the block this model (and no other) attends within packed examples, its own dropout off."""
    with attending(model, ATTENTION if packs(model) else model.config._attn_implementation):
        yield


@contextmanager
def attending(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    before, training = model.config._attn_implementation, model.training
    if implementation != before:
        model.set_attn_implementation(implementation)
    model.eval()
    try:
        yield
    finally:
        if implementation != before:
            model.set_attn_implementation(before)
        model.train(training)


def packs(model: PreTrainedModel) -> bool:
    """Whether packed examples come out as each does alone: tried once on this model, with its own weights."""
    if model not in _PACKS:
        with _bare(model):
            _PACKS[model] = _try_packing(model)
    return _PACKS[model]


def shares(model: PreTrainedModel) -> bool:
    """Whether branches of one trunk come out as each does with a trunk of its own: tried once, as `packs` is."""
    if model not in _SHARES:
        with _bare(model):
            _SHARES[model] = packs(model) and _try_sharing(model)
    return _SHARES[model]


def prove_flex(model: PreTrainedModel) -> str | None:
    """Try torch's FlexAttention with this model's heads; why it is not used, or None."""
    known = model.config.get_text_config().to_dict()
    heads = known["num_attention_heads"]
    width = known.get("head_dim") or known["hidden_size"] // heads
    return prove(heads, known.get("num_key_value_heads") or heads, width, model.dtype, model.device)


@contextmanager
def _bare(model: PreTrainedModel) -> Iterator[None]:
    """Within the block no micro-batch is under way, and nothing is dropped."""
    rows = shared_rows(model)
    per_adapter, dropout = rows.per_adapter, rows.dropout
    rows.per_adapter, rows.dropout = None, Dropout()
    try:
        yield
    finally:
        rows.per_adapter, rows.dropout = per_adapter, dropout


def _packable_layers(model: PreTrainedModel) -> bool:
    """Whether the configuration names only attention that packed rows can have."""
    layers = model.config.get_text_config().to_dict().get("layer_types") or ()
    return _PACKABLE_LAYERS.issuperset(layers)


@torch.no_grad()
def refuses_packing(skeleton: PreTrainedModel) -> bool:
    """Whether a model without numbers ("meta") shows that its rows cannot be packed; `packs` finds the rest."""
    if not _packable_layers(skeleton):
        return True
    try:
        with attending(skeleton, ATTENTION):
            if skeleton.config._attn_implementation != ATTENTION:
                return True
            batch = _trial("meta")
            # With a mask transformers does not look at the values of the position ids, and we take no mask.
            skeleton.base_model(**_arguments(batch), attention_mask=torch.ones_like(batch.ids_N)[None])
    except NotPackable:
        return True
    except (RuntimeError, NotImplementedError):  # what the model does next depends on its numbers
        return False
    return False


def _trial(device: torch.device | str) -> Packed:
    ids_N = torch.tensor([3, 4, 5, 6, 7, 8, 9, 13, 12, 11, 10, 9, 8, 7, 6, 5], device=device)
    return Packed(ids_N, [7, 9])


@torch.no_grad()
def _try_packing(model: PreTrainedModel) -> bool:
    if not _packable_layers(model):
        return False
    batch = _trial(model.device)
    with attending(model, model.config._attn_implementation):
        alone_NV = logits(model, batch)
    try:
        with attending(model, ATTENTION):
            if model.config._attn_implementation != ATTENTION:  # transformers only warned that it cannot be set
                return False
            packed_NV = logits(model, batch)
    except NotPackable:
        return False
    return _near(packed_NV, alone_NV)


@torch.no_grad()
def _try_sharing(model: PreTrainedModel) -> bool:
    ids_N = _trial(model.device).ids_N
    trunk, branches = ids_N[:5], ids_N[5:].split([4, 7])
    with attending(model, ATTENTION):
        apart_NV = logits(model, Packed(torch.cat([t for b in branches for t in (trunk, b)]), [9, 12]))
        shared_NV = logits(model, Packed(ids_N, [16], [(4, 7)]))
    return _near(shared_NV, torch.cat([apart_NV[:9], apart_NV[14:]]))


def _near(tried_NV: Tensor, known_NV: Tensor) -> bool:
    error_N = (tried_NV - known_NV).float().norm(dim=-1) / known_NV.float().norm(dim=-1)
    return bool(error_N.mean() <= (1e-3 if known_NV.dtype.itemsize >= 4 else 0.1))


def _arguments(batch: Packed) -> dict[str, Any]:
    device = batch.ids_N.device
    seen = seen_by(batch.lengths, batch.branches, device)
    if wanted(batch.lengths, batch.branches, device):
        mask = block_mask(batch.lengths, batch.branches, device)
        seen = replace(seen, whole=lambda q, k, v, scale: flex(q, k, v, mask, scale))
    return {
        "input_ids": batch.ids_N[None],
        "position_ids": batch.position_ids_N[None],
        "use_cache": False,
        "packed_lengths": batch.lengths,
        "packed_branches": batch.branches,
        "packed_seen": seen,
    }


def _run(model: PreTrainedModel, part: nn.Module, batch: Packed, output: str) -> Tensor:
    if model.config._attn_implementation == ATTENTION:
        static = static_of(model)
        length = None if static is None else static.fitting(batch.lengths)
        if static is not None and length is not None:
            return _run_static(model, part, batch, output, static, length)
        return part(**_arguments(batch))[output][0]
    if batch.branches is not None and any(batch.branches):
        raise NotPackable("branches need a model whose examples can be packed")
    rows, parts, start = shared_rows(model), [], 0
    for n in batch.lengths:
        with rows.only(start, n):
            parts.append(part(input_ids=batch.ids_N[None, start : start + n], use_cache=False)[output][0])
        start += n
    return torch.cat(parts)


def _run_static(
    model: PreTrainedModel, part: nn.Module, batch: Packed, output: str, static: Static, length: int
) -> Tensor:
    """Followed by an inert tail, and with what compiled layers are given instead of lengths."""
    n = len(batch.ids_N)
    if n < length:
        batch = batch.followed_by(static.tail(length - n))
    with shared_rows(model).longer(length - n):
        out: Tensor = part(**_arguments(batch), packed_ledger=layout_of(batch.lengths, batch.branches))[output][0]
    return out[:n]


def hidden_states(model: PreTrainedModel, batch: Packed) -> Tensor:
    """The backbone's last hidden states [N, H]; call within `packed_model`."""
    return _run(model, model.base_model, batch, "last_hidden_state")


def logits(model: PreTrainedModel, batch: Packed) -> Tensor:
    """The whole model's logits [N, V], whatever its head does; call within `packed_model`."""
    return _run(model, model, batch, "logits")
