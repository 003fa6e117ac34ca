"""Faster forwards for the parts that are understood, on this model instance only, each proven before it is used.

A part is recognised by its structure or its behaviour, never by the model's name: the replacement must give the
original's numbers on a random input, or it is not used and the report says why. So a new architecture works on the
day it appears, and one that only looks familiar trains on its own code.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from welltuned.kernels.gated_mlp import FORWARD, Activation, GatedMLP, gated_mlp
from welltuned.kernels.nodes import gated_mlp_node, handle_of
from welltuned.kernels.norm import rms_norm
from welltuned.kernels.token_loss import Head
from welltuned.models.experts import LoraExperts, NF4Experts, has_stacks
from welltuned.models.lora import AdapterBank, LoraLinear

OTHER_NORMS = "norms that are not RMS norms"
OTHER_MLPS = "gated MLPs that compute something else"
BARE_MLPS = "gated MLPs with biases or unadapted projections"
DORA_MLPS = "gated MLPs whose rows DoRA scales"
STRANGE_MLPS = "gated MLPs with an unknown activation"
UNGATED_MLPS = "MLPs without gate_proj, up_proj and down_proj"
_GATED, _NORM = "fused_gated_mlp", "fused_rms_norm"  # where a module keeps what its new forward needs
STACKS = "stacks of experts, which carry no adapters"
GATED = frozenset({"gate_proj", "up_proj", "down_proj"})
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(slots=True)
class Fused:
    """What was replaced on one model, and what was left alone and why."""

    modules: list[nn.Module] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    plain: Counter[str] = field(default_factory=Counter)

    def replace(self, module: nn.Module, forward: Callable[..., Tensor], what: str) -> None:
        """A forward that is a method of the module, not a closure, is the same code for all of its kind."""
        module.forward = forward
        self.modules.append(module)
        self.done[what] += 1

    def undo(self) -> None:
        """Give every module its class's forward back."""
        for module in self.modules:
            for name in ("forward", _GATED, _NORM):
                module.__dict__.pop(name, None)
        self.modules.clear()

    def sentences(self) -> list[str]:
        return [left(what) + f" ({n} of them)" * (n > 1) for what, n in self.plain.items()]


def left(what: str) -> str:
    return f"{what} left on the model's own code"


def fuse(model: PreTrainedModel, bank: AdapterBank | None) -> Fused:
    """Replace norms, and gated MLPs whose projections carry adapters."""
    fused, training = Fused(), model.training
    model.eval()  # no dropout while replacements are compared with what they replace
    adapted = {module.base for module in model.modules() if isinstance(module, LoraExperts)}
    for module in model.modules():
        if bank is not None and module._modules.keys() >= GATED:
            _fuse_mlp(module, fused)
        elif looks_like_rms_norm(module):
            _fuse_norm(module, fused)
        elif isinstance(module, (LoraExperts, NF4Experts)):
            fused.done["experts"] += module not in adapted
        elif not isinstance(module, (LoraLinear, nn.Conv1d)) and has_stacks(module) and module not in adapted:
            fused.plain[STACKS] += 1
    if bank is not None and not fused.done.keys() & {"gated MLP", "experts"} and not fused.plain.keys() - {OTHER_NORMS}:
        fused.plain[UNGATED_MLPS] = 1
    model.train(training)
    return fused


def same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    tolerance = _TOLERANCE[a.dtype]
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-30))


def _random(*shape: int, like: Tensor) -> Tensor:
    draw = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return draw.to(device=like.device, dtype=like.dtype)


def recognise_activation(function: Callable[[Tensor], Tensor]) -> Activation | None:
    """Which known activation this is, judged by its values."""
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    y = function(x)
    return next((kind for kind, f in FORWARD.items() if torch.allclose(f(x), y, rtol=1e-9, atol=1e-12)), None)


def mlp_activation(mlp: nn.Module) -> Activation | None:
    """The known activation of a gated MLP, or None."""
    functions = [c for name, c in mlp._modules.items() if name in ("act_fn", "activation_fn") and c is not None]
    return recognise_activation(functions[0]) if functions else None


