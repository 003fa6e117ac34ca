"""The fused ops as torch's compiler sees them: one node each, which it neither looks into nor runs a second time.

The arithmetic is that of kernels/lora, gated_mlp, grouped and attention: a node finds what it needs and calls them.
Only tensors and plain numbers reach a node, and a number would be part of the compiled code: so what a projection is
stands behind a handle, a tensor of one number, and what a micro-batch's rows are in a ledger (kernels/ledger.py). All
layers of a model, and all of its micro-batches, then share one compiled code.

Inductor before torch 2.11 miscompiled traced LoRA backward passes, and `add(alpha=...)` in 2.13: what is a node is not
traced.
"""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from welltuned.kernels.attention import Seen, packed_attention, packed_attention_backward, takes_varlen, varlen
from welltuned.kernels.gated_mlp import mlp_backward, mlp_forward
from welltuned.kernels.grouped import Adapter, Experts, Routing, experts_backward, experts_forward
from welltuned.kernels.ledger import layout, rows_of
from welltuned.kernels.lora import autocast_input, project, project_backward

_HELD: WeakValueDictionary[int, Any] = WeakValueDictionary()
_NUMBERS = count()


def handle_of(held: Any) -> Tensor:
    """A tensor that stands for a Python object, which somebody else keeps alive."""
    number = next(_NUMBERS)
    _HELD[number] = held
    return torch.tensor(number)


def held_by(handle: Tensor) -> Any:
    return _HELD[int(handle)]


