"""A model that lies in the hub's cache, and no network: planned, trained and gone on with from there."""

import os
import shutil
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def cache(tiny_model_dir, tmp_path_factory):
    """The hub's cache with one model in it, as huggingface_hub lays it out."""
    home = tmp_path_factory.mktemp("hf")
    place = home / "hub" / "models--someone--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_model_dir, place / "snapshots" / ("0" * 40))
    return home


@pytest.mark.slow
def test_a_cached_model_needs_no_network(cache, data_file, tmp_path):
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "1", "WELLTUNED_CACHE": str(tmp_path / "tokens"),
    }  # fmt: skip

    def typed(*arguments):
        command = [sys.executable, "-m", "welltuned", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    run = tmp_path / "run"
    done = typed("train", "--model", "someone/tiny", "--data", data_file, "--out", run, "--set", "max_steps=2")
    assert done.returncode == 0, done.stderr
    (run / "run.json").unlink()
    again = typed("resume", run)
    assert again.returncode == 0, again.stderr
    missing = typed("plan", "--model", "someone/other", "--data", data_file)
    assert missing.returncode == 2 and missing.stderr.strip().count("\n") < 3 and "someone/other" in missing.stderr
