"""What reading data costs: rows/s and memory of tokenising, masking and auditing, fresh and from the cache.

    python benchmarks/data.py [--rows 1000000] [--gsm8k gsm8k_train.jsonl] [--json-gigabytes 0] [--file FILE]

Short chats of SmolLM2's tokenizer, in a process of its own each time, so that the peak is that of the data: resident
memory at its highest less resident memory after the tokenizer was loaded. `--json-gigabytes 5` measures a file of 5 GB,
of 1.2 kB rows, and reads 200 updates of 16 rows from it; `--file` one that there is.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import describe_machine, write_result

WORDS = (
    *("the", "a", "of", "kettle", "order", "refund", "please", "my", "is", "late", "was", "sent", "where", "to"),
    *("broken", "and", "not", "account", "red", "blue", "box"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--json-gigabytes", type=float, default=0.0)
    parser.add_argument("--file", type=Path, help="this file alone, into data_file.json")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        print(json.dumps(measure(given.measure)))
        return
    if given.file is not None:
        with tempfile.TemporaryDirectory() as folder:
            of_file = fresh_and_cached(given.file, Path(folder))
        print(write_result("data_file", {"machine": describe_machine(), "file": given.file.name, **of_file}))
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if given.gsm8k is not None:
            found["gsm8k"] = fresh_and_cached(given.gsm8k, Path(folder))
        if given.rows:
            path = write_rows(Path(folder) / "short.jsonl", given.rows, words=8)
            found["short rows"] = fresh_and_cached(path, Path(folder))
            path.unlink()
        if given.json_gigabytes:
            path = write_rows(Path(folder) / "long.jsonl", round(given.json_gigabytes * 1e9 / 1_210), words=110)
            found["long rows"] = fresh_and_cached(path, Path(folder))
    print(json.dumps(found, indent=1))
    print(write_result("data", {"machine": describe_machine(), **found}))


def write_rows(path: Path, rows: int, words: int) -> Path:
    """Chats of about 2 x `words` words, all different."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            turns = [" ".join(draw.choices(WORDS, k=words)) for _ in range(2)]
            messages = [{"role": "user", "content": f"{number} {turns[0]}"}, {"role": "assistant", "content": turns[1]}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def fresh_and_cached(path: Path, folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "WELLTUNED_CACHE": str(folder / "cache")}
    command = [sys.executable, __file__, "--measure", str(path)]
    both = {}
    for name in ("fresh", "cached"):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        both[name] = json.loads(done.stdout.splitlines()[-1])
    return {"file_bytes": path.stat().st_size, **both}


def measure(path: Path) -> dict[str, Any]:
    """Read, audit and draw 200 updates, in this process."""
    from welltuned.data.dataset import read_dataset
    from welltuned.facts.data import facts_of
    from welltuned.facts.machine import Device
    from welltuned.models.load import load_tokenizer
    from welltuned.models.resolve import DEMO_ALIAS
    from welltuned.recipe import Recipe
    from welltuned.training.process import memory_used

    tokenizer = load_tokenizer(DEMO_ALIAS)
    tokenizer(["warm up"] * 100)
    before = memory_used(Device.CPU).now
    _reset_peak()
    times = Stopwatch()
    dataset = read_dataset(Recipe(model=DEMO_ALIAS, data=str(path)), tokenizer)
    facts = facts_of(dataset)
    times.lap("read, tokenise, mask")
    dataset = dataset.within(facts.length_max)
    report = dataset.audit()
    times.lap("audit")
    drawn = sum(len(dataset.train[i].ids) for step in range(200) for i in dataset.mixture.update(16, step))
    times.lap("200 updates of 16")
    return {
        "rows": report.rows + report.held_out_rows,
        "tokens": report.tokens,
        "tokens_drawn": drawn,
        "rows_per_second": round((report.rows + report.held_out_rows) / sum(times.laps.values())),
        "seconds": times.laps,
        "peak_bytes_of_data": _peak() - before,
    }


class Stopwatch:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.since = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.since = round(now - self.since, 2), now


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew here


def _peak() -> int:
    return next(1024 * int(line.split()[1]) for line in _status() if line.startswith("VmHWM"))


def _status() -> Iterator[str]:
    yield from Path("/proc/self/status").read_text(encoding="ascii").splitlines()


if __name__ == "__main__":
    main()
