"""Mixtures of experts: what transformers keeps as one three-dimensional parameter, with adapters on it or in 4 bits.

A module of experts is recognised by its structure: two stacks, `gate_up_proj` (or `up_proj`) and `down_proj`, and how
they lie, which transformers notes on the module. It is proven on a miniature of itself, with few and random numbers,
against the class's own forward, so that neither large weights nor dense ones are needed.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from welltuned.kernels.grouped import Adapter, DenseStack, Experts, NF4Stack, Stack, lora_experts
from welltuned.kernels.ledger import ledger_of
from welltuned.kernels.lora import Rows
from welltuned.kernels.nodes import experts_node, handle_of

DOWN = "down_proj"


@dataclass(frozen=True, slots=True)
class Layout:
    """How one kind of module keeps its experts.

    Args:
        up: name of the first stack.
        transposed: [experts, in, out] rather than [experts, out, in].
        gated: the first stack gives gate and up; how they are told apart is the module's `_apply_gate`.
        biased: each stack has a bias of its name with "_bias".
    """

    up: str
    transposed: bool
    gated: bool
    biased: bool

    @property
    def stacks(self) -> tuple[str, str]:
        """In the order in which they are applied, which is also the one in which they are registered."""
        return self.up, DOWN


def layout_of(module: nn.Module) -> Layout | None:
    """How the module keeps experts, or None where it has none that this engine can run."""
    if isinstance(module, (NF4Experts, LoraExperts)):
        return module.layout
    layout = _noted_layout(module)
    return layout if layout is not None and _is_proven(module, layout) else None


def has_stacks(module: nn.Module) -> bool:
    """Whether the module itself keeps three-dimensional parameters, of whatever kind."""
    return any(p is not None and p.dim() == 3 for p in module._parameters.values())


def _noted_layout(module: nn.Module) -> Layout | None:
    noted, stacks = module.__dict__, {name for name, p in module._parameters.items() if p is not None and p.dim() == 3}
    gated = noted.get("has_gate")
    up = "gate_up_proj" if gated else "up_proj"
    if gated is None or stacks != {up, DOWN} or noted.get("has_post_expert_norm"):
        return None
    return Layout(up, bool(noted.get("is_transposed")), bool(gated), bool(noted.get("has_bias")))


def _is_proven(module: nn.Module, layout: Layout) -> bool:
    """Whether our forward gives the class's own numbers, both on a copy of the module with stacks of 6 by 8."""
    count, hidden, width = len(module.get_parameter(DOWN)), 6, 8
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    with torch.no_grad(), torch.device("cpu"):  # also while transformers builds a model on the meta device
        small, top = copy.copy(module), min(2, count)
        small._parameters = {}
        for name, (rows, columns) in ((layout.up, (width * (1 + layout.gated), hidden)), (DOWN, (hidden, width))):
            shape = (columns, rows) if layout.transposed else (rows, columns)
            small._parameters[name] = nn.Parameter(normal(count, *shape), requires_grad=False)
            if layout.biased:
                small._parameters[f"{name}_bias"] = nn.Parameter(normal(count, rows), requires_grad=False)
        index_NT = torch.stack([torch.randperm(count, generator=draw)[:top] for _ in range(5)])
        x_NH, weight_NT = normal(5, hidden), normal(5, top).abs()
        own = inspect.unwrap(type(module).forward)(small, x_NH, index_NT, weight_NT)
        ours = lora_experts(x_NH, index_NT, weight_NT, _experts(small, layout), None, None, Rows())
        return bool(own.shape == ours.shape and (own - ours).abs().max() <= 1e-10 * own.abs().max())


def stack(module: nn.Module, name: str, layout: Layout) -> Stack:
    """One stack as [experts, out, in], without a copy."""
    if isinstance(module, LoraExperts):
        return stack(module.base, name, layout)
    if isinstance(module, NF4Experts):
        return module.frozen[name]
    parameter = module.get_parameter(name).detach()
    return DenseStack(parameter.transpose(1, 2) if layout.transposed else parameter)


def _experts(module: nn.Module, layout: Layout) -> Experts:
    inner: Any = module.base if isinstance(module, NF4Experts) else module
    biases = [inner.get_parameter(f"{name}_bias") if layout.biased else None for name in layout.stacks]
    act: Callable[[Tensor], Tensor] = inner._apply_gate if layout.gated else inner.act_fn
    return Experts(stack(module, layout.up, layout), stack(module, DOWN, layout), act, biases[0], biases[1])


@dataclass(frozen=True, slots=True)
class ExpertsNode:
    """What a compiled layer is given of a module of experts: its handle, the rows of no adapters, the inner width."""

    handle: Tensor
    ledger: Tensor
    width: int


