"""Fused LoRA projection: y_NO = x_NI W_OI^T + b_O + s (drop(x_NI) A_RI^T) B_OR^T, for K adapters stacked.

Hu et al. 2021 (LoRA), arXiv 2106.09685, equation 3; s = alpha/r, or alpha/sqrt(r) (rsLoRA, Kalajdzievski 2023,
arXiv 2312.03732). The rows of x are K consecutive spans, one an adapter. The backward pass is written by hand: it
saves x and S = x A^T, and never forms a gradient for the frozen W, which autograd through PEFT's three modules does
not do either, but at 2.4 to 6 times the memory traffic.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from welltuned.kernels.nf4 import FrozenWeight


def mixed(z: int) -> int:
    """splitmix64's finaliser: torch's CPU generator reads 32 bits of a seed, so every bit of z must reach them."""
    z &= 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) & 0x7FFFFFFFFFFFFFFF


@dataclass(frozen=True, slots=True)
class Dropout:
    """Dropout whose mask is a pure function of (key of the example, projection), not of the batch around it.

    So cutting a batch differently, recomputing under activation checkpointing or resuming draws the same masks.

    Args:
        p: share of inputs dropped, 0 <= p < 1; of several adapters the largest, 0 where none drops.
        spans: (rows, key) of each example in the order of the packed rows.
        p_of_span: each example's own share, where adapters differ in it; empty: p for all.
    """

    p: float = 0.0
    spans: tuple[tuple[int, int], ...] = ()
    p_of_span: tuple[float, ...] = ()

    def mask(self, x_NI: Tensor, projection: int) -> Tensor:
        """The mask [N, I], zeros and 1/(1-p), in x's dtype."""
        mask_NI = torch.empty_like(x_NI)
        generator, start = torch.Generator(device=x_NI.device), 0
        for (rows, key), p in zip(self.spans, self.p_of_span or (self.p,) * len(self.spans), strict=True):
            part_NI = mask_NI[start : start + rows]
            if p:
                generator.manual_seed(mixed(key * 0x9E3779B97F4A7C15 + projection))
                part_NI.bernoulli_(1.0 - p, generator=generator).mul_(1.0 / (1.0 - p))
            else:
                part_NI.fill_(1.0)
            start += rows
        if start != x_NI.shape[0]:
            raise ValueError(f"dropout spans cover {start} rows of {x_NI.shape[0]}")
        return mask_NI


@dataclass(slots=True)
class Rows:
    """How the rows of this micro-batch belong to adapters and examples. One object, shared by every projection.

    `ledger` is the same as a tensor, where compiled layers read it (kernels/nodes.py).
    """

    per_adapter: tuple[int, ...] | None = None  # None: every row belongs to adapter 0
    dropout: Dropout = field(default_factory=Dropout)
    ledger: Tensor | None = None

    def spans(self, n: int) -> list[tuple[int, slice]]:
        if self.per_adapter is None:
            return [(0, slice(0, n))]
        if sum(self.per_adapter) != n:
            raise ValueError(f"rows per adapter {self.per_adapter} do not add up to {n}")
        spans, start = [], 0
        for k, rows in enumerate(self.per_adapter):
            if rows:
                spans.append((k, slice(start, start + rows)))
            start += rows
        return spans

    @contextmanager
    def longer(self, rows: int) -> Iterator[None]:
        """Within the block so many rows follow that belong to no example."""
        per_adapter, dropout = self.per_adapter, self.dropout
        if per_adapter is not None:
            self.per_adapter = (*per_adapter[:-1], per_adapter[-1] + rows)
        if dropout.p:
            shares = (*dropout.p_of_span, 0.0) if dropout.p_of_span else ()
            self.dropout = Dropout(dropout.p, (*dropout.spans, (rows, 0)), shares)
        try:
            yield
        finally:
            self.per_adapter, self.dropout = per_adapter, dropout

    @contextmanager
    def only(self, start: int, n: int) -> Iterator[None]:
        """Within the block these are the rows [start, start + n) of one example, run by itself."""
        per_adapter, dropout = self.per_adapter, self.dropout
        if per_adapter is not None:
            ends = list(accumulate(per_adapter))
            self.per_adapter = tuple(
                max(0, min(end, start + n) - max(end - rows, start))
                for end, rows in zip(ends, per_adapter, strict=True)
            )
        if dropout.p:
            starts = accumulate((rows for rows, _ in dropout.spans), initial=0)
            inside = [i for i, at in enumerate(starts) if i < len(dropout.spans) and start <= at < start + n]
            shares = tuple(dropout.p_of_span[i] for i in inside) if dropout.p_of_span else ()
            self.dropout = Dropout(dropout.p, tuple(dropout.spans[i] for i in inside), shares)
        try:
            yield
        finally:
            self.per_adapter, self.dropout = per_adapter, dropout


