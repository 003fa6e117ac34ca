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
    """The largest micro-batch, without recomputation if possible, whose forecast leaves a tenth of the limit free."""

    token_budget: int
    checkpointing: bool
    forecast: MemoryForecast


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
    yield "weights", quantised * number("memory_nf4_bytes") + (model.parameters - quantised) * s.word
    if s.tune is not Tune.FULL:
        starts = 1 if s.device is Device.CPU else 0  # how they began, for the check at the end; a GPU's lie on the host
        yield "adapters", trained * master * (1 + starts)
    if s.average:
        yield "average", trained * master
    yield "gradients", trained * master
    yield "optimizer", trained * number("memory_adam_bytes")


def _work(model: ModelFacts, s: MemorySetting) -> Iterator[tuple[str, float]]:
    """What an update makes and gives back, at its peak."""
    layer, stream = layer_of(model, s), model.hidden_size * s.word * s.micro_tokens
    one = layer.kept * s.word * s.micro_tokens
    activations = model.layers * (stream if s.checkpointing else one)
    head_gradient = model.head_parameters * number("bytes_float32") if s.tune is Tune.FULL else 0.0
    again = one - stream if s.checkpointing else 0.0
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
    if s.tune is Tune.QLORA:
        work += largest * (s.word + number("memory_nf4_scale_bytes"))
    return work


def _matrix(model: ModelFacts) -> Iterator[int]:
    """Numbers of each weight that is dense at once: an expert's gate and up are one."""
    for shape in model.lora_shapes:
        yield shape.inputs * shape.outputs * (2 if shape.expert and shape.name == "gate_proj" else 1)


def fit_memory(
    model: ModelFacts,
    setting: MemorySetting,
    *,
    limit: int,
    longest: int,
    update_tokens: int,
    token_budget: int | None = None,
    checkpointing: bool | None = None,
) -> Fitted:
    """Choose budget and checkpointing; what the user fixed stays fixed. Without a fit, the smallest is returned."""
    best: Fitted | None = None
    for recompute in (False, True) if checkpointing is None else (checkpointing,):
        for budget in _budgets(setting.device, update_tokens) if token_budget is None else (token_budget,):
            micro = max(longest, min(budget, update_tokens))
            forecast = forecast_memory(model, replace(setting, micro_tokens=micro, checkpointing=recompute), limit)
            found = Fitted(token_budget=budget, checkpointing=recompute, forecast=forecast)
            if forecast.total_bytes <= number("memory_use_share") * limit:
                return found
            if best is None or forecast.total_bytes < best.forecast.total_bytes:
                best = found
    assert best is not None
    return best


def _budgets(device: Device, update_tokens: int) -> list[int]:
    """From the usual budget, or one update's tokens where they are fewer, down by halves to the least."""
    spec, step = rule(f"token_budget_{device}"), int(number("token_budget_step"))
    budget = min(int(spec.value), -(-update_tokens // step) * step)
    budgets = [budget]
    while budgets[-1] // 2 >= spec.low:
        budgets.append(budgets[-1] // 2)
    return budgets
