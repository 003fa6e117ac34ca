"""The 4-bit weights of a model together: where they are expanded, and whether they stay so."""

import torch
from torch import nn

from welltuned.errors import RunError
from welltuned.kernels.nf4 import NF4Weight, Workspace, nf4_reference
from welltuned.models.experts import NF4Experts
from welltuned.models.frozen import NF4Linear

_TRIED = 2**16  # codes


def four_bit_weights(model: nn.Module) -> list[NF4Weight]:
    """Every weight that is stored in 4 bits, experts' one by one."""
    found: list[NF4Weight] = []
    for module in model.modules():
        if isinstance(module, NF4Linear):
            found.append(module.frozen)
        elif isinstance(module, NF4Experts):
            found += [weight for stack in module.frozen.values() for weight in stack.weights]
    return found


def share_workspace(model: nn.Module) -> Workspace:
    """Expand all 4-bit weights of the model in one place, as large as the largest, from here on."""
    weights, workspace = four_bit_weights(model), Workspace()
    for weight in sorted(weights, key=lambda w: -w.shape[0] * w.shape[1])[:1]:
        workspace.of(weight.shape, weight.state.dtype, weight.packed.device)
    for weight in weights:
        weight.workspace = workspace
    return workspace


def keep_dense(model: nn.Module) -> int:
    """Expand every 4-bit weight once, and for all; the bytes that this takes. No number of the model changes."""
    return sum(weight.keep() for weight in four_bit_weights(model))


def require_exact(model: nn.Module) -> None:
    """Refuse to train on weights that this machine's bitsandbytes expands to other numbers than their codes stand for.

    Weights of each shape are tried once, by their first rows, on the device on which they lie.

    Raises:
        RunError: a weight is not what its codes say.
    """
    tried: set[tuple[int, int]] = set()
    for weight in four_bit_weights(model):
        if weight.shape in tried or weight.packed.is_meta:
            continue
        tried.add(weight.shape)
        some = weight.first(2 * max(1, _TRIED // (2 * weight.shape[1])))
        dtype = weight.state.dtype
        near = 1e-5 if dtype is torch.float32 else 2.0**-7  # one place of bfloat16: what is wrong is wrong by far more
        if not torch.allclose(some.dense(dtype), nf4_reference(some), rtol=near, atol=0.0):
            what = f"bitsandbytes expands 4-bit weights of {weight.shape[0]} by {weight.shape[1]} to wrong numbers here"
            raise RunError(f"{what}; use --tune lora, or another version of bitsandbytes")
