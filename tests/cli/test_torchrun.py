"""`torchrun -m welltuned`: the commands as users start them."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
LIMIT = 300


def torchrun(words, **more):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "welltuned", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes, **more)


def ended(process):
    try:
        out, said = process.communicate(timeout=LIMIT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, said


@pytest.fixture(scope="module")
def words(tiny_model_dir, data_file):
    given = {"effective_batch_size": 16, "max_steps": 200, "r": 4, "save_steps": 20, "learning_rate": 1e-2}
    sets = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    return ["train", "--model", str(tiny_model_dir), "--data", data_file, *sets]


def test_train_interrupted_and_resumed(words, tmp_path):
    run = tmp_path / "run"
    process = torchrun([*words, "--out", str(run)])
    while True:
        line = process.stderr.readline()
        assert line, "it ended"
        if re.match(r"\d+/200", line):
            break
    process.send_signal(signal.SIGTERM)
    code, _, said = ended(process)
    assert code != 0 and len(re.findall(r"^welltuned: ended by SIGTERM after update \d+; update", said, re.M)) == 1
    code, out, said = ended(torchrun(["resume", str(run), "--json"]))
    assert code == 0, said
    summary = json.loads(out)  # one document, of one process
    assert summary["updates"] == 200 and summary["processes"] == 2
    assert said.count("Verified: all") == 1
    steps = [
        line.get("step") for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line
    ]
    assert steps == list(range(1, 201))
    assert ended(torchrun(["resume", str(run)]))[0] == 0  # it is finished


def test_wrong_input_is_said_once(words, tmp_path):
    code, out, said = ended(torchrun([*words, "--out", str(tmp_path / "run"), "--set", "target_modules=nothing"]))
    assert code == 1 and not out  # torchrun's own code; the processes' is 2
    assert len(re.findall(r"^welltuned: ", said, re.M)) == 1 and re.search(r"exitcode\s+: 2", said)


def test_other_commands_are_refused(words, tmp_path):
    code, _, said = ended(torchrun(["plan", *words[1:]]))
    assert code == 1 and "welltuned plan runs in one process, and 2 were started; start it without torchrun" in said
