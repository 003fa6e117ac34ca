"""Adapters in memory: K LoRA adapters stacked on one frozen model, their weights in one flat buffer.

A single run is a bank of one. The flat buffer [K, P] (fp32) makes the optimizer, the gradient norm and the comparison
with the start one operation each; every module's A_KRI and B_KOR are views of it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from welltuned.errors import InputError, RunError
from welltuned.kernels.lora import Dropout, Projection, Rows, lora
from welltuned.models.frozen import LEFT_ALONE, NF4Linear, frozen_weight

ALL_LINEAR = "all-linear"


class Init(StrEnum):
    """How A starts; B always starts at zero."""

    KAIMING = "true"  # PEFT's init_lora_weights=True
    GAUSSIAN = "gaussian"


class Bias(StrEnum):
    NONE = "none"
    LORA_ONLY = "lora_only"
    ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """PEFT's names and meanings. `target_modules`: "all-linear" or name endings, each of which must match."""

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    use_rslora: bool = False
    bias: Bias = Bias.NONE
    init: Init = Init.KAIMING
    seed: int = 3407

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoraLinear(nn.Module):
    """A frozen projection with K adapters beside it; takes the place of `base` in the model it was found in."""

    def __init__(
        self,
        base: nn.Module,
        projection: Projection,
        a_KRI: nn.Parameter,
        b_KOR: nn.Parameter,
        rows: Rows,
        drops: bool = False,
    ):
        super().__init__()
        self.base = base
        self.drops = drops
        self.lora_A, self.lora_B = a_KRI, b_KOR
        self.projection, self.rows = projection, rows
        bias = base._parameters.get("bias")
        self.bias_O: Tensor | None = None if bias is None else bias
        self.enabled = True
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            out: Tensor = self.base(x)
            return out
        self.check_dropout()
        y = lora(x.reshape(-1, x.shape[-1]), self.projection, self.lora_A, self.lora_B, self.bias_O, self.rows)
        return y.view(*x.shape[:-1], y.shape[-1])

    def check_dropout(self) -> None:
        """Refuse to train without the dropout asked for: its masks belong to examples, which only our loop names."""
        if self.drops and self.training and not self.rows.dropout.p:
            raise RunError("lora_dropout works in welltuned's own training loop only; set it to 0 in another trainer")


def shared_rows(model: nn.Module) -> Rows:
    """The one Rows object that every adapted projection of the model reads."""
    return next((module.rows for module in model.modules() if isinstance(module, LoraLinear)), Rows())


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor of one module lies in the flat buffer."""

    name: str  # "model.layers.0.self_attn.q_proj.lora_A"
    start: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class AdapterBank:
    """K adapters on one model: made by `attach`, undone by `detach`.

    Attributes:
        flat_KP, grad_KP: all trained numbers and their gradients, fp32.
        slots: name and place of each tensor in a row of flat_KP.
        rows: which rows of the current micro-batch belong to which adapter and example.
    """

    def __init__(self, model: PreTrainedModel, settings: Sequence[LoraSettings]):
        self.model, self.settings = model, tuple(settings)
        first = self.settings[0]
        if len({(s.r, s.target_modules, s.bias, s.lora_dropout) for s in self.settings}) > 1:
            raise InputError("adapters of one bank share r, target_modules, bias and lora_dropout")
        if any(isinstance(module, LoraLinear) for module in model.modules()):
            raise InputError("the model already carries adapters", mend="detach them first")
        if len(self.settings) > 1 and first.bias is not Bias.NONE:
            raise InputError(
                "biases belong to the shared base", where="bias", mend="use bias: none with several adapters"
            )
        self.rows = Rows(dropout=Dropout())
        self.targets = find_targets(model, first.target_modules)
        biases = _trained_biases(model, self.targets, first.bias)
        for name, parameter in biases.items():
            if parameter.dtype.itemsize < 4 and name.rpartition(".")[0] not in self.targets:
                what = f"{name} is {str(parameter.dtype).removeprefix('torch.')}: too coarse to be trained"
                raise InputError(what, where="bias", mend="use lora_only, or a float32 model")
        self.slots = _layout(model, self.targets, first.r, biases)
        device = next(model.parameters()).device
        total = sum(slot.size for slot in self.slots)
        self.flat_KP = torch.zeros(len(self.settings), total, dtype=torch.float32, device=device)
        self.grad_KP = torch.zeros_like(self.flat_KP)
        self.modules: dict[str, LoraLinear] = {}
        self._parameters: dict[Slot, nn.Parameter] = {}
        self._original_biases = {name: p.data for name, p in biases.items()}
        self._required_grad = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        self._attach(biases)
        self.start_KP = self.flat_KP.clone()

    def _parameter(self, slot: Slot) -> nn.Parameter:
        columns = slice(slot.start, slot.start + slot.size)
        k = len(self.settings)
        parameter = nn.Parameter(self.flat_KP[:, columns].view(k, *slot.shape))
        self._parameters[slot] = parameter
        return parameter

    def claim_gradients(self) -> None:
        """Make autograd accumulate into grad_KP, also after another trainer set the parameters' gradients to None."""
        for slot, parameter in self._parameters.items():
            columns = slice(slot.start, slot.start + slot.size)
            parameter.grad = self.grad_KP[:, columns].view(parameter.shape)

    def _attach(self, biases: dict[str, nn.Parameter]) -> None:
        by_name = {slot.name: slot for slot in self.slots}
        scale_K = [s.scale for s in self.settings]
        index_of = {name: index for index, name in enumerate(linear_modules(self.model))}
        for name in self.targets:
            index = index_of[name]
            base = self.model.get_submodule(name)
            a, b = self._parameter(by_name[f"{name}.lora_A"]), self._parameter(by_name[f"{name}.lora_B"])
            for k, settings in enumerate(self.settings):
                init_a(a.data[k], settings, index)
            projection = Projection(frozen_weight(base), scale_K, index)
            self.modules[name] = LoraLinear(base, projection, a, b, self.rows, drops=self.settings[0].lora_dropout > 0)
            _replace(self.model, name, self.modules[name])
        for name, bias in biases.items():
            slot = by_name[name]
            columns = slice(slot.start, slot.start + slot.size)
            self.flat_KP[0, columns] = bias.data.float().flatten()
            bias.data = self.flat_KP[0, columns].view(slot.shape)
            bias.requires_grad_(True)
            self._parameters[slot] = bias
        self.claim_gradients()

    def detach(self) -> None:
        """Put the model back as it was."""
        for name, module in self.modules.items():
            _replace(self.model, name, module.base)
        parameters = dict(self.model.named_parameters())
        for name, data in self._original_biases.items():
            parameters[name].data, parameters[name].grad = data, None
            parameters[name].requires_grad_(False)
        for parameter in self._required_grad:
            parameter.requires_grad_(True)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model is the base alone."""
        for module in self.modules.values():
            module.enabled = False
        try:
            yield
        finally:
            for module in self.modules.values():
                module.enabled = True

    def use_rows(self, per_adapter: tuple[int, ...] | None, dropout_spans: tuple[tuple[int, int], ...]) -> None:
        """Say how the rows of the next forward pass belong to adapters, and name its examples for dropout."""
        self.rows.per_adapter = per_adapter
        self.rows.dropout = Dropout(self.settings[0].lora_dropout, dropout_spans)

    def no_dropout(self) -> None:
        """For evaluation and generation: adapter 0 on every row, nothing dropped."""
        self.rows.per_adapter, self.rows.dropout = None, Dropout()

    @property
    def decayed(self) -> int:
        """Columns of the flat buffer that weight decay applies to: all but trained biases."""
        return sum(slot.size for slot in self.slots if not slot.name.endswith("bias"))

    def tensors(self, k: int = 0) -> dict[str, Tensor]:
        """Adapter k's tensors by name, as views of the flat buffer."""
        return {s.name: self.flat_KP[k, s.start : s.start + s.size].view(s.shape) for s in self.slots}

    def tensors_at_start(self, k: int = 0) -> dict[str, Tensor]:
        """The same as they were when the adapters were attached or loaded."""
        return {s.name: self.start_KP[k, s.start : s.start + s.size].view(s.shape) for s in self.slots}


