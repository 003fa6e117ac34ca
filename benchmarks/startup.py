"""How long the commands take that train nothing: from starting Python to the last line.

    python benchmarks/startup.py --model DIR --data FILE.jsonl                                 a minute

Cold: an empty cache, so rows are tokenised and whatever is remembered of a model is found first. Warm: the same again.
(The operating system's own cache of files is warm in both.) `torch` says whether the command brought it in. On a shared
machine the least of a few is nearest to the command's own time; the median says what it was like.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import describe_machine, write_result

ROOT = Path(__file__).parents[1]
REPEATS = 5
WATCHED = """
import sys
from welltuned.cli.main import main
main(sys.argv[1:])
print("torch" in sys.modules, file=sys.stderr)
"""


def run(arguments: Sequence[str], cache: str) -> float:
    """Seconds by the clock; what the command prints is thrown away."""
    started = time.perf_counter()
    subprocess.run(
        arguments,
        env={**os.environ, "WELLTUNED_CACHE": cache},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - started


def timed(arguments: Sequence[str], *, cold: bool) -> dict[str, float]:
    """Seconds of several runs. Cold: each with a cache of its own."""
    with tempfile.TemporaryDirectory() as folder:
        if not cold:
            run(arguments, folder)
        seconds = [run(arguments, f"{folder}/{i}" if cold else folder) for i in range(REPEATS)]
    return {"least": round(min(seconds), 2), "median": round(statistics.median(seconds), 2)}


def brings_torch(arguments: Sequence[str]) -> bool:
    done = subprocess.run([sys.executable, "-c", WATCHED, *arguments], capture_output=True, text=True, check=True)
    return done.stderr.split()[-1] == "True"


def measure(model: str, data: str) -> dict[str, Any]:
    python = [sys.executable, "-m", "welltuned"]
    planned = ["--model", model, "--data", data]
    commands = {
        "plan": ["plan", *planned],
        "why learning_rate of a run": ["why", "learning_rate", *planned],
        "why learning_rate": ["why", "learning_rate"],
        "check (YAML)": ["check", str(ROOT / "recipes" / "sft_lora.yaml")],
        "check (script)": ["check", str(ROOT / "tests" / "interop" / "fixtures" / "trl" / "sft_lora.py")],
    }
    seconds: dict[str, Any] = {
        "python": timed([sys.executable, "-c", "pass"], cold=False),
        "import welltuned": timed([sys.executable, "-c", "import welltuned"], cold=False),
        "--help": timed([*python, "--help"], cold=False),
    }
    for name, arguments in commands.items():
        seconds[name] = {"warm": timed([*python, *arguments], cold=False), "torch": brings_torch(arguments)}
        if model in arguments:
            seconds[name]["cold"] = timed([*python, *arguments], cold=True)
    return {
        "machine": describe_machine(),
        "load_average": os.getloadavg()[0],
        "rows": sum(1 for _ in Path(data).open(encoding="utf-8")),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a local folder with config.json and a tokenizer")
    parser.add_argument("--data", required=True, help="a JSONL file")
    arguments = parser.parse_args()
    result = measure(arguments.model, arguments.data)
    for name, found in result["seconds"].items():
        print(f"{name:30}{found}")
    print(write_result("startup", result))


if __name__ == "__main__":
    main()