def _node(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as a node; `fake` says what shapes it gives."""

    def register(function: Callable[..., Any]) -> Any:
        node = torch.library.custom_op(f"welltuned::{name}", function, mutates_args=())
        node.register_fake(fake)
        return node

    return register


def _new(like: Tensor) -> Tensor:
    """Of this shape and type, contiguous."""
    return like.new_empty(like.shape)


# ── LoRA ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _lora_shapes(x: Tensor, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], b.shape[1]), x.new_empty(x.shape[0], a.shape[1])


@_node("lora", lambda x, a, b, bias, handle, ledger: _lora_shapes(x, a, b))
def _lora(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, handle: Tensor, ledger: Tensor
) -> tuple[Tensor, Tensor]:
    return project(x, held_by(handle), a, b, bias, rows_of(ledger))


def _lora_gradient_shapes(
    g: Tensor, x: Tensor, s: Tensor, a: Tensor, b: Tensor, handle: Tensor, ledger: Tensor, needs_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _new(x) if needs_dx else x.new_empty(0), _new(a), _new(b)


@_node("lora_backward", _lora_gradient_shapes)
def _lora_backward(
    g: Tensor, x: Tensor, s: Tensor, a: Tensor, b: Tensor, handle: Tensor, ledger: Tensor, needs_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, da, db = project_backward(g.contiguous(), x, s, held_by(handle), a, b, rows_of(ledger), None, needs_dx)
    return x.new_empty(0) if dx is None else dx, da.contiguous(), db.contiguous()


def _keep_lora(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, a, b, _, handle, ledger = inputs
    ctx.save_for_backward(x, output[1], a, b, handle, ledger)
    ctx.set_materialize_grads(False)


def _back_lora(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_dx = ctx.needs_input_grad[0]
    dx, da, db = _lora_backward(g, *ctx.saved_tensors, needs_dx)
    dbias = g.sum(0) if ctx.needs_input_grad[3] else None
    return dx if needs_dx else None, da, db, dbias, None, None


_lora.register_autograd(_back_lora, setup_context=_keep_lora)


def lora_node(x_NI: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, handle: Tensor, ledger: Tensor) -> Tensor:
    """`kernels/lora.lora` of the Projection behind the handle."""
    y_NO: Tensor = _lora(autocast_input(x_NI), a, b, bias, handle, ledger)[0]
    return y_NO


# ── gated MLP ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _mlp_shapes(
    x: Tensor, ag: Tensor, bg: Tensor, au: Tensor, bu: Tensor, ad: Tensor, bd: Tensor, handle: Tensor, ledger: Tensor
) -> tuple[Tensor, ...]:
    n, inner = x.shape[0], bg.shape[1]
    return _new(x), *(x.new_empty(n, width) for width in (inner, inner, ag.shape[1], au.shape[1], ad.shape[1]))


@_node("gated_mlp", _mlp_shapes)
def _gated_mlp(
    x: Tensor, ag: Tensor, bg: Tensor, au: Tensor, bu: Tensor, ad: Tensor, bd: Tensor, handle: Tensor, ledger: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, kept = mlp_forward(x, held_by(handle), (ag, bg), (au, bu), (ad, bd), rows_of(ledger))
    return (y, *kept)


def _mlp_gradient_shapes(g: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _new(x) if rest[-1] else x.new_empty(0), *(_new(t) for t in rest[5:11])


@_node("gated_mlp_backward", _mlp_gradient_shapes)
def _gated_mlp_backward(
    g: Tensor,
    x: Tensor,
    e: Tensor,
    u: Tensor,
    sg: Tensor,
    su: Tensor,
    sd: Tensor,
    ag: Tensor,
    bg: Tensor,
    au: Tensor,
    bu: Tensor,
    ad: Tensor,
    bd: Tensor,
    handle: Tensor,
    ledger: Tensor,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    mlp, rows, pairs = held_by(handle), rows_of(ledger), ((ag, bg), (au, bu), (ad, bd))
    dx, grads = mlp_backward(g, x, (e, u, sg, su, sd), mlp, *pairs, rows, needs_dx)
    dag, dbg, dau, dbu, dad, dbd = (t.contiguous() for t in grads)
    return x.new_empty(0) if dx is None else dx, dag, dbg, dau, dbu, dad, dbd


def _keep_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *rest = inputs
    ctx.save_for_backward(x, *output[1:], *rest)
    ctx.set_materialize_grads(False)


def _back_mlp(ctx: Any, g: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_dx = ctx.needs_input_grad[0]
    dx, *grads = _gated_mlp_backward(g, *ctx.saved_tensors, needs_dx)
    return dx if needs_dx else None, *grads, None, None


_gated_mlp.register_autograd(_back_mlp, setup_context=_keep_mlp)


def gated_mlp_node(x_NI: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], handle: Tensor, ledger: Tensor) -> Tensor:
    """`kernels/gated_mlp.gated_mlp` of the GatedMLP behind the handle; pairs of gate, up and down."""
    y_NI: Tensor = _gated_mlp(autocast_input(x_NI), *(t for pair in pairs for t in pair), handle, ledger)[0]
    return y_NI


# ── experts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class HoldsExperts(Protocol):
    """A module of experts: what it is made of, and its adapters' scales."""

    def parts(self) -> tuple[Experts, tuple[float, ...]]: ...


def _adapter(a: Tensor | None, b: Tensor | None, scale_K: tuple[float, ...]) -> Adapter | None:
    return None if a is None or b is None else Adapter(a, b, scale_K)


def _expert_shapes(
    x: Tensor, index: Tensor, weight: Tensor, au: Any, bu: Any, ad: Any, bd: Any, handle: Any, ledger: Any, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    routed = index.numel()
    su, sd = (x.new_empty(0, 0) if a is None else x.new_empty(routed, a.shape[2]) for a in (au, ad))
    return _new(x), x.new_empty(routed, width), su, sd


@_node("experts", _expert_shapes)
def _experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    au: Tensor | None,
    bu: Tensor | None,
    ad: Tensor | None,
    bd: Tensor | None,
    handle: Tensor,
    ledger: Tensor,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    experts, scale_K = held_by(handle).parts()
    routing = Routing.sort(index, experts.up.shape[0], rows_of(ledger))
    up, down = _adapter(au, bu, scale_K), _adapter(ad, bd, scale_K)
    y, h, su, sd = experts_forward(x, weight, experts, routing, up, down)
    return y, h, x.new_empty(0, 0) if su is None else su, x.new_empty(0, 0) if sd is None else sd


def _expert_gradient_shapes(g: Tensor, x: Tensor, index: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _new(x), _new(weight), *(x.new_empty(0) if t is None else _new(t) for t in rest[3:7])


@_node("experts_backward", _expert_gradient_shapes)
def _experts_backward(
    g: Tensor,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    h: Tensor,
    su: Tensor,
    sd: Tensor,
    au: Tensor | None,
    bu: Tensor | None,
    ad: Tensor | None,
    bd: Tensor | None,
    handle: Tensor,
    ledger: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    experts, scale_K = held_by(handle).parts()
    routing = Routing.sort(index, experts.up.shape[0], rows_of(ledger))
    up, down = _adapter(au, bu, scale_K), _adapter(ad, bd, scale_K)
    thin = (None if up is None else su), (None if down is None else sd)
    grads = experts_backward(g, x, weight, h, *thin, experts, routing, up, down, True)
    dx, dweight, dau, dbu, dad, dbd = (x.new_empty(0) if t is None else t.contiguous() for t in grads)
    return dx, dweight, dau, dbu, dad, dbd


def _keep_experts(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, index, weight, au, bu, ad, bd, handle, ledger, _ = inputs
    ctx.save_for_backward(x, index, weight, *output[1:], au, bu, ad, bd, handle, ledger)
    ctx.set_materialize_grads(False)


def _back_experts(ctx: Any, g: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dweight, *grads = _experts_backward(g, *ctx.saved_tensors)
    known = [t if needed else None for t, needed in zip(grads, ctx.needs_input_grad[3:7], strict=True)]
    return dx, None, dweight, *known, None, None, None


_experts.register_autograd(_back_experts, setup_context=_keep_experts)


def experts_node(
    x_NH: Tensor,
    index_NT: Tensor,
    weight_NT: Tensor,
    up: tuple[Tensor, Tensor] | None,
    down: tuple[Tensor, Tensor] | None,
    handle: Tensor,
    ledger: Tensor,
    width: int,
) -> Tensor:
    """`kernels/grouped.lora_experts` of the module behind the handle; `width` is the first product's."""
    pairs = *(up or (None, None)), *(down or (None, None))
    y_NH: Tensor = _experts(autocast_input(x_NH), index_NT, weight_NT, *pairs, handle, ledger, width)[0]
    return y_NH


# ── 4-bit projections without adapters ───────────────────────────────────────────────────────────────────────────────


@_node("frozen", lambda x, bias, handle, width: x.new_empty(x.shape[0], width))
def _frozen(x: Tensor, bias: Tensor | None, handle: Tensor, width: int) -> Tensor:
    return torch.nn.functional.linear(x, held_by(handle).lent(x.dtype), bias)


@_node("frozen_backward", lambda g, handle, width: g.new_empty(g.shape[0], width))
def _frozen_backward(g: Tensor, handle: Tensor, width: int) -> Tensor:
    return g @ held_by(handle).lent(g.dtype)


def _keep_frozen(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, handle, _ = inputs
    ctx.save_for_backward(handle)
    ctx.width = x.shape[1]


def _back_frozen(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    (handle,) = ctx.saved_tensors
    dx = _frozen_backward(g, handle, ctx.width) if ctx.needs_input_grad[0] else None
    return dx, g.sum(0) if ctx.needs_input_grad[1] else None, None, None


_frozen.register_autograd(_back_frozen, setup_context=_keep_frozen)


def frozen_node(x_NI: Tensor, bias: Tensor | None, handle: Tensor, width: int) -> Tensor:
    """x W^T + b for the FrozenWeight behind the handle, of `width` outputs."""
    y_NO: Tensor = _frozen(x_NI, bias, handle, width)
    return y_NO


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────────


@_node("attend", lambda q, k, v, ledger, scale, window: q.new_empty(q.shape[1], q.shape[0], v.shape[2]))
def _attend(q: Tensor, k: Tensor, v: Tensor, ledger: Tensor, scale: float, window: int | None) -> Tensor:
    lengths, branches = layout(ledger)
    return packed_attention(q, k, v, lengths, scale, window, branches=branches).contiguous()


@_node("attend_backward", lambda g, q, k, v, ledger, scale, window: (_new(q), _new(k), _new(v)))
def _attend_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, ledger: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    lengths, branches = layout(ledger)
    dq, dk, dv = packed_attention_backward(g.contiguous(), q, k, v, lengths, scale, window, branches)
    return dq.contiguous(), dk, dv


def _keep_attend(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _back_attend(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return *_attend_backward(g, *ctx.saved_tensors, ctx.scale, ctx.window), None, None, None


_attend.register_autograd(_back_attend, setup_context=_keep_attend)


def attention_node(
    q_QND: Tensor, k_GND: Tensor, v_GND: Tensor, ledger: Tensor, seen: Seen | None, scale: float, window: int | None
) -> Tensor:
    """`packed_attention` of the lengths in the ledger, without soft-capping and sinks.

    On a GPU in half precision it is torch's own node for variable lengths, which keeps what its backward pass needs;
    elsewhere probabilities are formed again there.

    Args:
        seen: as `packed_attention` takes it; its longest lengths are part of the compiled code, so bounds that hold
            for every micro-batch.
    """
    if takes_varlen(q_QND):
        assert seen is not None
        return varlen(q_QND, k_GND, v_GND, seen, scale, window)
    out_NQD: Tensor = _attend(q_QND, k_GND, v_GND, ledger, scale, window)
    return out_NQD
