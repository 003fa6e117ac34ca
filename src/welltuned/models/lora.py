"""Adapters in memory: K LoRA adapters stacked on one frozen model, their weights in one flat buffer.

A single run is a bank of one. The flat buffer [K, P] (fp32) makes the optimizer, the gradient norm and the comparison
with the start one operation each; every module's A_KRI and B_KOR are views of it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from welltuned.errors import InputError, RunError
from welltuned.kernels.lora import Dropout, Projection, Rows, lora
from welltuned.models.experts import LoraExperts, expert_stacks, has_stacks, stack_shape
from welltuned.models.frozen import LEFT_ALONE, frozen_weight, is_projection

ALL_LINEAR = "all-linear"
Device = torch.device | str | None  # None: the model's own


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
    """PEFT's names and meanings.

    Args:
        target_modules: "all-linear", or name endings, each of which must match. Experts are no linear layers: they are
            named by their module ("experts") or, as in PEFT's `target_parameters`, by a stack ("experts.down_proj").
        expert_r: the rank of every expert's own adapter; None for r.
    """

    r: int = 16
    expert_r: int | None = None
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    use_rslora: bool = False
    bias: Bias = Bias.NONE
    init: Init = Init.KAIMING
    seed: int = 3407

    @property
    def scale(self) -> float:
        return self._scale(self.r)

    @property
    def expert_rank(self) -> int:
        return self.expert_r or self.r

    @property
    def expert_scale(self) -> float:
        return self._scale(self.expert_rank)

    def _scale(self, r: int) -> float:
        return self.lora_alpha / (math.sqrt(r) if self.use_rslora else r)


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

    @property
    def weight(self) -> Tensor:
        """The frozen weight: DeepSeek-V3.2 and others ask a projection for its dtype."""
        return self.base.get_parameter("weight")

    def check_dropout(self) -> None:
        """Refuse to train without the dropout asked for: its masks belong to examples, which only our loop names."""
        if self.drops and self.training and not self.rows.dropout.p:
            raise RunError("lora_dropout works in welltuned's own training loop only; set it to 0 in another trainer")


def shared_rows(model: nn.Module) -> Rows:
    """The one Rows object that every adapted projection of the model reads."""
    return next((m.rows for m in model.modules() if isinstance(m, (LoraLinear, LoraExperts))), Rows())


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

    Adapters of several ranks lie in slots of the largest. What a smaller one leaves of its slot is 0 and stays 0, since
    each half of such a pair (rows of A, columns of B) is the other's gradient.

    Attributes:
        flat_KP, grad_KP: all trained numbers and their gradients, fp32.
        slots: name and place of each tensor in a row of flat_KP.
        saved: modules that are trained as they are, beside the adapters (PEFT's `modules_to_save`), in fp32.
        targets: names of what is adapted, in the model's order; `stacks` are those among them that hold experts.
        rows: which rows of the current micro-batch belong to which adapter and example.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Sequence[LoraSettings],
        saved: tuple[str, ...] = (),
        device: torch.device | str | None = None,
    ):
        self.model, self.settings, self.saved = model, tuple(settings), saved
        first = self.settings[0]
        if len({(s.target_modules, s.bias) for s in self.settings}) > 1:
            raise InputError("adapters of one bank share target_modules and bias")
        if any(isinstance(module, (LoraLinear, LoraExperts)) for module in model.modules()):
            raise InputError("the model already carries adapters", mend="detach them first")
        if len(self.settings) > 1 and saved:
            raise InputError(f"{saved[0]} belongs to the base that adapters share", mend="train one adapter with it")
        if len(self.settings) > 1 and first.bias is not Bias.NONE:
            raise InputError(
                "biases belong to the shared base", where="bias", mend="use bias: none with several adapters"
            )
        self.rows = Rows(dropout=Dropout())
        self.targets = find_targets(model, first.target_modules)
        self.stacks = [name for name in self.targets if name not in linear_modules(model)]
        if self.stacks:
            _check_experts(self.settings)
        biases = _trained_biases(model, self.targets, first.bias)
        for name, parameter in biases.items():
            if parameter.dtype.itemsize < 4 and name.rpartition(".")[0] not in self.targets:
                what = f"{name} is {str(parameter.dtype).removeprefix('torch.')}: too coarse to be trained"
                raise InputError(what, where="bias", mend="use lora_only, or a float32 model")
        whole = {f"{name}.{leaf}": p for name in saved for leaf, p in model.get_submodule(name).named_parameters()}
        biases = whole | biases  # weights first, since the buffer's first columns decay
        self.slots = _layout(model, self.targets, max(s.r for s in self.settings), first.expert_rank, biases)
        device = device or next(model.parameters()).device
        total = sum(slot.size for slot in self.slots)
        self.flat_KP = torch.zeros(len(self.settings), total, dtype=torch.float32, device=device)
        self.grad_KP = torch.zeros_like(self.flat_KP)
        self.modules: dict[str, LoraLinear | LoraExperts] = {}
        self._parameters: dict[Slot, nn.Parameter] = {}
        self._original_biases = {name: p.data for name, p in biases.items()}
        self._required_grad = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        self._attach(biases)
        rest = "meta" if self.flat_KP.is_meta else "cpu"  # only looked at when training is over
        self.start_KP = self.flat_KP.detach().to(rest, copy=True)

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
        linears = linear_modules(self.model)
        index_of = {name: index for index, name in enumerate(linears)}
        scale_K = [s.scale for s in self.settings]
        if self.stacks:
            self._attach_experts(len(linears))
        for name in self.targets:
            if name in self.stacks:
                continue
            index, base = index_of[name], self.model.get_submodule(name)
            a, b = self._pair(name)
            for k, settings in enumerate(self.settings):
                init_a(a.data[k, : settings.r], settings, index)  # a smaller rank's other rows stay 0, for ever
            projection = Projection(frozen_weight(base), scale_K, index)
            drops = any(s.lora_dropout > 0 for s in self.settings)
            self._put(name, LoraLinear(base, projection, a, b, self.rows, drops=drops))
        for name, bias in biases.items():
            slot = next(slot for slot in self.slots if slot.name == name)
            columns = slice(slot.start, slot.start + slot.size)
            self.flat_KP[0, columns] = bias.data.float().flatten()
            bias.data = self.flat_KP[0, columns].view(slot.shape)
            bias.requires_grad_(True)
            self._parameters[slot] = bias
        self.claim_gradients()

    def _attach_experts(self, index: int) -> None:
        """Adapters on stacks; `index` is where their names for the start of A begin, one for each expert."""
        adapters: dict[str, dict[str, tuple[nn.Parameter, nn.Parameter]]] = {}
        for name, count in expert_stacks(self.model).items():
            if name in self.stacks:
                module, _, leaf = name.rpartition(".")
                a, b = adapters.setdefault(module, {})[leaf] = self._pair(name)
                for k, settings in enumerate(self.settings):
                    for expert in range(count):
                        init_a(a.data[k, expert], settings, index + expert)
            index += count
        scale_K = [s.expert_scale for s in self.settings]
        for module, pairs in adapters.items():
            self._put(module, LoraExperts(self.model.get_submodule(module), pairs, scale_K, self.rows))

    def _pair(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        a, b = (next(s for s in self.slots if s.name == f"{name}.{leaf}") for leaf in ("lora_A", "lora_B"))
        return self._parameter(a), self._parameter(b)

    def _put(self, name: str, module: LoraLinear | LoraExperts) -> None:
        self.modules[name] = module
        _replace(self.model, name, module)

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
        shares = {s.lora_dropout for s in self.settings}
        if per_adapter is None or len(shares) == 1:
            self.rows.dropout = Dropout(self.settings[0].lora_dropout, dropout_spans)
            return
        owners = [k for k, rows in enumerate(per_adapter) for _ in range(rows)]
        starts = accumulate((rows for rows, _ in dropout_spans[:-1]), initial=0)
        of_span = tuple(self.settings[owners[start]].lora_dropout for start in starts) if dropout_spans else ()
        self.rows.dropout = Dropout(max(of_span, default=0.0), dropout_spans, of_span)

    def no_dropout(self, per_adapter: tuple[int, ...] | None = None) -> None:
        """For evaluation and generation: nothing dropped, adapter 0 on every row unless rows are given to several."""
        self.rows.per_adapter, self.rows.dropout = per_adapter, Dropout()

    @property
    def decayed(self) -> int:
        """Columns of the flat buffer that weight decay applies to: all but trained biases."""
        return sum(slot.size for slot in self.slots if not slot.name.endswith("bias"))

    def tensors(self, k: int = 0) -> dict[str, Tensor]:
        """Adapter k's tensors by name, of its own rank, as views of the flat buffer."""
        return self._views(self.flat_KP, k)

    def tensors_at_start(self, k: int = 0) -> dict[str, Tensor]:
        """The same as they were when the adapters were attached or loaded."""
        return self._views(self.start_KP, k)

    def _views(self, flat_KP: Tensor, k: int) -> dict[str, Tensor]:
        found, r = {}, self.settings[k].r
        for slot in self.slots:
            whole = flat_KP[k, slot.start : slot.start + slot.size].view(slot.shape)
            if len(slot.shape) == 2 and slot.name.endswith("lora_A"):
                whole = whole[:r]
            elif len(slot.shape) == 2 and slot.name.endswith("lora_B"):
                whole = whole[:, :r]
            found[slot.name] = whole
        return found

    def keep(self, rows: Sequence[int]) -> None:
        """Leave these adapters in the bank, in this order; one that is named twice is copied.

        Whoever holds the flat buffers (an optimizer) must take them anew.
        """
        self.settings = tuple(self.settings[k] for k in rows)
        self.flat_KP = self.flat_KP[list(rows)]
        self.grad_KP = torch.zeros_like(self.flat_KP)
        self.start_KP = self.start_KP[list(rows)]
        for slot, parameter in self._parameters.items():
            parameter.grad = None
            parameter.data = self.flat_KP[:, slot.start : slot.start + slot.size].view(len(rows), *slot.shape)
        for module in self.modules.values():
            if isinstance(module, LoraExperts):
                module.scale_K = tuple(s.expert_scale for s in self.settings)
            else:
                module.projection.scale_K = [s.scale for s in self.settings]
        self.claim_gradients()


