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
        p: share of inputs dropped, 0 <= p < 1.
        spans: (rows, key) of each example in the order of the packed rows.
    """

    p: float = 0.0
    spans: tuple[tuple[int, int], ...] = ()

    def mask(self, x_NI: Tensor, projection: int) -> Tensor:
        """The mask [N, I], zeros and 1/(1-p), in x's dtype."""
        mask_NI = torch.empty_like(x_NI)
        generator, start = torch.Generator(device=x_NI.device), 0
        for rows, key in self.spans:
            generator.manual_seed(mixed(key * 0x9E3779B97F4A7C15 + projection))
            mask_NI[start : start + rows].bernoulli_(1.0 - self.p, generator=generator)
            start += rows
        if start != x_NI.shape[0]:
            raise ValueError(f"dropout spans cover {start} rows of {x_NI.shape[0]}")
        return mask_NI.mul_(1.0 / (1.0 - self.p))


@dataclass(slots=True)
class Rows:
    """How the rows of this micro-batch belong to adapters and examples. One object, shared by every projection."""

    per_adapter: tuple[int, ...] | None = None  # None: every row belongs to adapter 0
    dropout: Dropout = field(default_factory=Dropout)

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
            inside = zip(starts, dropout.spans, strict=False)
            self.dropout = Dropout(dropout.p, tuple(span for at, span in inside if start <= at < start + n))
        try:
            yield
        finally:
            self.per_adapter, self.dropout = per_adapter, dropout


@dataclass(slots=True)
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


def project(
    x_NI: Tensor, p: Projection, a_KRI: Tensor, b_KOR: Tensor, bias_O: Tensor | None, rows: Rows
) -> tuple[Tensor, Tensor]:
    """Forward without autograd: (y_NO, S_NR) with S = s drop(x) A^T, scaled, so that dB = dY^T S needs no scaling."""
    w_OI = p.weight.dense(x_NI.dtype)
    y_NO = x_NI @ w_OI.t() if bias_O is None else torch.addmm(bias_O.to(x_NI.dtype), x_NI, w_OI.t())
    in_NI = x_NI * rows.dropout.mask(x_NI, p.index) if rows.dropout.p else x_NI
    s_NR = x_NI.new_empty(x_NI.shape[0], a_KRI.shape[1])
    for k, span in rows.spans(x_NI.shape[0]):
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
    da, db = {}, {}
    spans = rows.spans(x_NI.shape[0])
    for k, span in spans:
        torch.mm(g_NO[span], b_KOR[k].to(g_NO.dtype), out=ds_NR[span]).mul_(float(p.scale_K[k]))
        # S^T g is a wide product, g^T S a tall one: the wide one is 1.5 times faster on the CPU.
        db[k] = (s_NR[span].t() @ g_NO[span]).t()
        da[k] = ds_NR[span].t() @ in_NI[span]
    da_KRI, db_KOR = _stacked(da, a_KRI), _stacked(db, b_KOR)
    if not needs_dx:
        return None, da_KRI, db_KOR
    w_OI = p.weight.dense(g_NO.dtype)
    dx_NI = torch.mm(g_NO, w_OI) if dx_NI is None else dx_NI.addmm_(g_NO, w_OI)
    for k, span in spans:
        if mask_NI is None:
            dx_NI[span].addmm_(ds_NR[span], a_KRI[k].to(g_NO.dtype))
        else:
            dx_NI[span].addcmul_(ds_NR[span] @ a_KRI[k].to(g_NO.dtype), mask_NI[span])
        if p.taken is not None:
            a0_RI, b0_OR = (t[k].to(g_NO.dtype) for t in p.taken)
            dx_NI[span].addmm_(g_NO[span] @ b0_OR, a0_RI, alpha=-float(p.scale_K[k]))
    return dx_NI, da_KRI, db_KOR


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


@torch.compiler.disable  # Inductor has miscompiled traced LoRA backward passes: keep it opaque
def lora(x_NI: Tensor, p: Projection, a_KRI: Tensor, b_KOR: Tensor, bias_O: Tensor | None, rows: Rows) -> Tensor:
    """y_NO, differentiable in x, A, B and the bias; W is frozen. A and B keep their own dtype (fp32 master weights)."""
    if not torch.is_grad_enabled():  # sampling: nothing to be kept for a backward pass
        return project(autocast_input(x_NI), p, a_KRI, b_KOR, bias_O, rows)[0]
    y_NO: Tensor = _Lora.apply(autocast_input(x_NI), a_KRI, b_KOR, bias_O, p, rows)
    return y_NO
