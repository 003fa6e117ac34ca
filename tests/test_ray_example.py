"""examples/on_ray.py on a local cluster: a worker is killed in the middle of a run, which goes on to its end."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray, which is no dependency, is not installed"),
]
SCRIPT = Path(__file__).parent.parent / "examples" / "on_ray.py"
LIMIT = 1_200


def started(run, words):
    command = [sys.executable, str(SCRIPT), "--workers", "2", "--cpus", "2", "--out", str(run), "--", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def ended(process):
    try:
        said, _ = process.communicate(timeout=LIMIT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return said


@pytest.fixture(scope="module")
def words(tiny_model_dir, data_file):
    given = {"effective_batch_size": 16, "max_steps": 40, "r": 4, "save_steps": 2, "learning_rate": 1e-2}
    sets = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    return ["--model", str(tiny_model_dir), "--data", data_file, *sets]


def test_a_worker_that_is_lost(words, tmp_path):
    run = tmp_path / "run"
    process = started(run, words)
    said = ""
    for line in process.stdout:
        said += line
        if found := re.search(r"process 1 of 2: number (\d+)", line):
            break
    deadline = time.monotonic() + LIMIT
    while not list((run / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(int(found[1]), signal.SIGKILL)
    said += ended(process)
    assert process.returncode == 0, said
    assert "a worker was lost (attempt 1 of 4)" in said
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))
    assert any("goes on after update" in line.get("text", "") for line in lines)
    assert (run / "run.json").is_file()


def test_wrong_input_is_not_tried_again(words, tmp_path):
    process = started(tmp_path / "run", [*words, "--set", "target_modules=nothing"])
    said = ended(process)
    assert process.returncode == 2 and "was lost" not in said, said
