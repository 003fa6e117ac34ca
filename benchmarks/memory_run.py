"""The memory forecast of a whole run against its process: the demo's run, in each number format that this CPU has.

    python benchmarks/memory_run.py [--updates 60] [--dtype bfloat16]                      four minutes a format

Every run is a process of its own. Its peak is the kernel's highest figure for it; `after` is its resident memory after
some of the updates, which in bfloat16 grows with each new shape of a product (oneDNN keeps what it compiles).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import describe_machine, write_result

from welltuned.facts.machine import read_machine_facts

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "src" / "welltuned" / "demo_data"


def run_of(dtype: str, updates: int, model: str) -> dict[str, Any]:
    """Peak, forecast and growth of one run, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "welltuned", "train", "--model", model, "--data", str(DEMO / "train.jsonl")]
        command += ["--eval-data", str(DEMO / "heldout.jsonl"), "--out", str(out)]
        for value in (f"dtype={dtype}", "effective_batch_size=4", f"max_steps={updates}"):
            command += ["--set", value]
        # From the root: here a file named gguf.py would stand before the package.
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        found = json.loads((out / "run.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    after = {line["step"]: line["memory_bytes"] for line in lines if "memory_bytes" in line}
    peak, forecast = found["peak_memory_bytes"], found["memory_forecast_bytes"]
    return {
        "dtype": dtype,
        "updates": found["updates"],
        "peak_bytes": peak,
        "forecast_bytes": forecast,
        "forecast_over_peak": round(forecast / peak, 4),
        "after": {step: size for step, size in after.items() if step in (1, 2, 5) or step % 10 == 0},
        "tokens_per_second": found["tokens_per_second"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    usual = ["float32", "bfloat16"] if read_machine_facts().native_bf16 else ["float32"]
    runs = [run_of(dtype, arguments.updates, arguments.model) for dtype in arguments.dtype or usual]
    for run in runs:
        print(f"{run['dtype']}: forecast {run['forecast_bytes'] / 1e9:.2f} GB, peak {run['peak_bytes'] / 1e9:.2f} GB")
    write_result("memory_run", {"machine": describe_machine(), "model": arguments.model, "runs": runs})


if __name__ == "__main__":
    main()
