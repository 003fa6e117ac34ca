"""Log-probability of each target, log softmax(head(h_m) / T)[target_m], differentiable; the logits never held whole.

For losses whose weights depend on the log-probabilities themselves (ratios, clipping, KL, preference margins), so that
the upstream gradient is not known in the forward pass, as it is for `token_loss`. A row's log-probability depends on
its own hidden state only: the whole Jacobian of a frozen head is one vector a row, (W_target - E_p[W]) / T, which the
forward pass forms at the price of two matrix products and the backward pass scales. A trained head needs the upstream
gradient for its own: there the forward pass keeps the log-sum-exp, and the backward pass goes over the tiles again
(four products, as autograd through the logits has, less the keeping of them).
"""

import torch
from torch import Tensor

from welltuned.kernels.token_loss import Head, HeadGradient, add_gradients, log_sum, tile_of


def cooled(head: Head, temperature: float) -> Head:
    """The head whose logits are divided by `temperature`: c tanh(z / c) / T = (c / T) tanh((z / T) / (c / T))."""
    if temperature == 1.0:
        return head
    cap = None if head.softcap is None else head.softcap / temperature
    return Head(head.w_VH, head.bias_V, head.scale / temperature, cap)


def token_logprob_reference(
    h_MH: Tensor, head: Head, target_M: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(logprob_M, entropy_M detached) by plain autograd."""
    z_MV = head.logits(h_MH).to(torch.promote_types(h_MH.dtype, torch.float32)) / temperature
    log_p_MV = z_MV.log_softmax(-1)
    entropy_M = -(log_p_MV.exp() * log_p_MV).sum(-1)
    return log_p_MV.gather(1, target_M[:, None])[:, 0], entropy_M.detach()


def _blocks(h_MH: Tensor) -> list[slice]:
    rows = tile_of(h_MH)[0]
    return [slice(start, start + rows) for start in range(0, h_MH.shape[0], rows)]


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_MH, w_VH, bias_V, head, target_M, entropy, grads):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(h_MH.dtype, torch.float32)
        needs_h, *needs_head = (grads and needed for needed in ctx.needs_input_grad[:3])
        one_pass = needs_h and not any(needs_head) and head.softcap is None
        jacobian_MH = torch.empty_like(h_MH) if needs_h and not any(needs_head) else None
        lse_M1, logprob_M, entropy_M = (
            torch.empty(h_MH.shape[0], *shape, dtype=wide, device=h_MH.device) for shape in ((1,), (), ())
        )
        for rows in _blocks(h_MH):
            h, target = h_MH[rows], target_M[rows]
            dh = None if jacobian_MH is None else torch.zeros(h.shape, dtype=wide, device=h.device)
            moment = torch.zeros(h.shape[0], 1, dtype=wide, device=h.device) if entropy else None
            lse, total, at_target = log_sum(h, head, target, dh if one_pass else None, wide, moment)
            lse_M1[rows], logprob_M[rows] = lse, (at_target - lse)[:, 0]
            if moment is not None:
                entropy_M[rows] = (lse - moment.div_(total))[:, 0].clamp_min_(0.0)
            if dh is not None and one_pass:
                dh.div_(total).sub_(head.w_VH[target]).mul_(-head.scale)
            elif dh is not None:
                add_gradients(h, head, target, -torch.ones_like(lse[:, 0]), lse, dh, HeadGradient(None, None))
            if jacobian_MH is not None and dh is not None:
                jacobian_MH[rows] = dh
        ctx.head, ctx.needs_head = head, needs_head
        if any(needs_head):
            ctx.save_for_backward(h_MH, target_M, lse_M1)
        else:
            ctx.save_for_backward(jacobian_MH)
        ctx.mark_non_differentiable(entropy_M)
        return logprob_M, entropy_M

    @staticmethod
    def backward(ctx, g_M, _):  # type: ignore[no-untyped-def]
        nothing = None, None, None, None
        if not any(ctx.needs_head):
            (jacobian_MH,) = ctx.saved_tensors
            return (jacobian_MH * g_M[:, None]).to(jacobian_MH.dtype), None, None, *nothing
        h_MH, target_M, lse_M1 = ctx.saved_tensors
        head, dh_MH = ctx.head, torch.zeros_like(h_MH, dtype=lse_M1.dtype)
        dw, db = (
            torch.zeros_like(t) if needed else None
            for t, needed in zip((head.w_VH, head.bias_V), ctx.needs_head, strict=True)
        )
        for rows in _blocks(h_MH):
            add_gradients(h_MH[rows], head, target_M[rows], -g_M[rows], lse_M1[rows], dh_MH[rows], HeadGradient(dw, db))
        return dh_MH.to(h_MH.dtype) if ctx.needs_input_grad[0] else None, dw, db, *nothing


@torch.compiler.disable
def token_logprob(
    h_MH: Tensor, head: Head, target_M: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(log-probability of each target, entropy of each row's distribution without gradient), in nats, [M] each.

    Args:
        h_MH: hidden states that predict the targets, any float dtype; sums run in fp32 or wider.
        head: the output embedding; trained where its tensors require gradients, else frozen.
        target_M: token ids, int64, each in [0, V).
        temperature: the logits are divided by it; above 0.
        entropy: whether the entropy is wanted; it costs a pass over each tile. None is returned where it is not.
    """
    logprob_M, entropy_M = _TokenLogprob.apply(
        h_MH, head.w_VH, head.bias_V, cooled(head, temperature), target_M, entropy, torch.is_grad_enabled()
    )
    return logprob_M, entropy_M if entropy else None
