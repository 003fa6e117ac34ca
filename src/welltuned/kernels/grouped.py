"""Experts with LoRA: y_NH = sum over a token's T experts of w · down_e(act(up_e(x))), each product with an adapter.

An expert's projection is x (W_e + s B_e A_e)^T + b_e, as PEFT's `target_parameters` has it. The routed rows are sorted
by expert (and, within one, by adapter), so that each product is one matrix product for every expert that is hit. The
backward pass is written by hand and keeps one row a token of x, the first product's output and the thin S; what the
second product takes and gives is formed again.

Further shape suffixes:
    T experts a token   S = N·T routed rows, sorted   E experts
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from welltuned.kernels.lora import Rows, autocast_input
from welltuned.kernels.nf4 import DenseWeight, FrozenWeight, NF4Weight


@dataclass(frozen=True, slots=True)
class DenseStack:
    """Frozen matrices W_EOI in the model's dtype (a transposed view where they are stored as [E, in, out])."""

    w_EOI: Tensor

    def __getitem__(self, expert: int) -> FrozenWeight:
        return DenseWeight(self.w_EOI[expert])

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.w_EOI.shape[0], self.w_EOI.shape[1], self.w_EOI.shape[2]


@dataclass(frozen=True, slots=True)
class NF4Stack:
    """Frozen matrices quantised one by one, so that only the expert at work is ever dense."""

    weights: tuple[NF4Weight, ...]

    @classmethod
    def quantize(cls, w_EOI: Tensor, device: torch.device | str | None = None) -> "NF4Stack":
        return cls(tuple(NF4Weight.quantize(w_OI.to(device)) for w_OI in w_EOI))

    def __getitem__(self, expert: int) -> FrozenWeight:
        return self.weights[expert]

    def to(self, device: torch.device) -> "NF4Stack":
        return NF4Stack(tuple(weight.to(device) for weight in self.weights))

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.weights), *self.weights[0].shape


Stack = DenseStack | NF4Stack


@dataclass(frozen=True, slots=True)
class Adapter:
    """K adapters on every expert of one stack; `scale_K` is s of each."""

    a_KERI: Tensor
    b_KEOR: Tensor
    scale_K: Sequence[float]


