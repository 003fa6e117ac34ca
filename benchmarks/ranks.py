"""One run in one, two and four processes: how far losses and weights are apart.

    python benchmarks/ranks.py --model DIR --data FILE [--kind adapters] [--processes 1,2,4] [--updates 12] [--batch 14]

Processors and gloo, float32, LoRA with dropout; every epoch's last update is smaller than the others. With --kind
pieces the base lies in pieces (fsdp: full_shard), with --kind full all that is trained does; then micro-batches are
small, so that processes have unequally many. It measures exactness, and bytes of parts, not speed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import describe_machine, write_result
from safetensors.torch import load_file

PIECES = {"fsdp": "full_shard", "token_budget": 64}
KINDS: dict[str, dict[str, Any]] = {
    "adapters": {},
    "pieces": PIECES,
    "full": PIECES | {"tune": "full", "learning_rate": 1e-3, "lora_dropout": None, "r": None},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--batch", type=int, default=14)
    parser.add_argument("--suffix", default="", help="of the result's name")
    parser.add_argument("--kind", choices=KINDS, default="adapters")
    asked = parser.parse_args()
    worlds = [int(world) for world in asked.processes.split(",")]
    keys: dict[str, Any] = {"effective_batch_size": asked.batch, "max_steps": asked.updates, "lora_dropout": 0.1}
    keys |= {"dtype": "float32", "learning_rate": 1e-2, "r": 4, "eval_steps": 3, "save_steps": 4, "seed": 1}
    keys = {key: value for key, value in (keys | KINDS[asked.kind]).items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        runs = {world: train(asked, keys, world, Path(folder) / f"run-{world}") for world in worlds}
        curves = {world: numbers(run, "loss") for world, run in runs.items()}
        found = {world: apart(runs[worlds[0]], run) for world, run in runs.items() if world != worlds[0]}
        parts = {world: parts_of(run) for world, run in runs.items()}
        memory = {world: memory_of(run) for world, run in runs.items()}
    result = {"machine": describe_machine(), "settings": keys, "losses": curves, "apart_from_one_process": found}
    result["memory_of_a_process"] = memory
    if asked.kind == "full":
        result["bytes_of_each_part_of_a_checkpoint"] = parts
    print(json.dumps(found, indent=1))
    name = "ranks" if asked.kind == "adapters" else f"ranks_{asked.kind}"
    print(write_result(name + asked.suffix, result))


def train(asked: argparse.Namespace, keys: dict[str, Any], world: int, run: Path) -> Path:
    together = ["-m", "torch.distributed.run", "--nproc-per-node", str(world)] if world > 1 else []
    words = ["-m", "welltuned", "train", "--model", asked.model, "--data", asked.data, "--out", str(run)]
    for key, value in keys.items():
        words += ["--set", f"{key}={value}"]
    subprocess.run([sys.executable, *together, *words], check=True)
    return run


def numbers(run: Path, name: str) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def parts_of(run: Path) -> list[int]:
    """Bytes of weights and moments that each process wrote of the last checkpoint; of a whole one in all."""
    last = max((run / "checkpoints").glob("step-*"))
    sizes: dict[str, int] = {}
    for file in last.glob("*.safetensors"):
        owner = file.name.split("-")[1] if file.name.startswith("shard-") else ""
        sizes[owner] = sizes.get(owner, 0) + file.stat().st_size
    return [sizes[owner] for owner in sorted(sizes)]


def memory_of(run: Path) -> dict[str, int]:
    """Of the first process after updates; the highest peak of any (it reads base and result at the end); forecast."""
    said = json.loads((run / "run.json").read_text())
    after = max(int(number) for number in numbers(run, "memory_bytes"))
    return {
        "after_updates_bytes": after,
        "peak_bytes": said["peak_memory_bytes"],
        "forecast_bytes": said["memory_forecast_bytes"],
    }


def apart(one: Path, other: Path) -> dict[str, float]:
    """Largest relative differences of losses, and of each tensor's distance to its length."""
    pairs = {name: zip(numbers(one, name), numbers(other, name), strict=True) for name in ("loss", "eval_loss")}
    found = {name: max(abs(b - a) / abs(a) for a, b in both) for name, both in pairs.items()}
    a, b = (load_file(next(run.glob("*/*model.safetensors"))) for run in (one, other))
    assert a.keys() == b.keys()
    found["tensors"] = max(float((b[name] - a[name]).norm() / a[name].norm()) for name in a)
    found["numbers"] = max(float(torch.max(torch.abs(b[name] - a[name]))) for name in a)
    return found


if __name__ == "__main__":
    main()