def _fuse_mlp(module: nn.Module, fused: Fused) -> None:
    gate, up, down = (module.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj"))
    # DoRA's rows are scaled outside the product; while B is 0 by 1, so that a comparison would not tell.
    if any(isinstance(m, LoraLinear) and m.magnitude_KO is not None for m in (gate, up, down)):
        fused.plain[DORA_MLPS] += 1
        return
    if not all(isinstance(m, LoraLinear) and m.bias_O is None for m in (gate, up, down)):
        fused.plain[BARE_MLPS] += 1
        return
    kind = mlp_activation(module)
    if kind is None or not takes_one_argument(module):
        fused.plain[STRANGE_MLPS if kind is None else OTHER_MLPS] += 1
        return
    assert isinstance(gate, LoraLinear) and isinstance(up, LoraLinear) and isinstance(down, LoraLinear)
    mlp = GatedMLP(gate.projection, up.projection, down.projection, kind)
    original = module.forward
    module.__dict__[_GATED] = FusedMLP(mlp, original, (gate, up, down))
    forward = MethodType(_fused_mlp, module)
    with torch.no_grad():
        x = _random(1, 5, gate.projection.weight.shape[1], like=gate.lora_A).to(_dtype(gate))
        if same(forward(x), original(x)):
            fused.replace(module, forward, "gated MLP")
        else:
            fused.plain[OTHER_MLPS] += 1
            del module.__dict__[_GATED]


@dataclass(slots=True)
class FusedMLP:
    """What the forward of a fused gated MLP needs; `handle` where its layer is compiled."""

    mlp: GatedMLP
    original: Callable[[Tensor], Tensor]
    parts: tuple[LoraLinear, LoraLinear, LoraLinear]
    handle: Tensor | None = None

    def as_node(self) -> None:
        """Be one node of a compiled layer."""
        self.handle = handle_of(self.mlp)


def _fused_mlp(module: Any, x: Tensor) -> Tensor:
    found: FusedMLP = module.fused_gated_mlp
    gate = found.parts[0]
    if not gate.enabled:
        return found.original(x)
    pairs = [(m.lora_A, m.lora_B) for m in found.parts]
    x_NI = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling() and found.handle is not None and gate.rows.ledger is not None:
        return gated_mlp_node(x_NI, pairs, found.handle, gate.rows.ledger).view(*x.shape[:-1], -1)
    gate.check_dropout()
    return gated_mlp(x_NI, found.mlp, *pairs, gate.rows).view(*x.shape[:-1], -1)


def fused_mlp_of(module: nn.Module) -> FusedMLP | None:
    """What is fused on this module, if it is."""
    found: FusedMLP | None = module.__dict__.get(_GATED)
    return found


def _dtype(module: LoraLinear) -> torch.dtype:
    weight = module.base._parameters.get("weight")
    return torch.float32 if weight is None else weight.dtype


def takes_one_argument(module: nn.Module) -> bool:
    return len(signature(module.forward).parameters) == 1


def looks_like_rms_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.dim() == 1
        and len(module._parameters) == 1
        and not module._modules
        and _epsilon(module) is not None
    )


def _epsilon(module: nn.Module) -> float | None:
    return next((module.__dict__[key] for key in ("variance_epsilon", "eps") if key in module.__dict__), None)


def _fuse_norm(module: nn.Module, fused: Fused) -> None:
    weight = module._parameters["weight"]
    assert weight is not None
    if weight.requires_grad:
        return
    norm = rms_norm_of(module)
    if norm is None:
        fused.plain[OTHER_NORMS] += 1
    else:
        module.__dict__[_NORM] = norm
        fused.replace(module, MethodType(_fused_norm, module), "RMS norm")


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Gain and epsilon."""

    gain_H: Tensor
    eps: float


def _fused_norm(module: Any, x: Tensor) -> Tensor:
    norm: RMSNorm = module.fused_rms_norm
    return rms_norm(x, norm.gain_H, norm.eps)


@torch.no_grad()
def rms_norm_of(module: nn.Module) -> RMSNorm | None:
    """The RMS norm that gives this module's numbers, or None; for modules that look like one."""
    weight, eps = module._parameters["weight"], _epsilon(module)
    assert weight is not None and eps is not None
    x = _random(3, weight.shape[0], like=weight)
    y = module(x) if takes_one_argument(module) else x.new_empty(0)  # Qwen3-Next gates some of its norms
    for gain in (weight.detach(), (1.0 + weight.detach().float()).to(weight.dtype)):  # Gemma stores gain - 1
        if same(rms_norm(x, gain, eps), y):
            return RMSNorm(gain, eps)
    return None


def find_head(model: PreTrainedModel) -> Head | None:
    """The output embedding as the token loss needs it, or None where the model does something else after it."""
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear) or model.base_model is model:
        return None
    config = model.config.to_dict()
    scale = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
    head = Head(module.weight, module.bias, scale, config.get("final_logit_softcapping"))
    ids = torch.arange(4, device=module.weight.device)[None] + 1
    training = model.training
    model.eval()  # dropout of its own would tell the two runs apart
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        understood = same(head.logits(hidden[0]), model(input_ids=ids, use_cache=False).logits[0])
    model.train(training)
    return head if understood else None
