"""One run in one, two and four processes: how far losses and weights are apart.

    python benchmarks/ranks.py --model DIR --data FILE [--processes 1,2,4] [--updates 12] [--batch 14]

Processors and gloo, float32, LoRA with dropout; every epoch's last update is smaller than the others. It measures
exactness, not speed.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--batch", type=int, default=14)
    asked = parser.parse_args()
    worlds = [int(world) for world in asked.processes.split(",")]
    keys: dict[str, Any] = {"effective_batch_size": asked.batch, "max_steps": asked.updates, "lora_dropout": 0.1}
    keys |= {"dtype": "float32", "learning_rate": 1e-2, "r": 4, "eval_steps": 3, "save_steps": 4, "seed": 1}
    with tempfile.TemporaryDirectory() as folder:
        runs = {world: train(asked, keys, world, Path(folder) / f"run-{world}") for world in worlds}
        curves = {world: numbers(run, "loss") for world, run in runs.items()}
        found = {world: apart(runs[worlds[0]], run) for world, run in runs.items() if world != worlds[0]}
    result = {"machine": describe_machine(), "settings": keys, "losses": curves, "apart_from_one_process": found}
    print(json.dumps(found, indent=1))
    print(write_result("ranks", result))


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


def apart(one: Path, other: Path) -> dict[str, float]:
    """Largest relative differences of losses, and of each tensor's distance to its length."""
    pairs = {name: zip(numbers(one, name), numbers(other, name), strict=True) for name in ("loss", "eval_loss")}
    found = {name: max(abs(b - a) / abs(a) for a, b in both) for name, both in pairs.items()}
    a, b = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    found["tensors"] = max(float((b[name] - a[name]).norm() / a[name].norm()) for name in a)
    found["numbers"] = max(float(torch.max(torch.abs(b[name] - a[name]))) for name in a)
    return found


if __name__ == "__main__":
    main()
