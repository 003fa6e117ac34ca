"""Memory by part, and what fits: the token budget of a micro-batch, and whether activations are recomputed.

The peak is the highest of the moments at which memory can be highest: the head's loss, while all that the layers keep
is there; the backward pass of the last layer, which with checkpointing is run again first; and, where a tied embedding
is trained, the end, when its second gradient meets the first. `activations` are what the layers keep, `logits` what the
head holds at its turn, `workspace` what a later moment takes beyond that. All labels of a micro-batch are counted: a
data set that trains on fewer needs a little less.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from welltuned.advice.activations import MemorySetting, layer_of
from welltuned.advice.rules import number, rule
from welltuned.facts.machine import Device
from welltuned.facts.model import ModelFacts
from welltuned.recipe import Tune


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryForecast:
    """Bytes by part. `fits` is None where no limit is known."""

    parts: Mapping[str, int]
    total_bytes: int
    limit_bytes: int | None
    fits: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """The largest micro-batch, without recomputation if possible, whose forecast leaves a tenth of the limit free.

    Attributes:
        layers: how many layers are recomputed. share: of all layers.
        offload: whether what goes into them waits on the host, and `host_bytes` what that takes there.
        dense_base: whether 4-bit weights stay expanded. eight_bit: whether AdamW's moments are in 8 bits.
    """

    token_budget: int
    layers: int
    share: float
    offload: bool
    dense_base: bool
    eight_bit: bool
    host_bytes: int
    forecast: MemoryForecast

    @property
    def checkpointing(self) -> bool:
        return self.layers > 0


def forecast_memory(model: ModelFacts, setting: MemorySetting, limit: int | None = None) -> MemoryForecast:
    """Every part in bytes, and whether the sum stays within the limit."""
    parts = {name: int(size) for name, size in (*_state(model, setting), *_work(model, setting))}
    total = sum(parts.values())
    fits = None if limit is None else total <= limit
    return MemoryForecast(parts=MappingProxyType(parts), total_bytes=total, limit_bytes=limit, fits=fits)


def trained_parameters(model: ModelFacts, setting: MemorySetting) -> int:
    if setting.tune is Tune.FULL:
        return model.parameters
    return model.lora_parameters(setting.r, setting.targets) + setting.more


def _state(model: ModelFacts, s: MemorySetting) -> Iterator[tuple[str, float]]:
    """What is there from the first update to the last."""
    trained, master = trained_parameters(model, s), number("memory_master_bytes")
    quantised = 0
    if s.tune is Tune.QLORA:  # embeddings, head and norms stay as they are
        quantised = sum(shape.parameters for shape in model.lora_shapes)
        yield "quantisation_state", quantised * number("memory_nf4_state_bytes")
        if s.dense_base:
            yield "dense_base", quantised * s.word
    yield "weights", quantised * number("memory_nf4_bytes") + (model.parameters - quantised) * s.word / s.parts
    own = s.parts if s.tune is Tune.FULL else 1  # adapters are whole everywhere
    if s.tune is not Tune.FULL:
        starts = 1 if s.device is Device.CPU else 0  # how they began, for the check at the end; a GPU's lie on the host
        yield "adapters", trained * master * (1 + starts)
    if s.average:
        yield "average", trained * master / own
    yield "gradients", trained * master / own
    if s.eight_bit:
        yield "optimizer", trained * number("memory_adam_8bit_bytes") + number(f"memory_adam_8bit_work_{s.device}")
    else:
        yield "optimizer", trained * number("memory_adam_bytes") / own
    if s.parts > 1:
        yield "gathered", _gathered(model, s)


def _gathered(model: ModelFacts, s: MemorySetting) -> float:
    """What of a model in pieces is whole at a time: embeddings and head, a layer, and the next one on its way.

    Of full fine-tuning their gradients as well, once more while they are summed. By FSDP2's code; not measured.
    """
    outside = model.head_parameters * (1 if model.tied_head else 2)
    layer = (model.parameters - outside) / model.layers
    copies, gradients = number("memory_fsdp_copies"), 2 if s.tune is Tune.FULL else 0
    return (outside + copies * layer) * s.word + gradients * (outside + layer) * number("memory_master_bytes")


def _work(model: ModelFacts, s: MemorySetting) -> Iterator[tuple[str, float]]:
    """What an update makes and gives back, at its peak."""
    layer, stream = layer_of(model, s), model.hidden_size * s.word * s.micro_tokens
    one = layer.kept * s.word * s.micro_tokens
    again_layers = s.recomputed(model.layers)
    here = min(again_layers, number("memory_offload_streams")) if s.offload else again_layers
    activations = (model.layers - again_layers) * one + here * stream
    head_gradient = model.head_parameters * number("bytes_float32") if s.tune is Tune.FULL else 0.0
    again = one - stream if again_layers == model.layers else 0.0  # else it finds the room that a kept layer left
    until = {
        "head": activations + _head(model, s) + head_gradient * _copies(s),
        "layer": activations + again + _layer_work(model, s, layer.work) + head_gradient * model.tied_head,
        "end": stream + head_gradient * (1 + model.tied_head),
    }
    logits = until["head"] - activations
    workspace = max(until.values()) - until["head"]
    yield "activations", activations
    yield "logits", logits
    yield "workspace", workspace
    fragmentation = number(f"memory_fragmentation_{s.device}") * (activations + workspace + logits)
    compiled = number("memory_compiled_cpu") if s.half and s.device is Device.CPU else 0.0
    yield "overhead", number(f"memory_overhead_{s.device}") + fragmentation + compiled


def _copies(s: MemorySetting) -> int:
    """The gradient of a trained head, and its product with the loss's own gradient, which a CPU can see to be 1."""
    return 1 if s.device is Device.CPU else 2