def attach(model: PreTrainedModel, settings: LoraSettings | Sequence[LoraSettings]) -> AdapterBank:
    """Freeze the model and put adapters on it, in place of the modules that `target_modules` names."""
    return AdapterBank(model, [settings] if isinstance(settings, LoraSettings) else settings)


def init_a(a_RI: Tensor, settings: LoraSettings, index: int) -> None:
    """PEFT's starts: U(-1/sqrt(I), 1/sqrt(I)), which is Kaiming-uniform with a = sqrt(5), or N(0, 1/R^2).

    Drawn row by row from a generator of its own, so that a smaller rank is a prefix of a larger one and adapters of
    one seed start alike whatever else is adapted.
    """
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + index)
    if settings.init is Init.GAUSSIAN:
        a_RI.copy_(torch.randn(a_RI.shape, generator=generator).div_(settings.r))
        return
    bound = 1.0 / math.sqrt(a_RI.shape[1])
    a_RI.copy_(torch.rand(a_RI.shape, generator=generator).mul_(2 * bound).sub_(bound))


def linear_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear projection of the trunk by name; neither the head nor routers."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, NF4Linear))
        and module is not head
        and name.rsplit(".", 1)[-1] not in LEFT_ALONE
    }


def find_targets(model: PreTrainedModel, wanted: str | tuple[str, ...]) -> list[str]:
    """Names of the modules to adapt, in the model's order. A wanted name that matches nothing is an error."""
    linears = linear_modules(model)
    if wanted == ALL_LINEAR:
        return list(linears)
    endings = (wanted,) if isinstance(wanted, str) else wanted
    leaves = sorted({name.rsplit(".", 1)[-1] for name in linears})
    found: set[str] = set()
    for ending in endings:
        matches = {name for name in linears if name == ending or name.endswith("." + ending)}
        if not matches:
            near = get_close_matches(ending, leaves, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"this model has {', '.join(leaves)}"
            raise InputError(f"{ending!r} matches no linear layer of the model", where="target_modules", mend=hint)
        found |= matches
    return [name for name in linears if name in found]


def _layout(model: PreTrainedModel, targets: list[str], r: int, biases: dict[str, nn.Parameter]) -> list[Slot]:
    slots, start = [], 0
    for name in targets:
        out_features, in_features = frozen_weight(model.get_submodule(name)).shape
        for tensor, shape in (("lora_A", (r, in_features)), ("lora_B", (out_features, r))):
            slots.append(Slot(f"{name}.{tensor}", start, shape))
            start += slots[-1].size
    for name, bias in biases.items():
        slots.append(Slot(name, start, tuple(bias.shape)))
        start += slots[-1].size
    return slots


def _trained_biases(model: PreTrainedModel, targets: list[str], bias: Bias) -> dict[str, nn.Parameter]:
    if bias is Bias.NONE:
        return {}
    wanted = {f"{name}.bias" for name in targets}
    return {
        name: p
        for name, p in model.named_parameters()
        if name.endswith("bias") and (bias is Bias.ALL or name in wanted)
    }


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent).register_module(leaf, module)
