"""Adapters in memory: K LoRA adapters stacked on one frozen model, their weights in one flat buffer.

A single run is a bank of one. The flat buffer [K, P] (fp32) makes the optimizer, the gradient norm and the comparison
with the start one operation each; every module's A_KRI and B_KOR are views of it.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from welltuned.errors import InputError, RunError
from welltuned.kernels.dora import dora, row_squares
from welltuned.kernels.lora import Dropout, Projection, Rows, lora
from welltuned.kernels.nodes import handle_of, lora_node
from welltuned.models.experts import LoraExperts, expert_stacks, stack_shape
from welltuned.models.frozen import frozen_weight, live_weight
from welltuned.models.lora_settings import ALL_LINEAR as ALL_LINEAR
from welltuned.models.lora_settings import FROM_WEIGHTS, by_pattern
from welltuned.models.lora_settings import Bias as Bias
from welltuned.models.lora_settings import Init as Init
from welltuned.models.lora_settings import LoraSettings as LoraSettings
from welltuned.models.lora_start import Loss4Bit, begin, begin_experts, start_each
from welltuned.models.targets import find_targets as find_targets
from welltuned.models.targets import linear_modules as linear_modules

# Gradients are columns of one flat buffer by design; of several adapters they are not contiguous.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")

MAGNITUDE = "lora_magnitude_vector"  # PEFT's name of DoRA's trained row norms

Device = torch.device | str | None  # None: the model's own


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
        magnitude_KO: nn.Parameter | None = None,
    ):
        super().__init__()
        self.base = base
        self.drops = drops
        self.lora_A, self.lora_B = a_KRI, b_KOR
        self.register_parameter(MAGNITUDE, magnitude_KO)
        self.magnitude_KO = magnitude_KO
        self.squares_O = None if magnitude_KO is None else row_squares(projection.weight)
        self.projection, self.rows = projection, rows
        bias = base._parameters.get("bias")
        self.bias_O: Tensor | None = None if bias is None else bias
        self.enabled = True
        self.handle: Tensor | None = None
        self.train(base.training)

    def as_node(self) -> None:
        """Be one node of a compiled layer."""
        self.handle = handle_of(self.projection)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            out: Tensor = self.base(x)
            return out
        x_NI = x.reshape(-1, x.shape[-1])
        if torch.compiler.is_compiling() and self.handle is not None and self.rows.ledger is not None:
            y = lora_node(x_NI, self.lora_A, self.lora_B, self.bias_O, self.handle, self.rows.ledger)
            return y.view(*x.shape[:-1], y.shape[-1])
        self.check_dropout()
        if self.magnitude_KO is not None and self.squares_O is not None:
            pair = self.lora_A, self.lora_B
            y = dora(x_NI, self.projection, *pair, self.magnitude_KO, self.squares_O, self.bias_O, self.rows)
        else:
            y = lora(x_NI, self.projection, self.lora_A, self.lora_B, self.bias_O, self.rows)
        return y.view(*x.shape[:-1], y.shape[-1])

    def keep(self, rows: Sequence[int], scale_K: Sequence[float]) -> None:
        """Leave what belongs to these adapters, whose tensors the bank has changed."""
        self.projection.scale_K = scale_K
        if self.projection.taken is not None:
            a0_KRI, b0_KOR = self.projection.taken
            self.projection.taken = a0_KRI[list(rows)], b0_KOR[list(rows)]

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
        if len({_shape(s) for s in self.settings}) > 1:
            raise InputError("adapters of one bank share target_modules, bias, use_dora and the ranks of patterns")
        if any(isinstance(module, (LoraLinear, LoraExperts)) for module in model.modules()):
            raise InputError("the model already carries adapters", mend="detach them first")
        if len(self.settings) > 1 and saved:
            raise InputError(f"{saved[0]} belongs to the base that adapters share", mend="train one adapter with it")
        if len(self.settings) > 1 and first.bias is not Bias.NONE:
            raise InputError(
                "biases belong to the shared base", where="bias", mend="use bias: none with several adapters"
            )
        self.rows = Rows(dropout=Dropout())
        self.targets = find_targets(model, first.target_modules, first.layers_to_transform)
        self.stacks = [name for name in self.targets if name not in linear_modules(model)]
        _check(self.settings, self.targets, self.stacks)
        biases = _trained_biases(model, self.targets, first.bias)
        for name, parameter in biases.items():
            if parameter.dtype.itemsize < 4 and name.rpartition(".")[0] not in self.targets:
                what = f"{name} is {str(parameter.dtype).removeprefix('torch.')}: too coarse to be trained"
                raise InputError(what, where="bias", mend="use lora_only, or a float32 model")
        whole = {f"{name}.{leaf}": p for name in saved for leaf, p in model.get_submodule(name).named_parameters()}
        # weights first, since the buffer's first columns decay
        biases = dict(sorted((whole | biases).items(), key=lambda item: item[0].endswith("bias")))
        self.slots = _layout(model, self.targets, self.settings, biases)
        device = device or next(model.parameters()).device
        total = sum(slot.size for slot in self.slots)
        self.flat_KP = torch.zeros(len(self.settings), total, dtype=torch.float32, device=device)
        self.grad_KP = torch.zeros_like(self.flat_KP)
        self.modules: dict[str, LoraLinear | LoraExperts] = {}
        self._first_expert: dict[str, int] = {}  # of each stack: what names its first expert for the start of A
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
        if self.stacks:
            self._attach_experts(len(linears))
        for name in self.targets:
            if name not in self.stacks:
                self._attach_linear(name, index_of[name])
        for name, bias in biases.items():
            slot = self._slot(name)
            columns = slice(slot.start, slot.start + slot.size)
            self.flat_KP[0, columns] = bias.data.float().flatten()
            bias.data = self.flat_KP[0, columns].view(slot.shape)
            bias.requires_grad_(True)
            self._parameters[slot] = bias
        self.claim_gradients()

    def _attach_linear(self, name: str, index: int) -> None:
        first, base = self.settings[0], self.model.get_submodule(name)
        a, b = self._pair(name)
        projection = Projection(frozen_weight(base), [s.scale_of(name) for s in self.settings], index)
        for k, settings in enumerate(self.settings):
            begin(a.data[k], b.data[k], projection, settings, name)
        if first.init in FROM_WEIGHTS:
            projection.taken = a.detach().clone(), b.detach().clone()
        magnitude = None
        if first.use_dora:
            magnitude = self._parameter(self._slot(f"{name}.{MAGNITUDE}"))
            magnitude.data.copy_(row_squares(projection.weight).sqrt())  # B is 0: of W itself
        drops = any(s.lora_dropout > 0 for s in self.settings)
        self._put(name, LoraLinear(base, projection, a, b, self.rows, drops=drops, magnitude_KO=magnitude))

    def _attach_experts(self, index: int) -> None:
        """Adapters on stacks; `index` is where their names for the start of A begin, one for each expert."""
        adapters: dict[str, dict[str, tuple[nn.Parameter, nn.Parameter]]] = {}
        for name, count in expert_stacks(self.model).items():
            if name in self.stacks:
                module, _, leaf = name.rpartition(".")
                a, b = adapters.setdefault(module, {})[leaf] = self._pair(name)
                for k, settings in enumerate(self.settings):
                    begin_experts(a.data[k], settings, index)
                self._first_expert[name] = index
            index += count
        scale_K = [s.expert_scale for s in self.settings]
        for module, pairs in adapters.items():
            self._put(module, LoraExperts(self.model.get_submodule(module), pairs, scale_K, self.rows))

    def _pair(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self._parameter(self._slot(f"{name}.lora_A")), self._parameter(self._slot(f"{name}.lora_B"))

    def _slot(self, name: str) -> Slot:
        return next(slot for slot in self.slots if slot.name == name)

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
        originals = [(self._parameters[self._slot(name)], data) for name, data in self._original_biases.items()]
        trained = [parameter.data for parameter, _ in originals]
        for module in self.modules.values():
            module.enabled = False
        for parameter, data in originals:
            parameter.data = data
        try:
            yield
        finally:
            for module in self.modules.values():
                module.enabled = True
            for (parameter, _), data in zip(originals, trained, strict=True):
                parameter.data = data

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained, as the modules hold it."""
        return list(self._parameters.values())

    def read_weights_anew(self, device: torch.device) -> None:
        """Hold no frozen weight any more: each is read from its module when its turn comes, which is on `device`.

        Raises:
            InputError: adapters that need whole weights besides.
        """
        if self.stacks:
            what, mend = "adapters on stacks of experts need them whole", "leave the experts out of target_modules"
            raise InputError(what, where="target_modules", mend=mend)
        if self.settings[0].init in FROM_WEIGHTS:
            what = f"init_lora_weights {self.settings[0].init} starts at a part of whole weights"
            raise InputError(what, where="init_lora_weights", mend="leave it out where the model lies in pieces")
        for module in self.modules.values():
            assert isinstance(module, LoraLinear)
            module.projection.weight = live_weight(module.base)
            if module.squares_O is not None:
                module.squares_O = module.squares_O.to(device)

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
        """Columns of the flat buffer that weight decay applies to: all but trained biases and DoRA's magnitudes."""
        return sum(slot.size for slot in self.slots if not slot.name.endswith(("bias", MAGNITUDE)))

    def tensors(self, k: int = 0) -> dict[str, Tensor]:
        """Adapter k's tensors by name, of its own rank, as views of the flat buffer."""
        return self._views(self.flat_KP, k)

    def tensors_at_start(self, k: int = 0) -> dict[str, Tensor]:
        """The same as they were when the adapters were attached or loaded."""
        return self._views(self.start_KP, k)

    def _views(self, flat_KP: Tensor, k: int) -> dict[str, Tensor]:
        found = {}
        for slot in self.slots:
            r = self.settings[k].rank_of(slot.name.rpartition(".")[0])
            whole = flat_KP[k, slot.start : slot.start + slot.size].view(slot.shape)
            if len(slot.shape) == 2 and slot.name.endswith("lora_A"):
                whole = whole[:r]
            elif len(slot.shape) == 2 and slot.name.endswith("lora_B"):
                whole = whole[:, :r]
            found[slot.name] = whole
        return found

    def renew(self, k: int, settings: LoraSettings) -> None:
        """Adapter k is another one from here on, at its start; its ranks must have room in the slots.

        Raises:
            InputError: it differs in what adapters of one bank share.
        """
        if _shape(settings) != _shape(self.settings[k]) or any(
            settings.rank_of(name) > self._pair_of(name)[0].shape[1] for name in self.targets if name not in self.stacks
        ):
            raise InputError("adapters of one bank share target_modules, bias, use_dora and the ranks of patterns")
        self.settings = (*self.settings[:k], settings, *self.settings[k + 1 :])
        for name in self.targets:
            a, b = self._pair_of(name)
            a.data[k], b.data[k] = 0, 0
            if name in self.stacks:
                begin_experts(a.data[k], settings, self._first_expert[name])
                continue
            module = self.modules[name]
            assert isinstance(module, LoraLinear)
            begin(a.data[k], b.data[k], module.projection, settings, name)
            if module.projection.taken is not None:
                a0_KRI, b0_KOR = module.projection.taken
                a0_KRI[k], b0_KOR[k] = a.data[k], b.data[k]
            if module.magnitude_KO is not None and module.squares_O is not None:
                module.magnitude_KO.data[k] = module.squares_O.sqrt()
        self.start_KP[k].copy_(self.flat_KP[k])
        self._rescale(range(len(self.settings)))

    def _pair_of(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of what is adapted, all adapters'."""
        return self._parameters[self._slot(f"{name}.lora_A")], self._parameters[self._slot(f"{name}.lora_B")]

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
        self._rescale(rows)
        self.claim_gradients()

    def _rescale(self, rows: Sequence[int]) -> None:
        """Tell the modules which adapters are left, and how strong each is."""
        for name, module in self.modules.items():
            if isinstance(module, LoraExperts):
                module.scale_K = tuple(s.expert_scale for s in self.settings)
            else:
                module.keep(rows, [s.scale_of(name) for s in self.settings])


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


def start_loftq(bank: AdapterBank, original: PreTrainedModel) -> Loss4Bit:
    """Start a new adapter at what its 4-bit base lost of the original's weights."""
    adapted = {
        name: (module.projection.weight, module.lora_A.data[0], module.lora_B.data[0])
        for name, module in bank.modules.items()
        if isinstance(module, LoraLinear)
    }
    lost = start_each(bank.settings[0], adapted, original)
    bank.start_KP.copy_(bank.flat_KP)
    return lost


def _layout(
    model: PreTrainedModel, targets: list[str], several: Sequence[LoraSettings], biases: dict[str, nn.Parameter]
) -> list[Slot]:
    settings = several[0]
    slots: list[Slot] = []
    start = 0
    linears = linear_modules(model)
    for name in targets:
        shapes: tuple[tuple[int, ...], tuple[int, ...]]
        if name in linears:
            r, (out_features, in_features) = _rank(several, name), frozen_weight(model.get_submodule(name)).shape
            shapes = (r, in_features), (out_features, r)
        else:
            experts, out_features, in_features = stack_shape(model, name)
            shapes = (experts, settings.expert_rank, in_features), (experts, out_features, settings.expert_rank)
        for tensor, shape in zip(("lora_A", "lora_B"), shapes, strict=True):
            slots.append(Slot(f"{name}.{tensor}", start, shape))
            start += slots[-1].size
    magnitudes = [
        (f"{name}.{MAGNITUDE}", (frozen_weight(model.get_submodule(name)).shape[0],))
        for name in targets
        if settings.use_dora
    ]
    others = [(name, tuple(parameter.shape)) for name, parameter in biases.items()]
    weights = [one for one in others if not one[0].endswith("bias")]
    for name, shape in (*weights, *magnitudes, *(one for one in others if one not in weights)):
        slots.append(Slot(name, start, shape))
        start += slots[-1].size
    return slots


def _rank(several: Sequence[LoraSettings], name: str) -> int:
    """The largest of the adapters' ranks on this layer, which its slot has room for."""
    return max(s.rank_of(name) for s in several)


def _shape(settings: LoraSettings) -> tuple[object, ...]:
    """What adapters of one bank share."""
    s = settings
    return (
        s.rank_pattern,
        s.target_modules,
        s.layers_to_transform,
        s.bias,
        s.use_dora,
    )


def _check(several: Sequence[LoraSettings], targets: Sequence[str], stacks: Sequence[str]) -> None:
    """Refuse what cannot be: patterns that name nothing, parts that do not go together."""
    first = several[0]
    for where, keys in (("rank_pattern", first.rank_pattern), ("alpha_pattern", first.alpha_pattern)):
        for key, _ in keys:
            if not any(name not in stacks and by_pattern([(key, True)], name, False) for name in targets):
                raise InputError(f"{key!r} names no adapted linear layer", where=where, mend="use the end of its name")
    if len({(s.init in FROM_WEIGHTS) for s in several}) > 1:
        raise InputError("adapters of one bank all start from the weights, or none does", where="init_lora_weights")
    dropped = any(s.lora_dropout for s in several)
    if first.use_dora and (first.init not in (Init.KAIMING, Init.GAUSSIAN) or dropped):
        what = "DoRA starts at B = 0 and has no dropout here"
        raise InputError(what, where="use_dora", mend="leave init_lora_weights and lora_dropout as they are")
    if stacks and len({s.expert_rank for s in several}) > 1:
        raise InputError("adapters on experts share their rank", where="r", mend="give adapters on experts one r")
    if stacks:
        _check_experts(first, dropped)


def _check_experts(settings: LoraSettings, dropped: bool) -> None:
    if settings.use_dora or settings.init not in (Init.KAIMING, Init.GAUSSIAN):
        what, mend = "experts take plain LoRA only", "leave the experts out of target_modules"
        raise InputError(what, where="use_dora" if settings.use_dora else "init_lora_weights", mend=mend)
    if dropped:
        what = "dropout cannot act on experts: each one's weight is changed as a whole, as PEFT does it"
        raise InputError(what, where="lora_dropout", mend="set it to 0, or leave the experts out of target_modules")
    if settings.bias is Bias.ALL:
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