def _head(model: ModelFacts, s: MemorySetting) -> float:
    """Bytes of the loss: hidden states of the labels and their gradient, a block of it in fp32, one tile of logits."""
    wide = number("bytes_float32")
    rows, columns = rule(f"memory_logit_tile_{s.device}").value
    rows = min(rows, s.micro_tokens)
    last = 1 + (s.tune is Tune.FULL)  # what the last norm keeps
    labels = (last + 2) * model.hidden_size * s.word * s.micro_tokens
    tile = rows * min(columns, model.vocabulary) * (wide + (s.word if s.half else 0))
    return labels + rows * model.hidden_size * wide + tile


def _layer_work(model: ModelFacts, s: MemorySetting, elements: float) -> float:
    """Bytes that a layer's backward pass works with: gradients of what it kept, of its weights, its dense weights."""
    wide, largest = number("bytes_float32"), max(_matrix(model))
    work = elements * s.word * s.micro_tokens
    if s.tune is Tune.FULL:  # a weight's gradient, before it is added, beside the gradient of one MLP width
        return max(work, work - model.intermediate_size * s.word * s.micro_tokens + largest * wide)
    work += trained_parameters(model, s) / model.layers * wide
    if s.tune is Tune.QLORA and not s.dense_base:
        work += largest * (s.word + number("memory_nf4_scale_bytes"))
    return work


