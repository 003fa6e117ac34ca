"""Memory by part, and what fits: the token budget of a micro-batch, and whether activations are recomputed.

Per token and layer, with hidden size h, query width q, key/value width k and (active) MLP width i, the backward pass
keeps 4h (two residuals, two normalised inputs) + 3q (query before and after the rotation, attention's output) + 3k (key
before and after, value) + 2i (gate and up) + r for every adapter, in the model's number format. Checkpointing keeps h,
and recomputes one layer at a time. The attention matrix and the logits of the whole batch are never formed. Where
experts run on our code, a layer at work holds four rows of h for each of a token's experts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from welltuned.advice.rules import number, rule
from welltuned.facts.machine import Device
from welltuned.facts.model import ModelFacts
from welltuned.recipe import Tune


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySetting:
    """What memory depends on. `micro_tokens` is the most tokens that pass through the model at once."""

    tune: Tune
    dtype: str
    device: Device
    micro_tokens: int
    checkpointing: bool
    r: int = 0
    targets: tuple[str, ...] | None = None


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
    parts = {name: int(size) for name, size in _parts(model, setting)}
    total = sum(parts.values())
    fits = None if limit is None else total <= limit
    return MemoryForecast(parts=MappingProxyType(parts), total_bytes=total, limit_bytes=limit, fits=fits)


def trained_parameters(model: ModelFacts, setting: MemorySetting) -> int:
    if setting.tune is Tune.FULL:
        return model.parameters
    return model.lora_parameters(setting.r, setting.targets)


def _parts(model: ModelFacts, s: MemorySetting) -> Iterator[tuple[str, float]]:
    word = number(f"bytes_{s.dtype}")
    yield from _weight_parts(model, s, word)
    layer = layer_elements(model, s) * word * s.micro_tokens
    kept = model.hidden_size * word * s.micro_tokens if s.checkpointing else layer
    activations = kept * model.layers + 2 * model.hidden_size * word * s.micro_tokens
    workspace = layer * (2 if s.checkpointing else 1)  # one layer's gradients, and with checkpointing its recomputation
    if s.tune is Tune.QLORA:
        workspace += max(shape.inputs * shape.outputs for shape in model.lora_shapes) * word
    if _runs_experts(model, s):
        rows = number("memory_routed_rows") * model.active_experts
        workspace += rows * model.hidden_size * word * s.micro_tokens
    logit_rows = min(number("memory_logit_rows"), s.micro_tokens)
    logits = logit_rows * model.vocabulary * number("bytes_float32") * number("memory_logit_buffers")
    yield "activations", activations
    yield "workspace", workspace
    yield "logits", logits
    fragmentation = number("memory_fragmentation") * (activations + workspace + logits)
    yield "overhead", number(f"memory_overhead_{s.device}") + fragmentation


def _weight_parts(model: ModelFacts, s: MemorySetting, word: float) -> Iterator[tuple[str, float]]:
    trained, master = trained_parameters(model, s), number("memory_master_bytes")
    quantised = 0
    if s.tune is Tune.QLORA:  # embeddings, head and norms stay as they are
        quantised = sum(shape.parameters for shape in model.lora_shapes)
        yield "quantisation_state", quantised * number("memory_nf4_state_bytes")
    yield "weights", quantised * number("memory_nf4_bytes") + (model.parameters - quantised) * word
    if s.tune is Tune.FULL:
        yield "gradients", trained * word
        copies = master if word < master else 0  # a bf16 model keeps fp32 masters beside it
        yield "optimizer", trained * (number("memory_adam_bytes") + copies)
        return
    yield "adapters", trained * master
    yield "gradients", trained * master
    yield "optimizer", trained * number("memory_adam_bytes")


def _runs_experts(model: ModelFacts, s: MemorySetting) -> bool:
    return s.tune is Tune.QLORA and model.experts > 0 or any(x.expert for x in model.adapted(s.targets or ()))


def layer_elements(model: ModelFacts, s: MemorySetting) -> float:
    """Numbers that one layer keeps for the backward pass, for one token."""
    ranks = 0
    if s.tune is not Tune.FULL:
        ranks = sum(shape.active for shape in model.adapted(s.targets))
    return (
        number("memory_saved_hidden") * model.hidden_size
        + number("memory_saved_query") * model.attention_width
        + number("memory_saved_key_value") * model.key_value_width
        + number("memory_saved_intermediate") * model.intermediate_size
        + s.r * ranks / model.layers
    )


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
            tried = MemorySetting(
                tune=setting.tune,
                dtype=setting.dtype,
                device=setting.device,
                micro_tokens=micro,
                checkpointing=recompute,
                r=setting.r,
                targets=setting.targets,
            )
            forecast = forecast_memory(model, tried, limit)
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
