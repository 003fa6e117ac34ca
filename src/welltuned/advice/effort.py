"""How much work a run is: updates, tokens, floating-point operations, and time where the speed has been measured.

Operations per token, N trunk parameters in linear layers, f labelled share, V·h head, P trained LoRA parameters, L
layers, S length, d attention width: LoRA 4N + 4f·V·h + 7·L·S·d + 6P (the frozen base needs no weight gradients),
full 6N + 6f·V·h + 7·L·S·d; recomputing repeats the forward pass of its share of the layers: of 2N + 2·L·S·d + 2P.
"""

from dataclasses import dataclass
from enum import StrEnum

from welltuned.advice.epoch import Epoch
from welltuned.advice.rules import number, rule
from welltuned.data.stream import steps_per_epoch
from welltuned.facts.machine import Device, MachineFacts
from welltuned.facts.model import ModelFacts
from welltuned.recipe import Method, Tune


class SpeedFrom(StrEnum):
    """Where a forecast's speed is from: the processor's kind alone, or runs and probes on this machine."""

    ARITHMETIC = "arithmetic"
    MEASURED = "measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeForecast:
    """`tokens` are all that pass through the model in training.

    `tokens_per_second` and `seconds` are None for grpo before a run was measured: how long sampling takes does not
    follow from operations.
    """

    updates: int
    tokens: int
    supervised_tokens: int
    flops_per_token: int
    tokens_per_second: float | None
    seconds: float | None
    speed_from: SpeedFrom = SpeedFrom.ARITHMETIC


def forecast_time(
    model: ModelFacts,
    epoch: Epoch,
    machine: MachineFacts,
    method: Method,
    tune: Tune,
    *,
    dtype: str,
    trained: int,
    recomputed: float,
    updates: int,
    batch: int,
    max_length: int,
    flops_per_second: float | None,
) -> TimeForecast:
    """The run's effort; evaluation is not counted. `flops_per_second` is what runs like it reached, where known."""
    whole_epochs, rest = divmod(updates, steps_per_epoch(epoch.examples, batch))
    passes = whole_epochs + min(1.0, rest * batch / epoch.examples)  # an epoch's last update may be smaller
    lengths = [min(length, max_length) for length in epoch.lengths]
    tokens = passes * epoch.tokens * (sum(lengths) / sum(epoch.lengths))
    attended = _attended(lengths)
    flops = flops_per_token(model, tune, trained, attended, epoch.supervised_share, recomputed)
    flops += rule("extra_passes").value.get(str(method), 0) * _forward(model, attended, epoch.supervised_share)
    speed_from = SpeedFrom.ARITHMETIC if flops_per_second is None else SpeedFrom.MEASURED
    if flops_per_second is None and method is not Method.GRPO:
        flops_per_second = machine_flops(machine, dtype)
    tokens_per_second = None if flops_per_second is None else round(flops_per_second / flops, 1)
    return TimeForecast(
        updates=updates,
        tokens=round(tokens),
        supervised_tokens=round(tokens * epoch.supervised_share),
        flops_per_token=round(flops),
        tokens_per_second=tokens_per_second,
        seconds=None if tokens_per_second is None else round(tokens / tokens_per_second, 1),
        speed_from=speed_from,
    )


def machine_flops(machine: MachineFacts, dtype: str) -> float:
    """Operations a second that training may reach, by the processors' kind alone: of all that share the run."""
    if machine.device is Device.CUDA:
        name, peaks = machine.gpu_name or "", rule("flops_gpu").value
        known = [peak for kind, peak in peaks.items() if kind in name]
        peak = max(known) if known else number("flops_gpu_unknown")
        return machine.processes * number("flops_gpu_share") * peak
    cores = machine.cores * machine.processes / machine.processes_here  # of all machines
    if dtype != "bfloat16" or not machine.native_bf16:
        return cores * number("flops_cpu_core")
    faster = number("flops_amx_factor" if machine.amx_bf16 else "flops_avx512_bf16_factor")
    return cores * number("flops_cpu_core") * faster


def _attended(lengths: list[int]) -> float:
    """The length that a token's attention sees, averaged over tokens: long rows hold more of them."""
    return sum(length**2 for length in lengths) / sum(lengths)


def flops_per_token(
    model: ModelFacts, tune: Tune, trained: int, length: float, labelled_share: float, recomputed: float
) -> float:
    """Operations of an update for one token, where this share of the layers is recomputed."""
    trunk, head = model.active_trunk_linear_parameters, labelled_share * model.head_parameters
    attention = model.layers * length * model.attention_width
    if tune is Tune.FULL:
        flops, adapters = 6 * trunk + 6 * head + 7 * attention, 0
    else:
        flops, adapters = 4 * trunk + 4 * head + 7 * attention + 6 * trained, trained
    return flops + recomputed * (2 * trunk + 2 * attention + 2 * adapters)


def _forward(model: ModelFacts, length: float, labelled_share: float) -> float:
    """Operations of one forward pass, for one token."""
    trunk, head = model.active_trunk_linear_parameters, labelled_share * model.head_parameters
    return 2 * trunk + 2 * head + 2 * model.layers * length * model.attention_width
