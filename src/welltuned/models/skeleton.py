"""What will stay on the model's own code, found by building the model without its weights.

It is made without numbers ("meta"), which takes a second for any size. Its norms are small enough to be given
random numbers and tried; of a gated MLP the three projections are replaced by tiny ones. What only the weights can
show (a head that does something of its own) is found by `fuse`, and said by the run.
"""

from copy import deepcopy

import torch
from torch import nn
from transformers import PreTrainedModel

from welltuned.kernels.gated_mlp import FORWARD
from welltuned.models.experts import has_stacks
from welltuned.models.foresee import ONE_BY_ONE
from welltuned.models.frozen import is_projection
from welltuned.models.fuse import (
    BARE_MLPS,
    GATED,
    OTHER_MLPS,
    OTHER_NORMS,
    STACKS,
    STRANGE_MLPS,
    UNGATED_MLPS,
    Fused,
    looks_like_rms_norm,
    mlp_activation,
    rms_norm_of,
    same,
    takes_one_argument,
)
from welltuned.models.load import load_skeleton
from welltuned.models.lora import find_targets
from welltuned.models.packed import refuses_packing
from welltuned.models.resolve import NO_TRUST
from welltuned.recipe import Trust

_INPUTS, _INNER = 8, 12  # of the tiny projections


def left_plain(
    model: str, target_modules: str | tuple[str, ...] | None, *, nf4: bool, trust: Trust = NO_TRUST
) -> tuple[str, ...]:
    """Sentences on what cannot be made faster, as `Fused.sentences` says them after loading."""
    with torch.random.fork_rng(devices=[]):  # what is tried draws numbers, which the caller must not notice
        return tuple(_foreseen(load_skeleton(model, trust), target_modules, nf4))


def _foreseen(skeleton: PreTrainedModel, target_modules: str | tuple[str, ...] | None, nf4: bool) -> list[str]:
    found = Fused()
    adapted = frozenset(find_targets(skeleton, target_modules)) if target_modules is not None else frozenset()
    known: dict[type[nn.Module], str | None] = {}
    for name, module in skeleton.named_modules():
        if adapted and module._modules.keys() >= GATED:
            bare = not all(_is_plain(module.get_submodule(part), f"{name}.{part}" in adapted) for part in GATED)
            if type(module) not in known:
                known[type(module)] = _mlp_left(module)
            _count(found, BARE_MLPS if bare else known[type(module)], "gated MLP")
        elif looks_like_rms_norm(module) and adapted:
            if type(module) not in known:
                known[type(module)] = _norm_left(module)
            _count(found, known[type(module)], "RMS norm")
        elif not isinstance(module, nn.Conv1d) and has_stacks(module):
            ours = nf4 or any(f"{name}.{leaf}" in adapted for leaf in module._parameters)
            _count(found, None if ours else STACKS, "experts")
    if adapted and not found.done.keys() & {"gated MLP", "experts"} and not found.plain.keys() - {OTHER_NORMS}:
        found.plain[UNGATED_MLPS] = 1
    return [*found.sentences(), ONE_BY_ONE] if refuses_packing(skeleton) else found.sentences()


def _count(found: Fused, left: str | None, fused: str) -> None:
    if left is None:
        found.done[fused] += 1
    else:
        found.plain[left] += 1


def _is_plain(projection: nn.Module, adapted: bool) -> bool:
    return adapted and is_projection(projection) and projection._parameters.get("bias") is None


def _norm_left(norm: nn.Module) -> str | None:
    tried = deepcopy(norm).to_empty(device="cpu").float()
    with torch.no_grad():
        for parameter in tried.parameters():
            parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()))
    return None if rms_norm_of(tried) is not None else OTHER_NORMS


@torch.no_grad()
def _mlp_left(mlp: nn.Module) -> str | None:
    kind = mlp_activation(mlp)
    if kind is None:
        return STRANGE_MLPS
    if not takes_one_argument(mlp):
        return OTHER_MLPS
    tiny = deepcopy(mlp)
    shapes = {"gate_proj": (_INPUTS, _INNER), "up_proj": (_INPUTS, _INNER), "down_proj": (_INNER, _INPUTS)}
    gate, up, down = (nn.Linear(*shape, bias=False) for shape in shapes.values())
    tiny.gate_proj, tiny.up_proj, tiny.down_proj = gate, up, down
    x = torch.linspace(-1, 1, 5 * _INPUTS).view(1, 5, _INPUTS)
    try:
        y = tiny(x)
    except (RuntimeError, AttributeError, ValueError, TypeError):  # it does more than three products
        return OTHER_MLPS
    return None if same(y, down(FORWARD[kind](gate(x)) * up(x))) else OTHER_MLPS
