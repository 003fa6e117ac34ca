"""Fused gated MLP with LoRA: y = down(act(gate(x)) * up(x)), saving x, gate and up outputs, and three thin S.

The product act(gate)*up is formed again in the backward pass rather than saved: one elementwise pass for a sixth of
the layer's activation memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from welltuned.kernels.lora import Projection, Rows, autocast_input, lora_reference, project, project_backward


class Activation(StrEnum):
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"


FORWARD: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}
_BACKWARD: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    Activation.SILU: torch.ops.aten.silu_backward,
    Activation.GELU: torch.ops.aten.gelu_backward,
    Activation.GELU_TANH: lambda g, x: torch.ops.aten.gelu_backward(g, x, approximate="tanh"),
}


@dataclass(slots=True, weakref_slot=True, eq=False)
class GatedMLP:
    gate: Projection
    up: Projection
    down: Projection
    activation: Activation


Pair = tuple[Tensor, Tensor]  # (a_KRI, b_KOR)


def gated_mlp_reference(x_NI: Tensor, mlp: GatedMLP, gate: Pair, up: Pair, down: Pair, rows: Rows) -> Tensor:
    """The same by plain autograd."""
    e = lora_reference(x_NI, mlp.gate, *gate, None, rows)
    u = lora_reference(x_NI, mlp.up, *up, None, rows)
    return lora_reference(FORWARD[mlp.activation](e) * u, mlp.down, *down, None, rows)


Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # outputs of gate and up, the thin S of gate, up and down


def mlp_forward(x_NI: Tensor, mlp: GatedMLP, gate: Pair, up: Pair, down: Pair, rows: Rows) -> tuple[Tensor, Kept]:
    """Without autograd: y_NI, and what the backward pass needs."""
    e_NO, sg_NR = project(x_NI, mlp.gate, *gate, None, rows)
    u_NO, su_NR = project(x_NI, mlp.up, *up, None, rows)
    y_NI, sd_NR = project(FORWARD[mlp.activation](e_NO).mul_(u_NO), mlp.down, *down, None, rows)
    return y_NI, (e_NO, u_NO, sg_NR, su_NR, sd_NR)


def mlp_backward(
    g_NI: Tensor, x: Tensor, kept: Kept, mlp: GatedMLP, gate: Pair, up: Pair, down: Pair, rows: Rows, needs_dx: bool
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """dx_NI, and the gradients of the three pairs in turn."""
    e, u, sg, su, sd = kept
    act_e = FORWARD[mlp.activation](e)
    dh, dad, dbd = project_backward(g_NI.contiguous(), act_e * u, sd, mlp.down, *down, rows, None, True)
    assert dh is not None
    du = act_e.mul_(dh)
    de = _BACKWARD[mlp.activation](dh.mul_(u), e)
    dx, dag, dbg = project_backward(de, x, sg, mlp.gate, *gate, rows, None, needs_dx)
    dx, dau, dbu = project_backward(du, x, su, mlp.up, *up, rows, dx, needs_dx)
    return dx, (dag, dbg, dau, dbu, dad, dbd)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NI, mlp, rows, ag, bg, au, bu, ad, bd):  # type: ignore[no-untyped-def]
        y_NI, kept = mlp_forward(x_NI, mlp, (ag, bg), (au, bu), (ad, bd), rows)
        ctx.save_for_backward(x_NI, *kept, ag, bg, au, bu, ad, bd)
        ctx.mlp, ctx.rows = mlp, Rows(rows.per_adapter, rows.dropout)
        return y_NI

    @staticmethod
    def backward(ctx, g_NI):  # type: ignore[no-untyped-def]
        x, e, u, sg, su, sd, ag, bg, au, bu, ad, bd = ctx.saved_tensors
        kept, pairs = (e, u, sg, su, sd), ((ag, bg), (au, bu), (ad, bd))
        dx, grads = mlp_backward(g_NI, x, kept, ctx.mlp, *pairs, ctx.rows, ctx.needs_input_grad[0])
        return dx, None, None, *grads


@torch.compiler.disable
def gated_mlp(x_NI: Tensor, mlp: GatedMLP, gate: Pair, up: Pair, down: Pair, rows: Rows) -> Tensor:
    """y_NI, differentiable in x and in the three pairs (A_KRI, B_KOR)."""
    x_NI = autocast_input(x_NI)
    if not torch.is_grad_enabled():
        return mlp_forward(x_NI, mlp, gate, up, down, rows)[0]
    y_NI: Tensor = _GatedMLP.apply(x_NI, mlp, rows, *gate, *up, *down)
    return y_NI