@dataclass(slots=True, weakref_slot=True, eq=False)
class Projection:
    """One adapted projection. `scale_K` is s of each adapter; `index` tells projections apart for dropout.

    `taken`: (A0_KRI, B0_KOR), frozen, where adapters start at a part of the weights: W - s B0 A0 stands in W's place.
    """

    weight: FrozenWeight
    scale_K: Tensor | Sequence[float]
    index: int = 0
    taken: tuple[Tensor, Tensor] | None = None


def lora_reference(
    x_NI: Tensor, p: Projection, a_KRI: Tensor, b_KOR: Tensor, bias_O: Tensor | None, rows: Rows
) -> Tensor:
    """The same projection by plain autograd: what the fused op must equal."""
    y_NO = x_NI @ p.weight.dense(x_NI.dtype).t()
    if bias_O is not None:
        y_NO = y_NO + bias_O
    dropped_NI = x_NI * rows.dropout.mask(x_NI, p.index) if rows.dropout.p else x_NI
    parts = [
        float(p.scale_K[k]) * (dropped_NI[span] @ a_KRI[k].t()) @ b_KOR[k].t() for k, span in rows.spans(x_NI.shape[0])
    ]
    if p.taken is not None:
        a0, b0 = p.taken
        spans = enumerate(rows.spans(x_NI.shape[0]))
        parts = [parts[i] - float(p.scale_K[k]) * x_NI[span] @ a0[k].t() @ b0[k].t() for i, (k, span) in spans]
    return y_NO + torch.cat(parts)


@dataclass(frozen=True, slots=True)
class _Even:
    """Adapters `first` to `first + k - 1` with equally many rows each: one batched product does for all of them."""

    first: int
    k: int

    def of(self, t_K: Tensor, dtype: torch.dtype) -> Tensor:
        return t_K[self.first : self.first + self.k].to(dtype)

    def rows(self, t_N: Tensor) -> Tensor:
        """[N, ...] as [K, N/K, ...]."""
        return t_N.view(self.k, -1, t_N.shape[1])


def _even(spans: list[tuple[int, slice]]) -> _Even | None:
    if not spans:
        return None
    first, last = spans[0][0], spans[-1][0]
    counts = {span.stop - span.start for _, span in spans}
    return _Even(first, len(spans)) if len(spans) == last - first + 1 > 1 and len(counts) == 1 else None


def _scale(s_NR: Tensor, spans: list[tuple[int, slice]], scale_K: Tensor | Sequence[float]) -> None:
    """Multiply each adapter's rows by its scale, in one go where all are the same."""
    scales = [float(scale_K[k]) for k, _ in spans]
    if len(set(scales)) == 1:
        s_NR.mul_(scales[0])
        return
    for scale, (_, span) in zip(scales, spans, strict=True):
        s_NR[span].mul_(scale)


