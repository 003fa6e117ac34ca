"""Head loss on labelled rows only: sum_m weight_m * -log softmax(head(h_m))[target_m], the logits never held whole.

The gradient of h is formed in the forward pass, a block of rows and a tile of the vocabulary at a time, so that a tile
of logits stays in cache: two matrix products for a frozen head, three for a trained one. The log-sum-exp runs online
over the tiles with a running maximum (Milakov & Gimelshein 2018, arXiv 1805.02867), in fp32 or wider.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256  # rows a block
COLUMNS = 2048  # vocabulary entries a tile: 256 x 2048 fp32 logits are 2 MiB; 8192 is a tenth slower on two cores
ON_GPU = 2048, 16_384  # there: 419 launches for 4,096 rows of 128,256 entries, against 24,451, and whole products


def _tile_of(h_MH: Tensor) -> tuple[int, int]:
    """(rows, vocabulary entries) of a tile of logits on this device."""
    return ON_GPU if h_MH.is_cuda else (ROWS, COLUMNS)


@dataclass(frozen=True, slots=True)
class Head:
    """logits_MV = softcap(scale * (h_MH W_VH^T + b_V)); softcap(z) = c tanh(z / c) (Gemma 2, arXiv 2408.00118)."""

    w_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, h_MH: Tensor) -> Tensor:
        z = F.linear(h_MH, self.w_VH, self.bias_V) * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def token_loss_reference(h_MH: Tensor, head: Head, target_M: Tensor, weight_M: Tensor) -> tuple[Tensor, Tensor]:
    """(weighted sum, nll_M) by plain autograd."""
    nll_M = F.cross_entropy(
        head.logits(h_MH).float() if h_MH.dtype.itemsize < 4 else head.logits(h_MH), target_M, reduction="none"
    )
    return (nll_M * weight_M).sum(), nll_M.detach()


def _tile(h: Tensor, head: Head, columns: slice, wide: torch.dtype) -> Tensor:
    """Logits of some rows against some vocabulary entries, scaled, before soft-capping."""
    w = head.w_VH[columns]
    z = h @ w.t() if head.bias_V is None else torch.addmm(head.bias_V[columns], h, w.t())
    z = z.to(wide)
    return z if head.scale == 1.0 else z.mul_(head.scale)


def _block(h: Tensor, head: Head, target: Tensor, weight: Tensor, grads: bool, dw: Tensor | None, db: Tensor | None):  # type: ignore[no-untyped-def]
    """(nll_M, dh_MH or None) of one block of rows; adds to dw and db where the head is trained."""
    wide = torch.promote_types(h.dtype, torch.float32)
    vocabulary, m, width = head.w_VH.shape[0], h.shape[0], _tile_of(h)[1]
    top = torch.full((m, 1), -torch.inf, dtype=wide, device=h.device)
    total = torch.zeros_like(top)
    at_target = torch.zeros_like(top)
    capped = head.softcap is not None
    online = grads and not capped and dw is None and db is None
    dh = torch.zeros(m, h.shape[1], dtype=wide, device=h.device) if grads else None
    rows = torch.arange(m, device=h.device)
    for start in range(0, vocabulary, width):
        columns = slice(start, min(start + width, vocabulary))
        z = _tile(h, head, columns, wide)
        if capped:
            z = z.div_(head.softcap).tanh_().mul_(head.softcap)
        inside = (target >= columns.start) & (target < columns.stop)
        column = (target - start).clamp(0, z.shape[1] - 1)[:, None]
        at_target += torch.where(inside[:, None], z.gather(1, column), 0.0)
        new_top = torch.maximum(top, z.amax(1, keepdim=True))
        fade = (top - new_top).exp_()
        p = z.sub_(new_top).exp_()
        total.mul_(fade).add_(p.sum(1, keepdim=True))
        top = new_top
        if online:
            assert dh is not None
            dh.mul_(fade).addmm_(p.to(h.dtype), head.w_VH[columns]) if h.dtype == wide else dh.mul_(fade).add_(
                p.to(h.dtype) @ head.w_VH[columns]
            )
    lse = total.log().add_(top)
    nll = (lse - at_target)[:, 0]
    if not grads:
        return nll, None
    assert dh is not None
    if online:
        dh.div_(total).sub_(head.w_VH[target]).mul_(weight[:, None] * head.scale)
        return nll, dh
    for start in range(0, vocabulary, width):  # soft-capped or trained head: logits again, now that the sum is known
        columns = slice(start, min(start + width, vocabulary))
        z = _tile(h, head, columns, wide)
        slope = None
        if capped:
            t = z.div_(head.softcap).tanh_()
            slope = 1.0 - t * t
            z = t * head.softcap
        p = z.sub_(lse).exp_()
        inside = (target >= columns.start) & (target < columns.stop)
        p[rows[inside], (target - start)[inside]] -= 1.0
        p.mul_(weight[:, None] * head.scale)
        if slope is not None:
            p.mul_(slope)
        q = p.to(h.dtype)
        dh.add_(q @ head.w_VH[columns])
        if dw is not None:
            dw[columns].addmm_(q.t(), h)
        if db is not None:
            db[columns].add_(p.sum(0))
    return nll, dh


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_MH, w_VH, bias_V, head, target_M, weight_M):  # type: ignore[no-untyped-def]
        grads = any(ctx.needs_input_grad[:3])
        dw = torch.zeros_like(w_VH) if ctx.needs_input_grad[1] else None
        db = torch.zeros_like(bias_V) if ctx.needs_input_grad[2] else None
        nll_M = torch.empty(h_MH.shape[0], dtype=torch.promote_types(h_MH.dtype, torch.float32), device=h_MH.device)
        dh_MH = torch.empty_like(h_MH) if grads else None
        weight_M = weight_M.to(nll_M.dtype)
        rows = _tile_of(h_MH)[0]
        for start in range(0, h_MH.shape[0], rows):
            block = slice(start, start + rows)
            nll_M[block], dh = _block(h_MH[block], head, target_M[block], weight_M[block], grads, dw, db)
            if dh is not None:
                dh_MH[block] = dh
        ctx.save_for_backward(dh_MH, dw, db)
        ctx.mark_non_differentiable(nll_M)
        return (nll_M * weight_M).sum(), nll_M

    @staticmethod
    def backward(ctx, g, _):  # type: ignore[no-untyped-def]
        dh_MH, dw, db = ctx.saved_tensors
        return (
            dh_MH * g if ctx.needs_input_grad[0] else None,
            None if dw is None else dw * g,
            None if db is None else db * g,
            None,
            None,
            None,
        )


@torch.compiler.disable
def token_loss(h_MH: Tensor, head: Head, target_M: Tensor, weight_M: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of negative log-likelihoods (a scalar, in nats) and each row's own (detached).

    Args:
        h_MH: hidden states that predict the targets, any float dtype; sums run in fp32 or wider.
        head: the output embedding; trained where its tensors require gradients, else frozen.
        target_M: token ids, int64, each in [0, V).
        weight_M: weight of each row in the sum (1 / supervised tokens of the whole update for SFT).
    """
    total, nll_M = _TokenLoss.apply(h_MH, head.w_VH, head.bias_V, head, target_M, weight_M)
    return total, nll_M