@dataclass(frozen=True, slots=True)
class Experts:
    """What every token's experts are made of.

    Args:
        up, down: the stacks; `up` gives gate and up together where the experts are gated.
        up_bias_EO, down_bias_EO: frozen biases.
        act: from the first product's output to the second's input, row by row.
    """

    up: Stack
    down: Stack
    act: Callable[[Tensor], Tensor]
    up_bias_EO: Tensor | None = None
    down_bias_EO: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Routing:
    """Which rows go where.

    Attributes:
        order_S: place of each sorted row among the N·T unsorted ones; row s is of token order_S[s] // T.
        groups: (expert, its rows, [(adapter, its rows among them)]) of the experts that are hit, in order.
        expert_S: each sorted row's expert.
    """

    order_S: Tensor
    inverse_S: Tensor
    expert_S: Tensor
    groups: tuple[tuple[int, slice, tuple[tuple[int, slice], ...]], ...]
    top: int

    @classmethod
    def sort(cls, index_NT: Tensor, experts: int, rows: Rows) -> "Routing":
        n, top = index_NT.shape
        spans = rows.spans(n)
        adapters = spans[-1][0] + 1 if spans else 1
        key_NT = index_NT * adapters
        for k, span in spans:
            key_NT[span] += k
        key_S, order_S = key_NT.flatten().sort(stable=True)
        inverse_S = torch.empty_like(order_S)
        inverse_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        counts = torch.bincount(key_S, minlength=experts * adapters).tolist()  # the one time that the host waits
        groups, start = [], 0
        for expert in range(experts):  # rows beyond the last expert (of masked slots) are nobody's
            first, parts = start, []
            for k in range(adapters):
                end = start + counts[expert * adapters + k]
                if end > start:
                    parts.append((k, slice(start, end)))
                start = end
            if start > first:
                groups.append((expert, slice(first, start), tuple(parts)))
        return cls(order_S, inverse_S, (key_S // adapters).clamp_(max=experts - 1), tuple(groups), top)

    @property
    def covered(self) -> int:
        return self.groups[-1][1].stop if self.groups else 0

    def spread(self, x_NH: Tensor) -> Tensor:
        """Each token's row for each of its experts, sorted."""
        return x_NH[self.order_S // self.top]

    def gather(self, x_SH: Tensor) -> Tensor:
        """The sum of each token's rows: what `spread` is the transpose of."""
        return x_SH[self.inverse_S].view(-1, self.top, x_SH.shape[1]).sum(1)


def experts_reference(
    x_NH: Tensor,
    index_NT: Tensor,
    weight_NT: Tensor,
    experts: Experts,
    up: Adapter | None,
    down: Adapter | None,
    rows: Rows,
) -> Tensor:
    """The same by plain autograd, a token and an expert at a time."""

    def product(x_I: Tensor, stack: Stack, bias_EO: Tensor | None, adapter: Adapter | None, e: int, k: int) -> Tensor:
        w_OI = stack[e].dense(x_I.dtype)
        if adapter is not None:
            w_OI = w_OI + float(adapter.scale_K[k]) * adapter.b_KEOR[k, e] @ adapter.a_KERI[k, e]
        return w_OI @ x_I if bias_EO is None else w_OI @ x_I + bias_EO[e]

    adapter_of = [k for k, span in rows.spans(len(x_NH)) for _ in range(span.start, span.stop)]
    out = []
    for n, k in enumerate(adapter_of):
        y_H = torch.zeros_like(x_NH[n])
        for e, w in zip(index_NT[n].tolist(), weight_NT[n], strict=True):
            inner = experts.act(product(x_NH[n], experts.up, experts.up_bias_EO, up, e, k)[None])[0]
            y_H = y_H + w * product(inner, experts.down, experts.down_bias_EO, down, e, k)
        out.append(y_H)
    return torch.stack(out)


def _project(
    x_SI: Tensor, stack: Stack, bias_EO: Tensor | None, adapter: Adapter | None, routing: Routing
) -> tuple[Tensor, Tensor | None]:
    """(y_SO, S_SR) with S = s x A^T, scaled."""
    y_SO = x_SI.new_empty(len(x_SI), stack.shape[1])
    y_SO[routing.covered :] = 0
    s_SR = None if adapter is None else x_SI.new_empty(len(x_SI), adapter.a_KERI.shape[2])
    for expert, span, parts in routing.groups:
        torch.mm(x_SI[span], stack[expert].lent(x_SI.dtype).t(), out=y_SO[span])
        if adapter is None or s_SR is None:
            continue
        for k, part in parts:
            a_RI, b_OR = (t[k, expert].to(x_SI.dtype) for t in (adapter.a_KERI, adapter.b_KEOR))
            torch.mm(x_SI[part], a_RI.t(), out=s_SR[part]).mul_(float(adapter.scale_K[k]))
            y_SO[part].addmm_(s_SR[part], b_OR.t())
    if bias_EO is not None:
        y_SO[: routing.covered] += bias_EO.to(y_SO.dtype)[routing.expert_S[: routing.covered]]
    return y_SO, s_SR


def _project_backward(
    g_SO: Tensor, stack: Stack, adapter: Adapter | None, routing: Routing
) -> tuple[Tensor, Tensor | None]:
    """(dx_SI, dS_SR) of one product; the adapter's own gradients are `_adapter_gradients`."""
    dx_SI = g_SO.new_empty(len(g_SO), stack.shape[2])
    dx_SI[routing.covered :] = 0
    ds_SR = None if adapter is None else g_SO.new_empty(len(g_SO), adapter.a_KERI.shape[2])
    for expert, span, parts in routing.groups:
        torch.mm(g_SO[span], stack[expert].lent(g_SO.dtype), out=dx_SI[span])
        if adapter is None or ds_SR is None:
            continue
        for k, part in parts:
            a_RI, b_OR = (t[k, expert].to(g_SO.dtype) for t in (adapter.a_KERI, adapter.b_KEOR))
            torch.mm(g_SO[part], b_OR, out=ds_SR[part]).mul_(float(adapter.scale_K[k]))
            dx_SI[part].addmm_(ds_SR[part], a_RI)
    return dx_SI, ds_SR


def _adapter_gradients(
    x_SI: Tensor, s_SR: Tensor, g_SO: Tensor, ds_SR: Tensor, adapter: Adapter, routing: Routing
) -> tuple[Tensor, Tensor]:
    """(dA_KERI, dB_KEOR) in the adapter's dtype; zero for an expert that no row went to."""
    da_KERI, db_KEOR = torch.zeros_like(adapter.a_KERI), torch.zeros_like(adapter.b_KEOR)
    for expert, _, parts in routing.groups:
        for k, part in parts:
            da_KERI[k, expert] = ds_SR[part].t() @ x_SI[part]
            db_KEOR[k, expert] = (s_SR[part].t() @ g_SO[part]).t()
    return da_KERI, db_KEOR


def experts_forward(
    x_NH: Tensor, weight_NT: Tensor, experts: Experts, routing: Routing, up: Adapter | None, down: Adapter | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Without autograd: (y_NH, h_SO of the first product, S of both), the last three for the backward pass."""
    h_SO, su_SR = _project(routing.spread(x_NH), experts.up, experts.up_bias_EO, up, routing)
    y_SH, sd_SR = _project(experts.act(h_SO), experts.down, experts.down_bias_EO, down, routing)
    weight_S1 = weight_NT.flatten()[routing.order_S, None]
    return routing.gather(y_SH * weight_S1).to(x_NH.dtype), h_SO, su_SR, sd_SR


def experts_backward(
    g_NH: Tensor,
    x_NH: Tensor,
    weight_NT: Tensor,
    h_SO: Tensor,
    su_SR: Tensor | None,
    sd_SR: Tensor | None,
    experts: Experts,
    routing: Routing,
    up: Adapter | None,
    down: Adapter | None,
    needs_dx: bool,
) -> tuple[Tensor | None, ...]:
    """(dx_NH, dweight_NT, dA and dB of the first product, dA and dB of the second)."""
    weight_S1 = weight_NT.flatten()[routing.order_S, None]
    g_SH = routing.spread(g_NH)
    found = torch.func.vjp(experts.act, h_SO)  # also where autograd is not at work: within a node of the compiler
    inner_SI, through_act = found[0], found[1]
    # Before the row's weight is applied: (W + s B A)^T g. Its product with what the experts took is g · y, the
    # weight's own gradient, so y itself is not needed again.
    di_SI, ds_SR = _project_backward(g_SH, experts.down, down, routing)
    dweight_NT = _weight_gradient(di_SI, inner_SI, g_SH, experts, routing).view_as(weight_NT)
    dad = dbd = dau = dbu = None
    if down is not None and ds_SR is not None and sd_SR is not None:
        gw_SH, dsw_SR = ((t * weight_S1).to(g_SH.dtype) for t in (g_SH, ds_SR))
        dad, dbd = _adapter_gradients(inner_SI, sd_SR, gw_SH, dsw_SR, down, routing)
    (dh_SO,) = through_act((di_SI * weight_S1).to(inner_SI.dtype))
    dx_SH, ds_SR = _project_backward(dh_SO, experts.up, up, routing)
    if up is not None and ds_SR is not None and su_SR is not None:
        dau, dbu = _adapter_gradients(routing.spread(x_NH), su_SR, dh_SO, ds_SR, up, routing)
    dx_NH = routing.gather(dx_SH) if needs_dx else None
    return dx_NH, dweight_NT.to(weight_NT.dtype), dau, dbu, dad, dbd


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NH, weight_NT, experts, routing, scale_K, au, bu, ad, bd):  # type: ignore[no-untyped-def]
        up, down = _adapter(au, bu, scale_K[0]), _adapter(ad, bd, scale_K[1])
        y_NH, h_SO, su_SR, sd_SR = experts_forward(x_NH, weight_NT, experts, routing, up, down)
        ctx.save_for_backward(x_NH, weight_NT, h_SO, su_SR, sd_SR, au, bu, ad, bd)
        ctx.experts, ctx.routing, ctx.scale_K = experts, routing, scale_K
        return y_NH

    @staticmethod
    def backward(ctx, g_NH):  # type: ignore[no-untyped-def]
        x, weight, h, su, sd, au, bu, ad, bd = ctx.saved_tensors
        up, down = _adapter(au, bu, ctx.scale_K[0]), _adapter(ad, bd, ctx.scale_K[1])
        parts = ctx.experts, ctx.routing, up, down, ctx.needs_input_grad[0]
        dx, dweight, *grads = experts_backward(g_NH, x, weight, h, su, sd, *parts)
        return dx, dweight, None, None, None, *grads


def _adapter(a_KERI: Tensor | None, b_KEOR: Tensor | None, scale_K: Sequence[float]) -> Adapter | None:
    return None if a_KERI is None or b_KEOR is None else Adapter(a_KERI, b_KEOR, scale_K)


def _weight_gradient(di_SI: Tensor, inner_SI: Tensor, g_SH: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """The gradient of each row's weight, g · y, in the unsorted order."""
    wide = torch.promote_types(di_SI.dtype, torch.float32)
    d_S = (di_SI.to(wide) * inner_SI).sum(1)
    if experts.down_bias_EO is not None:
        d_S = d_S + (g_SH.to(wide) * experts.down_bias_EO[routing.expert_S]).sum(1)
        d_S[routing.covered :] = 0
    return d_S[routing.inverse_S]


@torch.compiler.disable
def lora_experts(
    x_NH: Tensor,
    index_NT: Tensor,
    weight_NT: Tensor,
    experts: Experts,
    up: Adapter | None,
    down: Adapter | None,
    rows: Rows,
) -> Tensor:
    """y_NH, differentiable in x, in the routing's weights and in the adapters, where there are any.

    Args:
        index_NT: each token's experts; a number beyond the last one stands for none.
    """
    routing = Routing.sort(index_NT, experts.up.shape[0], rows)
    pairs = [(None, None) if adapter is None else (adapter.a_KERI, adapter.b_KEOR) for adapter in (up, down)]
    scale_K = [() if adapter is None else adapter.scale_K for adapter in (up, down)]
    y_NH: Tensor = _Experts.apply(autocast_input(x_NH), weight_NT, experts, routing, scale_K, *pairs[0], *pairs[1])
    return y_NH
