"""Head loss on labelled rows only: sum_m weight_m * -log softmax(head(h_m))[target_m], the logits never held whole.

The gradient of h is formed in the forward pass, a block of rows and a tile of the vocabulary at a time, so that a tile
of logits stays in cache: two matrix products for a frozen head, three for a trained one. The log-sum-exp runs online
over the tiles with a running maximum (Milakov & Gimelshein 2018, arXiv 1805.02867), in fp32 or wider.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# (rows, vocabulary entries) of a tile. On the CPU 2048 x 512 fp32 logits are 4 MiB and stay in cache, and the head's
# weights are read once for 2048 rows: 1,101 rows take 12 % less time than in tiles of 256 x 2048 (benchmarks/LOG.md).
ON_CPU = 2048, 512
ON_GPU = 2048, 16_384  # 419 launches for 4,096 rows of 128,256 entries, and whole products


def tile_of(h_MH: Tensor) -> tuple[int, int]:
    """(rows, vocabulary entries) of a tile of logits on this device."""
    return ON_GPU if h_MH.is_cuda else ON_CPU


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


def _tiles(h: Tensor, head: Head, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Tiles of the vocabulary, each with its scaled logits."""
    vocabulary, width = head.w_VH.shape[0], tile_of(h)[1]
    for start in range(0, vocabulary, width):
        columns = slice(start, min(start + width, vocabulary))
        yield columns, _tile(h, head, columns, wide)


def log_sum(
    h: Tensor, head: Head, target: Tensor, dh: Tensor | None, wide: torch.dtype, moment: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-sum-exp, sum of exp(z - max), logit of the target), each [m, 1], in one pass over the tiles.

    Where `dh` [m, H] is given, sum_v exp(z_v - max) W_v is left in it: divided by the sum it is the expected embedding.
    Where `moment` [m, 1] is given, sum_v exp(z_v - max) z_v is left in it: divided by the sum, the expected logit.
    """
    top = torch.full((h.shape[0], 1), -torch.inf, dtype=wide, device=h.device)
    total, at_target = torch.zeros_like(top), torch.zeros_like(top)
    for columns, z in _tiles(h, head, wide):
        if head.softcap is not None:
            z = z.div_(head.softcap).tanh_().mul_(head.softcap)
        inside = (target >= columns.start) & (target < columns.stop)
        column = (target - columns.start).clamp(0, z.shape[1] - 1)[:, None]
        at_target += torch.where(inside[:, None], z.gather(1, column), 0.0)
        new_top = torch.maximum(top, z.amax(1, keepdim=True))
        fade = (top - new_top).exp_()
        p = z.sub_(new_top).exp_() if moment is None else (z - new_top).exp_()
        if moment is not None:
            moment.mul_(fade).add_(torch.linalg.vecdot(p, z)[:, None])
        total.mul_(fade).add_(p.sum(1, keepdim=True))
        top = new_top
        if dh is not None and h.dtype == wide:
            dh.mul_(fade).addmm_(p, head.w_VH[columns])
        elif dh is not None:
            dh.mul_(fade).add_(p.to(h.dtype) @ head.w_VH[columns])
    return total.log().add_(top), total, at_target


def add_gradients(
    h: Tensor, head: Head, target: Tensor, weight: Tensor, lse: Tensor, dh: Tensor, trained: "HeadGradient"
) -> None:
    """Add the gradients of one block of rows by a second pass: for soft-capped or trained heads."""
    rows = torch.arange(h.shape[0], device=h.device)
    for columns, z in _tiles(h, head, lse.dtype):
        slope = None
        if head.softcap is not None:
            t = z.div_(head.softcap).tanh_()
            slope, z = 1.0 - t * t, t * head.softcap
        p = z.sub_(lse).exp_()
        inside = (target >= columns.start) & (target < columns.stop)
        p[rows[inside], (target - columns.start)[inside]] -= 1.0
        p.mul_(weight[:, None] * head.scale)
        if slope is not None:
            p.mul_(slope)
        q = p.to(h.dtype)
        dh.add_(q @ head.w_VH[columns])
        if trained.w_VH is not None:
            trained.w_VH[columns].addmm_(q.t(), h)
        if trained.bias_V is not None:
            # The bias is added before the scale, which p holds already.
            trained.bias_V[columns].add_(p.sum(0))


@dataclass(frozen=True, slots=True)
class HeadGradient:
    """Where a trained head's gradients are summed; None for a frozen part."""

    w_VH: Tensor | None
    bias_V: Tensor | None

    @property
    def wanted(self) -> bool:
        return self.w_VH is not None or self.bias_V is not None


def _block(
    h: Tensor, head: Head, target: Tensor, weight: Tensor, grads: bool, trained: HeadGradient
) -> tuple[Tensor, Tensor | None]:
    """(nll_M, dh_MH or None) of one block of rows; a trained head's gradients are added to `trained`."""
    wide = torch.promote_types(h.dtype, torch.float32)
    one_pass = grads and head.softcap is None and not trained.wanted
    dh = torch.zeros(h.shape, dtype=wide, device=h.device) if grads else None
    lse, total, at_target = log_sum(h, head, target, dh if one_pass else None, wide)
    if dh is not None and one_pass:
        dh.div_(total).sub_(head.w_VH[target]).mul_(weight[:, None] * head.scale)
    elif dh is not None:
        add_gradients(h, head, target, weight, lse, dh, trained)
    return (lse - at_target)[:, 0], dh


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_MH, w_VH, bias_V, head, target_M, weight_M):  # type: ignore[no-untyped-def]
        grads = any(ctx.needs_input_grad[:3])
        dw = torch.zeros_like(w_VH) if ctx.needs_input_grad[1] else None
        db = torch.zeros_like(bias_V) if ctx.needs_input_grad[2] else None
        nll_M = torch.empty(h_MH.shape[0], dtype=torch.promote_types(h_MH.dtype, torch.float32), device=h_MH.device)
        dh_MH = torch.empty_like(h_MH) if grads else None
        weight_M = weight_M.to(nll_M.dtype)
        rows = tile_of(h_MH)[0]
        trained = HeadGradient(dw, db)
        for start in range(0, h_MH.shape[0], rows):
            block = slice(start, start + rows)
            nll_M[block], dh = _block(h_MH[block], head, target_M[block], weight_M[block], grads, trained)
            if dh_MH is not None and dh is not None:
                dh_MH[block] = dh
        ctx.save_for_backward(dh_MH, dw, db)
        ctx.mark_non_differentiable(nll_M)
        return (nll_M * weight_M).sum(), nll_M

    @staticmethod
    def backward(ctx, g, _):  # type: ignore[no-untyped-def]
        dh_MH, dw, db = ctx.saved_tensors
        return (
            _times(dh_MH, g) if ctx.needs_input_grad[0] else None,
            _times(dw, g),
            _times(db, g),
            None,
            None,
            None,
        )


def _times(gradient: Tensor | None, g: Tensor) -> Tensor | None:
    """gradient · g; the gradient itself where g is 1, as in `backward()`: a head's is as large as the embedding.

    Only where looking at g is free: a GPU would have to be waited for.
    """
    if gradient is None or (g.device.type == "cpu" and g.item() == 1.0):
        return gradient
    return gradient * g


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