def project(
    x_NI: Tensor, p: Projection, a_KRI: Tensor, b_KOR: Tensor, bias_O: Tensor | None, rows: Rows
) -> tuple[Tensor, Tensor]:
    """Forward without autograd: (y_NO, S_NR) with S = s drop(x) A^T, scaled, so that dB = dY^T S needs no scaling."""
    w_OI = p.weight.lent(x_NI.dtype)
    y_NO = x_NI @ w_OI.t() if bias_O is None else torch.addmm(bias_O.to(x_NI.dtype), x_NI, w_OI.t())
    in_NI = x_NI * rows.dropout.mask(x_NI, p.index) if rows.dropout.p else x_NI
    s_NR = x_NI.new_empty(x_NI.shape[0], a_KRI.shape[1])
    spans = rows.spans(x_NI.shape[0])
    if p.taken is None and (even := _even(spans)) is not None:
        a, b = even.of(a_KRI, x_NI.dtype), even.of(b_KOR, x_NI.dtype)
        torch.bmm(even.rows(in_NI), a.transpose(1, 2), out=even.rows(s_NR))
        _scale(s_NR, spans, p.scale_K)
        even.rows(y_NO).baddbmm_(even.rows(s_NR), b.transpose(1, 2))
        return y_NO, s_NR
    for k, span in spans:
        torch.mm(in_NI[span], a_KRI[k].to(x_NI.dtype).t(), out=s_NR[span]).mul_(float(p.scale_K[k]))
        y_NO[span].addmm_(s_NR[span], b_KOR[k].to(x_NI.dtype).t())
        if p.taken is not None:
            a0_RI, b0_OR = (t[k].to(x_NI.dtype) for t in p.taken)
            y_NO[span].addmm_(x_NI[span] @ a0_RI.t(), b0_OR.t(), alpha=-float(p.scale_K[k]))
    return y_NO, s_NR


def _stacked(parts: dict[int, Tensor], like_K: Tensor) -> Tensor:
    """Gradients of adapters as one tensor [K, ...] in the adapters' dtype; zero for an adapter without rows."""
    if like_K.shape[0] == 1 and parts:
        return parts[0][None].to(like_K.dtype)
    stacked = torch.zeros_like(like_K)
    for k, part in parts.items():
        stacked[k] = part
    return stacked


