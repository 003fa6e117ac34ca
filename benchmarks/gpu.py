"""One GPU: does the engine compute the right thing in bf16, and how fast, beside plain transformers + PEFT?

    PYTHONPATH=src python benchmarks/gpu.py [--minutes 9] [--layers 32] [--out FOLDER]
    PYTHONPATH=src python benchmarks/gpu.py --toy       the same code at toy size on the CPU, in seconds

Needs CUDA, torch 2.11, transformers 5.17 and peft or newer (bitsandbytes for QLoRA), and no network: the model has the
shape of Llama-3.1-8B and random weights. Six parts, one after the other:

1. parts       packed attention beside SDPA for each example, errors and times; the head's loss beside its floor;
2. parity      loss and adapter gradients of a small model in bf16: the engine's error beside PEFT's own;
3. speed       tokens/s and peak memory in turns (A B C A B C), medians, as a share of the floor: the FLOPs that the
               update needs at the rate of a large matrix product measured in the same minutes; rank 16 here, other
               ranks, TRL and Unsloth by gpu_speed.py;
4. optimizer   AdamW's update in fp32 and in 8 bits, beside bitsandbytes' kernel;
5. bank        four adapters in one bank against four runs;
6. large       a base of Llama-3.1-70B's shape in 4 bits: its peak beside its forecast, below 48 GB.

Tokens are real tokens: padding, which only PEFT needs, is not counted. Running out of memory is a result, and so is a
part for which no time was left. What is known is written after every group of cells and every part, so that a machine
that goes away takes little with it.
"""

import sys
from collections.abc import Callable
from typing import Any

from common import describe_machine
from gpu_bank import measure_bank, print_bank
from gpu_large import check_large, print_large
from gpu_optimizer import check_optimizer, print_optimizer
from gpu_parity import attention_is_right, check_attention, check_parity, fastest_kernel, time_head
from gpu_peers import Peers
from gpu_scale import RANK, Deadline, Scale, free_memory, start, tunes_here, usual_options
from gpu_speed import GOAL, Wanted, measure_speed, print_cells, sound
from gpu_systems import build_model

KEPT = {"optimizer": 40.0, "bank": 50.0, "large": 110.0}  # seconds that speed leaves them, on a GPU


def run(scale: Scale, deadline: Deadline, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All parts; `save` is called with all that is known so far."""
    tunes = tunes_here()
    result: dict[str, Any] = {"benchmark": "gpu", "toy": not scale.cuda, "machine": describe_machine()}
    result |= {"layers": scale.shape["num_hidden_layers"], "goal_tokens_per_second": GOAL}

    result["attention"], result["head"] = check_attention(scale), time_head(scale)
    print_parts(result["attention"], result["head"])
    result["ok"] = attention_is_right(result["attention"], scale) and "problem" not in result["head"]
    save(result)

    result["parity"] = []
    for tune in tunes:
        result["parity"].append(check_parity(scale, tune))
        print_parity(result["parity"][-1])
        result["ok"] &= result["parity"][-1]["passed"]
        free_memory(scale)
        save(result)

    after = sum(KEPT.values()) if scale.cuda else 0.0
    wanted, result["cells"] = Wanted(tunes, (RANK,), (False, True)), []
    kernel = fastest_kernel(result["attention"], scale)
    for cells in measure_speed(scale, wanted, kernel, deadline.earlier(after), Peers.none()):
        print_cells(cells, scale)
        result["cells"] += [cell.to_json() for cell in cells]
        result["ok"] &= sound(cells)
        save(result)

    for name, part, show in _last_parts(scale, deadline, tunes):
        result[name] = part()
        show(result[name])
        result["ok"] &= result[name]["passed"]
        free_memory(scale)
        save(result)
    return result


Part = tuple[str, Callable[[], dict[str, Any]], Callable[[dict[str, Any]], None]]


def _last_parts(scale: Scale, deadline: Deadline, tunes: list[str]) -> list[Part]:
    """(name, what measures it, what prints it)."""

    def bank() -> dict[str, Any]:
        model = build_model(scale.shape, scale.dtype, scale.device, nf4=False)
        return measure_bank(scale, model, "lora", deadline.earlier(KEPT["large"] if scale.cuda else 0.0))

    parts: list[Part] = [
        ("optimizer", lambda: check_optimizer(scale), print_optimizer),
        ("bank", bank, print_bank),
    ]
    if "qlora" in tunes:
        parts.append(("large", lambda: check_large(scale, deadline), print_large))
    return parts


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


def main(arguments: list[str] | None = None) -> int:
    started = start("gpu", usual_options(__doc__).parse_args(arguments))
    return 0 if run(started.scale, started.deadline, started.save)["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
