"""What saving a checkpoint costs beside training: LoRA of SmolLM2-135M on GSM8K's rows, r 16, batch 8, on the CPU.

    python benchmarks/checkpoint_cost.py --data gsm8k_train.jsonl [--model FOLDER] [--updates 2] [--saves 5]

Counted is processor time, of the training thread that copies and of the thread that hashes, writes and reads back,
against that of the updates: where all cores train, that is the time that a run grows by. Wall time is beside it.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import describe_machine, write_result

EVERY, R, BATCH = 50, 16, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="GSM8K's training rows as JSONL (question, answer)")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="default: %(default)s")
    parser.add_argument("--updates", type=int, default=2, help="timed, after one that is not (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=5, help="default: %(default)s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measured(arguments, Path(folder))
    print(json.dumps(result, indent=1))
    print(write_result("checkpoint_cost", result))


def measured(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Processor and wall seconds of updates and of saves, medians."""
    from welltuned.models.packed import packed_model
    from welltuned.recipe import load_recipe
    from welltuned.training.checkpoint import Position, checkpoints
    from welltuned.training.keeper import Keeper
    from welltuned.training.optimizer import FlatAdamW
    from welltuned.training.prepare import prepare
    from welltuned.training.process import allocator_keeps_memory
    from welltuned.training.run import adamw_settings, make_ready
    from welltuned.training.snapshot import Origin, take

    rows = folder / "rows.jsonl"
    with open(arguments.data, encoding="utf-8") as lines:
        rows.write_text("".join(line for line, _ in zip(lines, range(64), strict=False)), encoding="utf-8")
    options = dict(model=arguments.model, data=str(rows), r=R, effective_batch_size=BATCH, dtype="float32")
    prepared = prepare(load_recipe(None, options))
    ready = make_ready(prepared.plan)
    trained = ready.engine.trained
    optimizer = FlatAdamW(trained.flat_KP, trained.grad_KP, trained.decayed, adamw_settings(prepared.plan))
    trained.claim_gradients()
    keeper = Keeper(folder, 2, lambda: None)
    updates, waits, copies, writes = [], [], [], []
    with allocator_keeps_memory(prepared.plan.facts.machine.device), packed_model(ready.model):
        for step in range(arguments.updates + 1):
            chosen = prepared.mixture.update(BATCH, step)
            before = time.process_time(), time.perf_counter()
            optimizer.zero_grad()
            ready.objective.accumulate_gradient(ready.engine, [prepared.train[i] for i in chosen], chosen)
            optimizer.step([1e-4])
            updates.append((time.process_time() - before[0], time.perf_counter() - before[1]))
    position = Position(token_budget=1)
    for step in range(arguments.saves + 1):
        at = replace(position, step=step)
        before = time.thread_time(), time.perf_counter(), keeper.cost.writing_thread
        keeper.save(lambda copied, at=at: take(trained, optimizer, at, Origin("cost", {}, {}), 0, copied=copied))
        copies.append(time.thread_time() - before[0])
        waits.append(time.perf_counter() - before[1])
        assert not keeper.join()
        writes.append(keeper.cost.writing_thread - before[2])
    update, update_wall = (statistics.median(part) for part in zip(*updates[1:], strict=True))
    copy, wait, write = (statistics.median(part[1:]) for part in (copies, waits, writes))
    size = sum(path.stat().st_size for path in checkpoints(folder)[0][1].iterdir())
    return {
        "what": f"LoRA of {arguments.model} on GSM8K, r {R}, batches of {BATCH}, float32, a checkpoint every {EVERY}",
        "trained_numbers": trained.flat_KP.numel(),
        "checkpoint_bytes": size,
        "processor_seconds": {"update": update, "save_training_thread": copy, "save_writing_thread": write},
        "wall_seconds": {"update": update_wall, "save_training_thread": wait},
        "overhead": (copy + write) / (EVERY * update),
        "overhead_of_training_thread": copy / (EVERY * update),
        **describe_machine(),
    }


if __name__ == "__main__":
    main()
