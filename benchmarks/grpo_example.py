"""examples/grpo as a newcomer runs it: the held-out reward before and after, with standard errors, and the time.

python benchmarks/grpo_example.py [--model MODEL] [--set KEY=VALUE]... [--run DIR]

With --run the Run is kept there; where one lies there that was interrupted it is gone on with, and times of the whole
are those of its updates, by part.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import describe_machine, write_result

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="another model than the recipe's, or its folder")
    parser.add_argument("--set", action="append", default=[], help="a hyperparameter, as in welltuned train")
    parser.add_argument("--run", type=Path, help="where the Run is kept (default: nowhere)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run_example(arguments.run or Path(folder) / "run", arguments.model, arguments.set)
    result = {"what": __doc__.splitlines()[0], "machine": describe_machine(), "set": arguments.set, **found}
    print(json.dumps({key: found[key] for key in ("before", "after", "minutes", "processor_minutes")}, indent=1))
    print(write_result("grpo_example", result))


def run_example(out: Path, model: str | None = None, settings: list[str] | None = None) -> dict[str, Any]:
    """Make the data, train by the recipe, and read what the Run says."""
    source = str(ROOT / "src")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "examples/grpo/make_data.py"], cwd=ROOT, check=True, capture_output=True)
    going_on = (out / "started.json").exists()
    command = [sys.executable, "-m", "welltuned"]
    command += ["resume", str(out)] if going_on else ["train", "examples/grpo/sums.yaml", "--out", str(out)]
    if not going_on:
        command += ["--model", model] if model else []
        command += [word for setting in settings or [] for word in ("--set", setting)]
    started, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    minutes, after = (time.time() - started) / 60, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    updates = [line for line in lines if "loss" in line]
    return {
        "gone_on_with": going_on,
        "minutes": round(minutes, 2),
        "processor_minutes": round(processor / 60, 2),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "held_out_rows": run["held_out"]["rows"],
        "before": evaluated(run["held_out"]["before"]),
        "after": evaluated(run["held_out"]["after"]),
        "updates": run["updates"],
        "held_out_by_update": {str(line["step"]): evaluated(line) for line in lines if "eval_reward" in line},
        "reward_by_update": [round(line["reward"], 4) for line in updates],
        "mean_length_by_update": [round(line["completions/mean_length"], 1) for line in updates],
        "seconds": {
            part: round(sum(line.get(f"seconds/{part}", 0.0) for line in updates), 1)
            for part in ("generation", "reward", "update")
        },
    }


def evaluated(found: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("eval_"): round(value, 4) for name, value in found.items() if name.startswith("eval_")}


if __name__ == "__main__":
    main()
