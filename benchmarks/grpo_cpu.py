"""An update of GRPO of SmolLM2-135M with LoRA on the CPU: seconds of sampling, of rewards and of the update itself.

    python benchmarks/grpo_cpu.py [--trl-python ENV/bin/python] [--rounds 3] [--updates 4] [--more]

welltuned and TRL's GRPOTrainer run in turn (A B A B ...), each in a process of its own, at equal settings: the same
prompts in the same order, groups of 8, completions of exactly --tokens tokens (so that chance does not decide who has
more to do), one reward that tells completions apart. The first update of a process warms it up and is not counted;
medians over the others are quoted. The completions themselves differ: each side draws its own. Let nothing else run;
`cpu` is the processor's seconds of both cores together, and says more where something else does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import describe_machine, runs_so_far, write_result
from gemm_floor import gemm_floor
from sft_cpu import saved_model

PEERS = Path(__file__).parent / "peers"
PARTS = ("generation", "reward", "update", "whole", "cpu")
R, GENERATIONS = 16, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each system (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=4, help="updates of a run, the first uncounted (%(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of an update (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a completion (default: %(default)s)")
    parser.add_argument("--trl-python", help="python of an environment with TRL and PEFT")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--more", action="store_true", help="add the rounds to those of the last result")
    arguments = parser.parse_args()
    name_of_result = "grpo_cpu" if arguments.dtype == "float32" else f"grpo_cpu_{arguments.dtype}"
    pythons = {"welltuned": sys.executable, "trl": arguments.trl_python}
    systems = {name: python for name, python in pythons.items() if python}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    if arguments.more:
        runs = runs_so_far(name_of_result, settings(arguments))
    with tempfile.TemporaryDirectory() as folder:
        model, data = saved_model(Path(folder) / "model"), Path(folder) / "prompts.jsonl"
        data.write_text(
            "".join(json.dumps(row) + "\n" for row in prompts(arguments.updates * arguments.prompts)), encoding="utf-8"
        )
        for turn in range(arguments.rounds):
            for name, python in systems.items():
                runs[name].append(one_run(name, python, model, data, arguments))
                print(f"round {turn + 1}: {name} {json.dumps(runs[name][-1])}", file=sys.stderr)
    result = summary(runs, arguments)
    print(json.dumps(result["median"], indent=1))
    print(write_result(name_of_result, result))


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "dtype": arguments.dtype,
        "prompts_an_update": arguments.prompts,
        "completions_a_prompt": GENERATIONS,
        "tokens_a_completion": arguments.tokens,
        "r": R,
    }


def prompts(count: int) -> list[dict[str, str]]:
    """Sums of two numbers, in words."""
    return [{"prompt": f"What is {7 + 3 * i} + {5 + 2 * i}? Explain how you add them."} for i in range(count)]


def one_run(name: str, python: str, model: Path, data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One process; its last line of output is its result. The floor is the better of before and after."""
    before = gemm_floor()
    numbers = [str(n) for n in (arguments.updates, arguments.prompts, GENERATIONS, arguments.tokens, R)]
    command = [python, str(PEERS / f"{name}_grpo.py"), str(model), str(data), *numbers, arguments.dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "floor_gflops": max(before, gemm_floor())}


def summary(runs: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of the counted updates of all runs, and of the ratios of the runs that followed each other."""

    def of(run: dict[str, Any], part: str) -> float:
        return statistics.median(update[part] for update in run["updates"][1:])

    medians: dict[str, Any] = {
        name: {
            **{f"{part}_s": round(statistics.median(of(run, part) for run in found), 3) for part in PARTS},
            "peak_gb": round(statistics.median(run["peak_rss_gb"] for run in found), 2),
        }
        for name, found in runs.items()
    }
    for name in runs.keys() - {"welltuned"}:
        pairs = list(zip(runs["welltuned"], runs[name], strict=True))
        medians[name]["welltuned_speed_ratio"] = {
            part: round(statistics.median(of(b, part) / max(of(a, part), 1e-9) for a, b in pairs), 2) for part in PARTS
        }
    return {
        "what": __doc__.splitlines()[0],
        "machine": describe_machine(),
        **settings(arguments),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "median": medians,
        "runs": runs,
    }


if __name__ == "__main__":
    main()