class NF4Experts(nn.Module):
    """Experts whose stacks are stored in NF4, expert by expert; takes the place of the module it was made from.

    Args:
        base: the module without its stacks, for its activation and biases.
        frozen: the stacks by name.
    """

    def __init__(self, base: nn.Module, layout: Layout, frozen: dict[str, NF4Stack]):
        super().__init__()
        self.base, self.layout, self.frozen = base, layout, frozen
        for name in layout.stacks:
            base._parameters[name] = None
        self.node: ExpertsNode | None = None
        self.train(base.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Experts":
        super()._apply(fn, recurse)
        for name, codes in self.frozen.items():  # `model.to(device)` takes the codes along
            self.frozen[name] = codes.to(fn(codes.weights[0].packed[:0]).device)
        return self

    def parts(self) -> tuple[Experts, tuple[float, ...]]:
        """What it is made of, and no scales."""
        return _experts(self, self.layout), ()

    def as_node(self) -> None:
        """Be one node of a compiled layer."""
        self.node = ExpertsNode(handle_of(self), ledger_of(Rows()), stack(self, self.layout.up, self.layout).shape[1])

    def forward(self, hidden_states: Tensor, index_NT: Tensor, weight_NT: Tensor) -> Tensor:
        node = self.node
        if torch.compiler.is_compiling() and node is not None:
            rest = node.handle, node.ledger, node.width
            return experts_node(hidden_states, index_NT, weight_NT, None, None, *rest)
        return lora_experts(hidden_states, index_NT, weight_NT, self.parts()[0], None, None, Rows())


class LoraExperts(nn.Module):
    """Frozen experts with K adapters on one stack or on both; takes the place of `base` in the model.

    Args:
        adapters: by the stack's name, (A_KERI, B_KEOR).
        scale_K: s of each adapter.
    """

    def __init__(
        self,
        base: nn.Module,
        adapters: dict[str, tuple[nn.Parameter, nn.Parameter]],
        scale_K: Sequence[float],
        rows: Rows,
    ):
        super().__init__()
        layout = layout_of(base)
        assert layout is not None  # or `expert_stacks` would not have found it
        self.base, self.layout, self.scale_K, self.rows = base, layout, tuple(scale_K), rows
        self.adapted = tuple(adapters)
        for name, (a_KERI, b_KEOR) in adapters.items():
            self.register_parameter(f"{name}_lora_A", a_KERI)
            self.register_parameter(f"{name}_lora_B", b_KEOR)
        self.enabled = True
        self.node: ExpertsNode | None = None
        self.train(base.training)

    def forward(self, hidden_states: Tensor, index_NT: Tensor, weight_NT: Tensor) -> Tensor:
        if not self.enabled:
            out: Tensor = self.base(hidden_states, index_NT, weight_NT)
            return out
        node, ledger = self.node, self.rows.ledger
        if torch.compiler.is_compiling() and node is not None and ledger is not None:
            pairs = self._pair(self.layout.up), self._pair(DOWN)
            return experts_node(hidden_states, index_NT, weight_NT, *pairs, node.handle, ledger, node.width)
        up, down = self._adapter(self.layout.up), self._adapter(DOWN)
        return lora_experts(hidden_states, index_NT, weight_NT, _experts(self.base, self.layout), up, down, self.rows)

    def parts(self) -> tuple[Experts, tuple[float, ...]]:
        """What it is made of, and each adapter's scale."""
        return _experts(self.base, self.layout), self.scale_K

    def as_node(self) -> None:
        """Be one node of a compiled layer."""
        self.node = ExpertsNode(handle_of(self), ledger_of(Rows()), stack(self, self.layout.up, self.layout).shape[1])

    def _pair(self, name: str) -> tuple[Tensor, Tensor] | None:
        if name not in self.adapted:
            return None
        return self.get_parameter(f"{name}_lora_A"), self.get_parameter(f"{name}_lora_B")

    def _adapter(self, name: str) -> Adapter | None:
        pair = self._pair(name)
        return None if pair is None else Adapter(*pair, self.scale_K)


def quantize_experts(model: nn.Module, ready: Mapping[str, NF4Stack] = MappingProxyType({})) -> int:
    """Replace every module of experts that is understood by one in NF4, freeing dense stacks as it goes; how many.

    Args:
        ready: stacks that were quantised while they were read, by the parameter's name.
    """
    names = dict.fromkeys(name.rpartition(".")[0] for name in expert_stacks(model))
    for name in names:
        module = model.get_submodule(name)
        layout = layout_of(module)
        assert layout is not None
        frozen = {}
        for leaf in layout.stacks:
            frozen[leaf] = ready.get(f"{name}.{leaf}") or quantize_stack(module.get_parameter(leaf), layout.transposed)
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent).register_module(leaf, NF4Experts(module, layout, frozen))
    return len(names)


def quantize_stack(value: Tensor, transposed: bool, device: str | None = None) -> NF4Stack:
    """A stack as it is stored, quantised expert by expert on its device or on `device`."""
    return NF4Stack.quantize(value.detach().transpose(1, 2) if transposed else value.detach(), device)


def expert_stacks(model: nn.Module) -> dict[str, int]:
    """Every stack of experts that can be adapted, by its parameter's name, and how many experts it has."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        within = isinstance(model.get_submodule(name.rpartition(".")[0]), (NF4Experts, LoraExperts))
        layout = None if within else layout_of(module)
        if layout is not None:
            found |= {f"{name}.{leaf}": stack(module, leaf, layout).shape[0] for leaf in layout.stacks}
    return found


def stack_shape(model: nn.Module, name: str) -> tuple[int, int, int]:
    """(experts, out, in) of a stack that `expert_stacks` names."""
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    layout = layout_of(owner)
    assert layout is not None
    return stack(owner, leaf, layout).shape
