"""One GPU: does a 70B-shape base in 4 bits learn within 48 GB, and within its forecast?

    PYTHONPATH=src python benchmarks/gpu_large.py [--minutes 9]
    PYTHONPATH=src python benchmarks/gpu_large.py --toy       the same code at toy size on the CPU, in seconds

Random weights of Llama-3.1-70B's shape, drawn and quantised layer by layer; QLoRA at rank 16, every layer recomputed,
one row of 2,048 tokens; with what goes into recomputed layers on the GPU, and on the host. gpu.py runs this as a part.
"""

import json
import sys
import traceback
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import describe_machine
from gpu_scale import (
    LLAMA_8B,
    NO_TIME,
    RANK,
    TOY,
    Deadline,
    Scale,
    free_memory,
    row_of,
    sentence,
    start,
    time_once,
    tunes_here,
    usual_options,
)
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
LEAST = 60.0  # seconds below which 70 billion numbers are not begun on a GPU


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


def check_large(scale: Scale, deadline: Deadline) -> dict[str, Any]:
    """Peak memory of QLoRA on the large shape, every layer recomputed; random weights do."""
    shape, tokens = (LLAMA_70B, 2048) if scale.cuda else (TOY, 64)
    found: dict[str, Any] = {"shape": shape, "rank": RANK, "goal_bytes": GOAL_BYTES, "runs": []}
    if scale.cuda and deadline.left < LEAST:
        return found | {"problem": NO_TIME, "passed": True}
    try:
        model = build_model(shape, scale.dtype, scale.device, nf4=True)
        rows = [row_of(scale, 0, tokens, 0)]
        for offload in (False, True):
            if found["runs"] and not deadline.left:
                found["problem"] = NO_TIME
                break
            free_memory(scale)
            system = engine(model, rows, checkpointing=True, offload=offload, budget=tokens)
            found["runs"].append(asdict(_one_update(scale, system, shape, tokens, offload)))
    except Exception as error:  # what was measured before is still worth writing
        traceback.print_exc()
        found["problem"] = sentence(error)
    peaks = [r["peak_bytes"] for r in found["runs"]]
    failed = found.get("problem", NO_TIME) != NO_TIME
    found["passed"] = not failed and (not scale.cuda or max(peaks, default=0) < GOAL_BYTES)
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


def print_large(found: dict[str, Any]) -> None:
    layers, goal = found["shape"]["num_hidden_layers"], found["goal_bytes"] / 1e9
    print(f"\nlarge: {layers} layers of {found['shape']['hidden_size']}, QLoRA r {RANK}, goal below {goal:.0f} GB")
    for r in found["runs"]:
        where = f"{r['host_bytes'] / 1e9:.1f} GB on the host" if r["offload"] else "nothing on the host"
        peak, forecast = r["peak_bytes"] / 1e9, r["forecast_bytes"] / 1e9
        told = f"peak {peak:.1f} GB, forecast {forecast:.1f} GB, {r['seconds']:.2f} s"
        print(f"  {r['tokens']:,} tokens, {where}: {told}")
    if "problem" in found:
        print(f"  {'passed, but ' if found['passed'] else 'FAILED '}{found['problem']}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    started = start("gpu-large", usual_options(__doc__).parse_args(arguments))
    result: dict[str, Any] = {"benchmark": "gpu-large", "toy": not started.scale.cuda, "machine": describe_machine()}
    if "qlora" not in tunes_here():
        return 1
    result["large"] = check_large(started.scale, started.deadline)
    print_large(result["large"])
    started.save(result)
    return 0 if result["large"]["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
