"""`welltuned resume`, as it is typed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

OPTIONS = ("--set", "effective_batch_size=16", "--set", "max_steps=120", "--set", "save_steps=5", "--set", "r=4")


@pytest.fixture(scope="module")
def stopped(tiny_model_dir, data_file, tmp_path_factory):
    """A run that SIGTERM ended: its folder, its exit code, and what it said."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    command = [sys.executable, "-m", "welltuned", "train", "--model", str(tiny_model_dir), "--data", data_file]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, "--out", str(run), *OPTIONS], stderr=subprocess.PIPE, env=environment) as process:
        while process.poll() is None and not list((run / "checkpoints").glob("step-*[0-9]")):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read().decode()
    return run, process.returncode, said


def test_stopped_with_a_sentence(stopped):
    run, code, said = stopped
    assert code == 143
    last = said.strip().splitlines()[-1]
    assert last.startswith("welltuned: ended by SIGTERM after update ") and "is saved" in last
    assert last.endswith(f"go on with: welltuned resume {run}")


def test_an_unfinished_run_cannot_be_talked_to(welltuned, stopped):
    said = welltuned("chat", stopped[0], "--prompt", "hello")
    assert said.code == 2 and f"finish it first: welltuned resume {stopped[0]}" in said.complaints[-1]


def test_a_changed_recipe(welltuned, stopped):
    path = stopped[0] / "recipe.yaml"
    text = path.read_text()
    path.write_text(text.replace("max_steps: 120", "max_steps: 121"))
    said = welltuned("resume", stopped[0])
    assert said.code == 2 and "recipe: max_steps was 120 and is 121" in said.complaints[-1]
    path.write_text(text)


def test_resumed_and_finished(welltuned, stopped):
    said = welltuned("resume", stopped[0], "--json")
    assert said.code == 0 and json.loads(said.out)["updates"] == 120
    assert "goes on after update" in said.err and "Verified: all" in said.err
    again = welltuned("resume", stopped[0], "--json")
    assert again.code == 0 and json.loads(again.out)["updates"] == 120 and "is finished" in again.err


def test_no_run(welltuned, tmp_path):
    said = welltuned("resume", tmp_path)
    assert said.code == 2 and "there is no run here" in said.complaints[-1]
