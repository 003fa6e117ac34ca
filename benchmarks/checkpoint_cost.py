"""What a checkpoint every 50 updates adds to LoRA of SmolLM2-135M on GSM8K, r 16, batch 8, on the CPU.

    python benchmarks/checkpoint_cost.py [--saves 6]

Saves of the same number of trained parameters are measured here: processor time of the training thread, which copies,
and of the thread that hashes, writes and reads back. The updates' time is that of benchmarks/sft_cpu.py on this machine
(results/sft_cpu.json), where both cores train, so that processor time is what a run grows by.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, describe_machine, write_result

from welltuned.models.lora import Slot
from welltuned.training.checkpoint import Position, Snapshot, checkpoints
from welltuned.training.keeper import Keeper

EVERY, TRAINED = 50, 4_884_480  # r 16 on all linear layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=6, help="of which the first is not counted (default: %(default)s)")
    arguments = parser.parse_args()
    speed = json.loads((RESULTS / "sft_cpu.json").read_text(encoding="utf-8"))
    result = {**measured(arguments.saves, speed), **describe_machine()}
    print(json.dumps(result, indent=1))
    print(write_result("checkpoint_cost", result))


def measured(saves: int, speed: dict[str, Any]) -> dict[str, Any]:
    """Medians of a save's processor seconds, beside an update's."""
    buffers = [torch.randn(1, TRAINED) for _ in range(3)]
    copies, writes = [], []
    with tempfile.TemporaryDirectory() as folder:
        keeper = Keeper(Path(folder), 2, lambda: None)
        for step in range(saves):
            before = time.thread_time(), keeper.cost.writing_thread
            keeper.save(lambda copied, step=step: snapshot(buffers, step, copied))
            copies.append(time.thread_time() - before[0])
            assert not keeper.join()
            writes.append(keeper.cost.writing_thread - before[1])
        size = sum(path.stat().st_size for path in checkpoints(Path(folder))[0][1].iterdir())
    copy, write = statistics.median(copies[1:]), statistics.median(writes[1:])
    update, cores = update_seconds(speed), int(speed["machine"]["cores"])
    return {
        "what": f"a checkpoint every {EVERY} updates of LoRA on SmolLM2-135M, GSM8K, r 16, batch 8, float32",
        "trained_numbers": TRAINED,
        "checkpoint_bytes": size,
        "processor_seconds": {"save_training_thread": copy, "save_writing_thread": write},
        "update_seconds": update,
        "update_cores": cores,
        "overhead": (copy + write) / (EVERY * update * cores),
        "overhead_of_training_thread": copy / (EVERY * update),
    }


def snapshot(buffers: list[torch.Tensor], step: int, copied: bool) -> Snapshot:
    flat, first, second = (buffer.to("cpu", copy=copied) for buffer in buffers)
    assert all(bool(torch.isfinite(buffer).all()) for buffer in (flat, first, second))  # as a run's snapshot does
    return Snapshot(
        flat_KP=flat,
        exp_avg_KP=first,
        exp_avg_sq_KP=second,
        steps_G=torch.zeros(1),
        slots=[Slot("all", 0, (TRAINED,))],
        position=Position(step=step, token_budget=1),
        run="cost",
        metrics_bytes=0,
        identity={},
        versions={},
    )


def update_seconds(speed: dict[str, Any]) -> float:
    """Wall seconds of an update, by benchmarks/sft_cpu.py: its tokens over tokens a second."""
    updates = speed["rows"] / speed["effective_batch_size"]
    tokens: int = speed["runs"]["welltuned"][0]["tokens"]
    return tokens / updates / float(speed["median"]["welltuned"]["tokens_per_s"])


if __name__ == "__main__":
    main()
