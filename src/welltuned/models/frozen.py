"""Frozen projections: what the adapters stand on, dense or 4-bit."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from welltuned.errors import InputError
from welltuned.kernels.nf4 import DenseWeight, FrozenWeight, NF4Weight

# Routers pick experts: "all linear" does not mean them. State-space layers use dt_proj's weight without calling it.
LEFT_ALONE = ("gate", "router", "shared_expert_gate", "dt_proj")


class _FrozenLinear(torch.autograd.Function):
    """x W^T + b for a frozen W that is dequantised afresh in the backward pass rather than kept dense."""

    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.weight = weight
        return torch.nn.functional.linear(x, weight.dense(x.dtype), bias)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        dx = g @ ctx.weight.dense(g.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, g.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


class NF4Linear(nn.Module):
    """A linear layer whose frozen weight is stored in NF4 with double quantisation."""

    def __init__(self, weight: NF4Weight, bias: nn.Parameter | None):
        super().__init__()
        self.frozen = weight
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Linear":
        super()._apply(fn, recurse)
        self.frozen = self.frozen.to(fn(self.frozen.packed[:0]).device)  # `model.to(device)` takes the codes along
        return self

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = _FrozenLinear.apply(x, self.frozen, bias)
        return y


def frozen_weight(module: nn.Module) -> FrozenWeight:
    """The module's weight as [out, in], without a copy."""
    if isinstance(module, NF4Linear):
        return module.frozen
    if isinstance(module, Conv1D):
        return DenseWeight(module.weight.detach().t())
    if isinstance(module, nn.Linear):
        return DenseWeight(module.weight.detach())
    raise InputError(f"{type(module).__name__} is not a projection that LoRA can stand on", where="target_modules")


def quantize_linears(model: PreTrainedModel) -> int:
    """Replace every linear layer but the head and routers by an NF4 one, freeing dense weights as it goes; how many."""
    head, done = model.get_output_embeddings(), 0
    for parent in list(model.modules()):
        for leaf, child in list(parent.named_children()):
            if isinstance(child, (nn.Linear, Conv1D)) and child is not head and leaf not in LEFT_ALONE:
                parent.register_module(
                    leaf, NF4Linear(NF4Weight.quantize(frozen_weight(child).dense(child.weight.dtype)), child.bias)
                )
                done += 1
    return done