def project_backward(
    g_NO: Tensor,
    x_NI: Tensor,
    s_NR: Tensor,
    p: Projection,
    a_KRI: Tensor,
    b_KOR: Tensor,
    rows: Rows,
    dx_NI: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(dx_NI, dA_KRI, dB_KOR); dx is added to `dx_NI` in place where one is given (several projections of one x)."""
    mask_NI = rows.dropout.mask(x_NI, p.index) if rows.dropout.p else None
    in_NI = x_NI if mask_NI is None else x_NI * mask_NI
    ds_NR = torch.empty_like(s_NR)
    spans = rows.spans(x_NI.shape[0])
    even = _even(spans) if p.taken is None else None
    if even is not None:
        torch.bmm(even.rows(g_NO), even.of(b_KOR, g_NO.dtype), out=even.rows(ds_NR))
        _scale(ds_NR, spans, p.scale_K)
        db = torch.bmm(even.rows(s_NR).transpose(1, 2), even.rows(g_NO)).transpose(1, 2)
        da = torch.bmm(even.rows(ds_NR).transpose(1, 2), even.rows(in_NI))
        da_KRI, db_KOR = _placed(da, a_KRI, even), _placed(db, b_KOR, even)
    else:
        das, dbs = {}, {}
        for k, span in spans:
            torch.mm(g_NO[span], b_KOR[k].to(g_NO.dtype), out=ds_NR[span]).mul_(float(p.scale_K[k]))
            # S^T g is a wide product, g^T S a tall one: the wide one is 1.5 times faster on the CPU.
            dbs[k] = (s_NR[span].t() @ g_NO[span]).t()
            das[k] = ds_NR[span].t() @ in_NI[span]
        da_KRI, db_KOR = _stacked(das, a_KRI), _stacked(dbs, b_KOR)
    if not needs_dx:
        return None, da_KRI, db_KOR
    w_OI = p.weight.lent(g_NO.dtype)
    dx_NI = torch.mm(g_NO, w_OI) if dx_NI is None else dx_NI.addmm_(g_NO, w_OI)
    _add_through(dx_NI, ds_NR, mask_NI, a_KRI, spans, even)
    if p.taken is not None:
        for k, span in spans:
            a0_RI, b0_OR = (t[k].to(g_NO.dtype) for t in p.taken)
            dx_NI[span].addmm_(g_NO[span] @ b0_OR, a0_RI, alpha=-float(p.scale_K[k]))
    return dx_NI, da_KRI, db_KOR


def _placed(parts_K: Tensor, like_K: Tensor, even: _Even) -> Tensor:
    """The batched gradients as `_stacked` gives them."""
    if even.k == like_K.shape[0]:
        return parts_K.to(like_K.dtype)
    stacked = torch.zeros_like(like_K)
    stacked[even.first : even.first + even.k] = parts_K
    return stacked


def _add_through(
    dx_NI: Tensor,
    ds_NR: Tensor,
    mask_NI: Tensor | None,
    a_KRI: Tensor,
    spans: list[tuple[int, slice]],
    even: _Even | None,
) -> None:
    """Add what comes back through the adapters, dS A, to dx."""
    if even is not None:
        a = even.of(a_KRI, dx_NI.dtype)
        if mask_NI is None:
            even.rows(dx_NI).baddbmm_(even.rows(ds_NR), a)
        else:
            dx_NI.addcmul_(torch.bmm(even.rows(ds_NR), a).view_as(dx_NI), mask_NI)
        return
    for k, span in spans:
        if mask_NI is None:
            dx_NI[span].addmm_(ds_NR[span], a_KRI[k].to(dx_NI.dtype))
        else:
            dx_NI[span].addcmul_(ds_NR[span] @ a_KRI[k].to(dx_NI.dtype), mask_NI[span])


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NI, a_KRI, b_KOR, bias_O, p, rows):  # type: ignore[no-untyped-def]
        y_NO, s_NR = project(x_NI, p, a_KRI, b_KOR, bias_O, rows)
        ctx.save_for_backward(x_NI, s_NR, a_KRI, b_KOR)
        # The micro-batch's rows may be set anew before this backward runs (checkpointing): keep this one's.
        ctx.p, ctx.rows = p, Rows(rows.per_adapter, rows.dropout)
        return y_NO

    @staticmethod
    def backward(ctx, g_NO):  # type: ignore[no-untyped-def]
        x_NI, s_NR, a_KRI, b_KOR = ctx.saved_tensors
        dx, da, db = project_backward(
            g_NO.contiguous(), x_NI, s_NR, ctx.p, a_KRI, b_KOR, ctx.rows, None, ctx.needs_input_grad[0]
        )
        dbias = g_NO.sum(0) if ctx.needs_input_grad[3] else None
        return dx, da, db, dbias, None, None


def autocast_input(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on: the fused ops choose their dtype by their input."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


@torch.compiler.disable  # Inductor has miscompiled traced LoRA backward passes; ours are nodes (kernels/nodes.py)
def lora(x_NI: Tensor, p: Projection, a_KRI: Tensor, b_KOR: Tensor, bias_O: Tensor | None, rows: Rows) -> Tensor:
    """y_NO, differentiable in x, A, B and the bias; W is frozen. A and B keep their own dtype (fp32 master weights)."""
    if not torch.is_grad_enabled():  # sampling: nothing to be kept for a backward pass
        return project(autocast_input(x_NI), p, a_KRI, b_KOR, bias_O, rows)[0]
    y_NO: Tensor = _Lora.apply(autocast_input(x_NI), a_KRI, b_KOR, bias_O, p, rows)
    return y_NO