def attach(
    model: PreTrainedModel,
    settings: LoraSettings | Sequence[LoraSettings],
    saved: tuple[str, ...] = (),
    device: torch.device | str | None = None,
) -> AdapterBank:
    """Freeze the model and put adapters on it, in place of the modules that `target_modules` names.

    Args:
        saved: modules that are trained beside them.
        device: where the adapters' numbers lie; unset: where the model's do. A model without numbers ("meta") can so
            say what its adapters are.
    """
    return AdapterBank(model, [settings] if isinstance(settings, LoraSettings) else settings, saved, device)


def init_a(a_RI: Tensor, settings: LoraSettings, index: int) -> None:
    """PEFT's starts: U(-1/sqrt(I), 1/sqrt(I)), which is Kaiming-uniform with a = sqrt(5), or N(0, 1/R^2).

    Drawn row by row from a generator of its own, so that a smaller rank is a prefix of a larger one and adapters of
    one seed start alike whatever else is adapted.
    """
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + index)
    if settings.init is Init.GAUSSIAN:
        a_RI.copy_(torch.randn(a_RI.shape, generator=generator).div_(len(a_RI)))
        return
    bound = 1.0 / math.sqrt(a_RI.shape[1])
    a_RI.copy_(torch.rand(a_RI.shape, generator=generator).mul_(2 * bound).sub_(bound))


