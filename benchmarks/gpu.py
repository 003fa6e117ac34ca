"""One GPU: does the engine compute the right thing in bf16, and how fast, beside plain transformers + PEFT?

    PYTHONPATH=src python benchmarks/gpu.py [--minutes 9] [--layers 32] [--out FOLDER]
    PYTHONPATH=src python benchmarks/gpu.py --toy       the same code at toy size on the CPU, in seconds

Needs CUDA, torch 2.11, transformers 5.17 and peft or newer (bitsandbytes for QLoRA), and no network: the model has the
shape of Llama-3.1-8B and random weights. Four parts, one after the other:

1. parts    packed attention beside SDPA for each example, errors and times; the head's loss beside its floor;
2. parity   loss and adapter gradients of a small model in bf16: the engine's error beside PEFT's own;
3. speed    tokens/s and peak memory in turns (A B C A B C), medians, as a share of the floor: the FLOPs that the
            update needs at the rate of a large matrix product measured in the same minutes;
4. large    a base of Llama-3.1-70B's shape in 4 bits: its peak beside its forecast, below 48 GB.

Tokens are real tokens: padding, which only PEFT needs, is not counted. Running out of memory is a result. What is
known is written after every group of cells, so that a machine that goes away takes little with it.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS, describe_machine, write_result
from gpu_large import check_large
from gpu_parity import attention_is_right, check_attention, check_parity, fastest_kernel, time_head
from gpu_scale import CPU, GPU, RANK, Scale, free_memory
from gpu_speed import FAILED, Cell, losses_agree, measure_speed

GOAL = 18_000  # tokens/s for the first group of cells on an H200, where its floor is 23,200


def run(scale: Scale, minutes: float, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All parts; `save` is called with all that is known so far."""
    deadline = time.perf_counter() + 60 * minutes
    tunes = tunes_here()
    result: dict[str, Any] = {"benchmark": "gpu", "toy": not scale.cuda, "machine": describe_machine()}
    result |= {"layers": scale.shape["num_hidden_layers"], "goal_tokens_per_second": GOAL}

    result["attention"], result["head"] = check_attention(scale), time_head(scale)
    print_parts(result["attention"], result["head"])
    result["ok"] = attention_is_right(result["attention"], scale) and "problem" not in result["head"]

    result["parity"] = []
    for tune in tunes:
        result["parity"].append(check_parity(scale, tune))
        print_parity(result["parity"][-1])
        free_memory(scale)
    result["ok"] &= all(found["passed"] for found in result["parity"])

    result["cells"] = []
    for cells in measure_speed(scale, tunes, fastest_kernel(result["attention"], scale), deadline):
        print_cells(cells, scale)
        result["cells"] += [cell.to_json() for cell in cells]
        result["ok"] &= losses_agree(cells) and not any((c.problem or "").startswith(FAILED) for c in cells)
        save(result)
    if "qlora" in tunes:
        result["large"] = check_large(scale)
        print_large(result["large"])
        result["ok"] &= result["large"]["passed"]
        save(result)
    return result


def tunes_here() -> list[str]:
    if find_spec("bitsandbytes") is None:
        print("QLoRA is left out: bitsandbytes is not installed")
        return ["lora"]
    return ["lora", "qlora"]


def print_parts(attention: list[dict[str, Any]], head: dict[str, Any]) -> None:
    print("\nattention, forward + backward; errors of output, dq, dk, dv against fp32")
    for a in attention:
        told = a.get("problem") or f"{1e3 * a['seconds']:9.3f} ms"
        errors = "  ".join(f"{e:.1e}" for e in a.get("errors", {}).values())
        print(f"  {a['rows']:7} {a['way']:15} {told}   {errors}")
    floor = f"{1e3 * head.get('seconds', 0.0):9.3f} ms, floor {1e3 * head.get('floor_seconds', 0.0):.3f} ms"
    print(f"  head's loss, {head['rows']} rows:  {head.get('problem') or floor}", flush=True)


def print_parity(found: dict[str, Any]) -> None:
    verdict = "passed" if found["passed"] else "FAILED " + found.get("problem", "")
    print(f"\nparity, {found['tune']}: {verdict}   (errors of loss and gradient against fp32; cosine)")
    for name, e in found["errors"].items():
        print(f"  {name:30} {e['loss']:.1e}  {e['gradient']:.1e}  {e['cosine']:.6f}", flush=True)


def print_large(found: dict[str, Any]) -> None:
    layers, goal = found["shape"]["num_hidden_layers"], found["goal_bytes"] / 1e9
    print(f"\nlarge: {layers} layers of {found['shape']['hidden_size']}, QLoRA r {RANK}, goal below {goal:.0f} GB")
    for r in found["runs"]:
        where = f"{r['host_bytes'] / 1e9:.1f} GB on the host" if r["offload"] else "nothing on the host"
        peak, forecast = r["peak_bytes"] / 1e9, r["forecast_bytes"] / 1e9
        told = f"peak {peak:.1f} GB, forecast {forecast:.1f} GB, {r['seconds']:.2f} s"
        print(f"  {r['tokens']:,} tokens, {where}: {told}")
    if "problem" in found:
        print(f"  FAILED {found['problem']}")


def print_cells(cells: list[Cell], scale: Scale) -> None:
    first = cells[0]
    full = scale is GPU and first.tune == "lora" and first.rows == f"S = {GPU.long}" and not first.checkpointing
    print(f"\n{first.tune} r {RANK}, {first.rows}, {'with' if first.checkpointing else 'without'} checkpointing")
    ceiling = f"ceiling {median(first.ceilings) / 1e12:.3g} TFLOP/s" if first.ceilings else "ceiling not measured"
    print(f"  {first.flops_per_token / 1e9:.3g} GFLOP a token, {ceiling}, floor {first.floor:,.0f} tokens/s")
    for cell in cells:
        told = cell.problem or ""
        if cell.seconds:
            told = (
                f"{cell.tokens_per_second:10,.0f} tokens/s  {cell.share_of_floor:5.2f} of floor  "
                f"peak {cell.peak_bytes / 1e9:6.1f} GB  micro-batch {cell.budget:,}  {len(cell.seconds)} updates {told}"
            )
        print(f"  {cell.system:20} {told}")
    if full:
        print(f"  {'goal on an H200':20} {GOAL:10,} tokens/s  (floor there 23,200)")
    if not losses_agree(cells):
        print(f"  THE LOSSES DIFFER: {[cell.loss for cell in cells]}")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size on the CPU (so it is without CUDA, too)")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default: 9)")
    parser.add_argument("--layers", type=int, help="decoder layers of the measured model (default: 32)")
    parser.add_argument("--out", type=Path, help="folder of the result (default: benchmarks/results; toy: none)")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)  # its new name is not in 5.17

    scale = CPU if options.toy or not torch.cuda.is_available() else GPU
    name = f"gpu-{torch.cuda.get_device_name().lower().replace(' ', '-')}" if scale.cuda else "gpu-toy"
    folder = options.out or (RESULTS if scale.cuda else None)
    if not scale.cuda:
        print("Toy size on the CPU: the code is tried, the numbers mean nothing.")
    if options.layers:
        scale = replace(scale, shape=scale.shape | {"num_hidden_layers": options.layers})
        name += f"-{options.layers}-layers"

    def save(result: dict[str, Any]) -> None:
        if folder is not None:
            write_result(name, result, folder)

    return 0 if run(scale, options.minutes, save)["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
