"""Frozen projections: what the adapters stand on, dense or 4-bit."""

from collections.abc import Callable, Mapping
from copy import copy
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from welltuned.errors import InputError
from welltuned.kernels.nf4 import DenseWeight, FrozenWeight, LiveWeight, NF4Weight
from welltuned.kernels.nodes import frozen_node, handle_of

# Routers pick experts: "all linear" does not mean them. State-space layers use dt_proj's weight without calling it.
# A reward model's head is trained as it is.
LEFT_ALONE = ("gate", "router", "shared_expert_gate", "dt_proj", "score")


def is_projection(module: nn.Module) -> bool:
    """Whether this is a plain x W^T + b: Falcon's own nn.Linear is one, DeepSeek-V4's multiplies in groups."""
    if not isinstance(module, (nn.Linear, Conv1D, NF4Linear)):
        return False
    known = (nn.Linear.forward, Conv1D.forward, NF4Linear.forward)
    return type(module).forward in known or _multiplies(module)


def _multiplies(linear: nn.Module) -> bool:
    """A kind of nn.Linear with a forward of its own, tried with small numbers in the place of its weight."""
    with torch.no_grad(), torch.device("cpu"):  # also while transformers builds a model on the meta device
        tiny = copy(linear)
        weight, bias = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(1, 2, 3)
        has_bias = linear._parameters.get("bias") is not None
        tiny.__dict__["_parameters"] = {"weight": weight, "bias": bias if has_bias else None}
        x = torch.linspace(-2, 2, 8).view(1, 2, 4)
        try:
            y = tiny.forward(x)
        except (RuntimeError, AttributeError, ValueError, TypeError):
            return False
        expected = torch.nn.functional.linear(x, weight, bias if has_bias else None)
        return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, atol=1e-6)


class _FrozenLinear(torch.autograd.Function):
    """x W^T + b for a frozen W that is dequantised afresh in the backward pass rather than kept dense."""

    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.weight = weight
        return torch.nn.functional.linear(x, weight.lent(x.dtype), bias)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        dx = g @ ctx.weight.lent(g.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, g.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


class NF4Linear(nn.Module):
    """A linear layer whose frozen weight is stored in NF4 with double quantisation."""

    def __init__(self, weight: NF4Weight, bias: nn.Parameter | None):
        super().__init__()
        self.frozen = weight
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)
        self.handle: Tensor | None = None

    def as_node(self) -> None:
        """Be one node of a compiled layer."""
        self.handle = handle_of(self.frozen)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Linear":
        super()._apply(fn, recurse)
        self.frozen = self.frozen.to(fn(self.frozen.packed[:0]).device)  # `model.to(device)` takes the codes along
        return self

    def forward(self, x: Tensor) -> Tensor:
        held = self._parameters["bias"]
        bias = None if held is None else held.to(x.dtype)
        if torch.compiler.is_compiling() and self.handle is not None:
            y_NO = frozen_node(x.reshape(-1, self.in_features), bias, self.handle, self.out_features)
            return y_NO.view(*x.shape[:-1], self.out_features)
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


def live_weight(module: nn.Module) -> LiveWeight:
    """The same, read from the module whenever it is asked for; where it lies in pieces, all ranks must ask together."""
    before, transposed = frozen_weight(module), isinstance(module, Conv1D)

    def read() -> Tensor:
        from torch.distributed.tensor import DTensor

        weight = module.get_parameter("weight").detach()
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        return whole.t() if transposed else whole

    return LiveWeight(read, before.shape)


def quantisable(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that 4 bits are meant for: all but the head and routers."""
    head = model.get_output_embeddings()
    return [
        f"{prefix}.{leaf}" if prefix else leaf
        for prefix, parent in model.named_modules()
        for leaf, child in parent.named_children()
        if is_projection(child) and not isinstance(child, NF4Linear) and child is not head and leaf not in LEFT_ALONE
    ]


def quantize_linears(model: PreTrainedModel, ready: Mapping[str, NF4Weight] = MappingProxyType({})) -> int:
    """Replace every linear layer but the head and routers by an NF4 one, freeing dense weights as it goes; how many.

    Args:
        ready: weights that were quantised while they were read, by module name.
    """
    names = quantisable(model)
    for name in names:
        module = model.get_submodule(name)
        weight = ready.get(name)
        if weight is None:
            weight = NF4Weight.quantize(frozen_weight(module).dense(module.weight.dtype))
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent).register_module(leaf, NF4Linear(weight, module.bias))
    return len(names)