def linear_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear projection of the trunk by name; neither the head nor routers."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if is_projection(module) and module is not head and name.rsplit(".", 1)[-1] not in LEFT_ALONE
    }


def find_targets(model: PreTrainedModel, wanted: str | tuple[str, ...]) -> list[str]:
    """Names of what to adapt, in the model's order. A wanted name that matches nothing is an error."""
    linears = linear_modules(model)
    if wanted == ALL_LINEAR:
        return list(linears)
    endings = (wanted,) if isinstance(wanted, str) else wanted
    stacks = expert_stacks(model)
    found: set[str] = set()
    for ending in endings:
        matches = {name for name in linears if ending == ALL_LINEAR or _ends(name, ending)}
        matches |= {name for name in stacks if _means_stack(name, ending)}
        if not matches:
            raise _no_match(model, ending, linears, stacks)
        found |= matches
    return [name for name in (*linears, *stacks) if name in found]


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _means_stack(name: str, ending: str) -> bool:
    """By its module ("experts") or with it ("experts.down_proj"): "down_proj" alone is a dense layer's name."""
    return _ends(name.rpartition(".")[0], ending) or ("." in ending and _ends(name, ending))


def _no_match(model: PreTrainedModel, ending: str, linears: Iterable[str], stacks: Iterable[str]) -> InputError:
    for name, module in model.named_modules():
        if has_stacks(module) and not any(stack.startswith(f"{name}.") for stack in stacks) and _ends(name, ending):
            what = f"{name} keeps its experts in a way that no adapter of ours can stand on"
            return InputError(what, where="target_modules", mend=f"leave {ending!r} out")
    known = {name.rsplit(".", 1)[-1] for name in linears} | {".".join(name.rsplit(".", 2)[-2:]) for name in stacks}
    near = [name for name in known if _ends(name, ending)] or get_close_matches(ending, sorted(known), 1)
    hint = f"did you mean {near[0]!r}?" if near else f"this model has {', '.join(sorted(known))}"
    return InputError(f"{ending!r} matches no linear layer of the model", where="target_modules", mend=hint)


