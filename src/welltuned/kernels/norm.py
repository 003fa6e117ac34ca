"""RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) with a frozen gain: saves x and one number a row."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x_NH: Tensor, gain_H: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain, by plain autograd."""
    return x_NH * torch.rsqrt(x_NH.pow(2).mean(-1, keepdim=True) + eps) * gain_H


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gain_H, eps):  # type: ignore[no-untyped-def]
        rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True).pow_(2).div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain_H, rstd)
        if torch.compiler.is_compiling():  # torch 2.11 loses the gradient of a result that is written in place
            return x * rstd * gain_H
        return (x * rstd).mul_(gain_H)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        x, gain_H, rstd = ctx.saved_tensors
        scaled = g * gain_H
        mean = torch.linalg.vecdot(scaled, x).unsqueeze(-1).mul_(rstd.pow(3)).div_(x.shape[-1])
        return scaled.mul_(rstd).addcmul_(x, mean, value=-1.0), None, None


def rms_norm(x: Tensor, gain_H: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, any leading shape; differentiable in x only.

    Half precision goes through torch's own op, which accumulates in fp32.
    """
    if x.dtype in (torch.float32, torch.float64):
        y: Tensor = _RMSNorm.apply(x, gain_H, eps)
        return y
    return F.rms_norm(x, (x.shape[-1],), gain_H.to(x.dtype), eps)