def _matrix(model: ModelFacts) -> Iterator[int]:
    """Numbers of each weight that is dense at once: an expert's gate and up are one."""
    for shape in model.lora_shapes:
        yield shape.inputs * shape.outputs * (2 if shape.expert and shape.name == "gate_proj" else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """What the user fixed; None is open.

    Attributes:
        checkpointing: none of the layers, or all of them. layers: so many.
    """

    token_budget: int | None = None
    checkpointing: bool | None = None
    layers: int | None = None
    offload: bool | None = None
    dense_base: bool | None = None


def fit_memory(
    model: ModelFacts,
    setting: MemorySetting,
    *,
    limit: int,
    longest: int,
    update_tokens: int,
    host_limit: int = 0,
    fixed: Fixed = Fixed(),  # noqa: B008 - frozen
) -> Fitted:
    """Choose micro-batch, recomputed layers, their place, and the base's; what the user fixed stays fixed.

    In this order, by what it costs: smaller micro-batches; as few recomputed layers as do, in the smallest of them;
    on a GPU, their inputs on the host. Without a fit, the smallest is returned. Room that is left in the end takes
    the dense base.
    """
    usable, best = number("memory_use_share") * limit, None
    for layers, offload in _ways(model, setting, fixed):
        for budget in _budgets(setting.device, update_tokens) if fixed.token_budget is None else (fixed.token_budget,):
            found = _fitted(model, setting, (budget, layers, offload), limit, max(longest, min(budget, update_tokens)))
            if found.host_bytes > number("memory_use_share") * host_limit and fixed.offload is None:
                continue
            if found.forecast.total_bytes <= usable:
                return _fewest_layers(model, setting, found, limit, longest, update_tokens, fixed)
            if best is None or found.forecast.total_bytes < best.forecast.total_bytes:
                best = found
    assert best is not None
    return best


def _ways(model: ModelFacts, setting: MemorySetting, fixed: Fixed) -> list[tuple[int, bool]]:
    """(recomputed layers, on the host?) to try, the cheapest first."""
    if fixed.layers is not None:
        counts = [min(fixed.layers, model.layers)]
    else:
        counts = [0, model.layers] if fixed.checkpointing is None else [model.layers * fixed.checkpointing]
    if fixed.offload is not None:
        return [(count, fixed.offload and count > 0) for count in counts]
    ways = [(count, False) for count in counts]
    return ways + ([(counts[-1], True)] if setting.device is Device.CUDA and counts[-1] else [])


def _fitted(
    model: ModelFacts, setting: MemorySetting, way: tuple[int, int, bool], limit: int, micro: int, dense: bool = False
) -> Fitted:
    budget, layers, offload = way
    setting = replace(
        setting, micro_tokens=micro, checkpointing=layers > 0, layers=layers, offload=offload, dense_base=dense
    )
    return Fitted(
        token_budget=budget,
        layers=layers,
        share=layers / model.layers,
        offload=offload,
        dense_base=dense,
        eight_bit=setting.eight_bit,
        host_bytes=host_bytes(model, setting) if offload else 0,
        forecast=forecast_memory(model, setting, limit),
    )


def host_bytes(model: ModelFacts, s: MemorySetting) -> int:
    """Pinned memory for the inputs of recomputed layers: torch rounds each up to a power of two."""
    stream = int(model.hidden_size * s.word * s.micro_tokens)
    return s.recomputed(model.layers) * (1 << max(0, stream - 1).bit_length())


def _fewest_layers(
    model: ModelFacts,
    setting: MemorySetting,
    found: Fitted,
    limit: int,
    longest: int,
    update_tokens: int,
    fixed: Fixed,
) -> Fitted:
    """As found, but with no more recomputed layers than needed, and with a dense base where there is room for it."""
    usable = number("memory_use_share") * limit
    open_count = found.checkpointing and not found.offload and fixed.layers is None and fixed.checkpointing is None
    if open_count:
        budgets = _budgets(setting.device, update_tokens) if fixed.token_budget is None else [fixed.token_budget]
        for layers in range(1, model.layers + 1):
            way = budgets[-1], layers, False
            fewer = _fitted(model, setting, way, limit, max(longest, min(budgets[-1], update_tokens)))
            if fewer.forecast.total_bytes <= usable:
                found = fewer if layers < model.layers else found
                break
    if setting.tune is not Tune.QLORA or fixed.dense_base is False:
        return found
    micro = max(longest, min(found.token_budget, update_tokens))
    dense = _fitted(model, setting, (found.token_budget, found.layers, found.offload), limit, micro, dense=True)
    return dense if fixed.dense_base or dense.forecast.total_bytes <= usable else found


def _budgets(device: Device, update_tokens: int) -> list[int]:
    """From the usual budget, or one update's tokens where they are fewer, down by halves to the least."""
    spec, step = rule(f"token_budget_{device}"), int(number("token_budget_step"))
    budget = min(int(spec.value), -(-update_tokens // step) * step)
    budgets = [budget]
    while budgets[-1] // 2 >= spec.low:
        budgets.append(budgets[-1] // 2)
    return budgets