def _layout(
    model: PreTrainedModel, targets: list[str], r: int, expert_r: int, biases: dict[str, nn.Parameter]
) -> list[Slot]:
    slots: list[Slot] = []
    start = 0
    linears = linear_modules(model)
    for name in targets:
        shapes: tuple[tuple[int, ...], tuple[int, ...]]
        if name in linears:
            out_features, in_features = frozen_weight(model.get_submodule(name)).shape
            shapes = (r, in_features), (out_features, r)
        else:
            experts, out_features, in_features = stack_shape(model, name)
            shapes = (experts, expert_r, in_features), (experts, out_features, expert_r)
        for tensor, shape in zip(("lora_A", "lora_B"), shapes, strict=True):
            slots.append(Slot(f"{name}.{tensor}", start, shape))
            start += slots[-1].size
    for name, bias in biases.items():
        slots.append(Slot(name, start, tuple(bias.shape)))
        start += slots[-1].size
    return slots


def _check_experts(settings: Sequence[LoraSettings]) -> None:
    if len({s.expert_rank for s in settings}) > 1:
        raise InputError(
            "adapters on experts in one bank share their rank", where="r", mend="give expert targets one r"
        )
    if any(s.lora_dropout for s in settings):
        what = "dropout cannot act on experts: each one's weight is changed as a whole, as PEFT does it"
        raise InputError(what, where="lora_dropout", mend="set it to 0, or leave the experts out of target_modules")
    if settings[0].bias is Bias.ALL:
        what = "biases are not trained where experts carry adapters"
        raise InputError(what, where="bias", mend="use none or lora_only, or leave the experts out of target_modules")


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
