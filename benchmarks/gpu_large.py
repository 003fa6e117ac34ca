"""Part 4 of the GPU benchmark: does a 70B-shape base in 4 bits learn within 48 GB, and within its forecast?"""

import json
import traceback
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpu_scale import LLAMA_8B, RANK, TOY, Scale, free_memory, row_of, sentence, time_once
from gpu_systems import Running, build_model, engine

from welltuned.advice.activations import MemorySetting
from welltuned.advice.memory import forecast_memory, host_bytes
from welltuned.facts.machine import Device
from welltuned.facts.model import read_model_facts
from welltuned.recipe import Tune
from welltuned.training.process import memory_used

LLAMA_70B: dict[str, Any] = LLAMA_8B | dict(
    hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64
)
GOAL_BYTES = 48e9


@dataclass(frozen=True, slots=True)
class Large:
    """One update of one row, by where the inputs of its recomputed layers wait."""

    offload: bool
    tokens: int
    peak_bytes: int
    forecast_bytes: int
    host_bytes: int
    seconds: float
    loss: float


def check_large(scale: Scale) -> dict[str, Any]:
    """Peak memory of QLoRA on the large shape, every layer recomputed; random weights do."""
    shape, tokens = (LLAMA_70B, 2048) if scale.cuda else (TOY, 64)
    found: dict[str, Any] = {"shape": shape, "rank": RANK, "goal_bytes": GOAL_BYTES, "runs": []}
    try:
        model = build_model(shape, scale.dtype, scale.device, nf4=True)
        rows = [row_of(scale, 0, tokens, 0)]
        for offload in (False, True):
            free_memory(scale)
            system = engine(model, rows, checkpointing=True, offload=offload, budget=tokens)
            found["runs"].append(asdict(_one_update(scale, system, shape, tokens, offload)))
    except Exception as error:  # what was measured before is still worth writing
        traceback.print_exc()
        found["problem"] = sentence(error)
    peaks = [r["peak_bytes"] for r in found["runs"]]
    found["passed"] = "problem" not in found and (not scale.cuda or max(peaks) < GOAL_BYTES)
    return found


def _one_update(
    scale: Scale, system: AbstractContextManager[Running], shape: dict[str, Any], tokens: int, offload: bool
) -> Large:
    if scale.cuda:
        torch.cuda.reset_peak_memory_stats()
    with system as running:
        loss = running.update()
        seconds = time_once(running.update, scale)
    device = Device(scale.device)
    total, host = _forecast(scale, shape, tokens, offload)
    return Large(offload, tokens, memory_used(device).peak, total, host, seconds, loss)


def _forecast(scale: Scale, shape: dict[str, Any], tokens: int, offload: bool) -> tuple[int, int]:
    """Bytes on the device and on the host, by the plan."""
    setting = MemorySetting(
        tune=Tune.QLORA,
        dtype=str(scale.dtype).removeprefix("torch."),
        device=Device(scale.device),
        micro_tokens=tokens,
        checkpointing=True,
        r=RANK,
        lengths=(tokens,),
        offload=offload,
    )
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({"model_type": "llama", **shape}), encoding="utf-8")
        facts = read_model_facts(folder, weights_needed=False)
    return forecast_memory(facts, setting).total_bytes, host_bytes(facts, setting) if offload else 0
