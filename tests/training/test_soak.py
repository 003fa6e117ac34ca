"""Random SIGKILLs of whole runs, each resumed: `benchmarks/faults.py`, with few of them unless slow tests are run."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def faults(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("faults")


def soak(faults, folder, kills, a_run):
    model, data = faults.made_up(folder)
    return faults.soak(folder, model, data, kills, a_run, seed=1)


def test_a_few_kills(faults, tmp_path):
    found = soak(faults, tmp_path, 6, 3)
    assert found["tried"] == found["survived"] == 6 and found["lost"] == 0
    assert found["runs_that_differ"] == 0 and sum(found["found_after_a_kill"].values()) == 6


@pytest.mark.slow
def test_two_hundred_kills(faults, tmp_path):
    found = soak(faults, tmp_path, 200, 10)
    assert found["tried"] == found["survived"] == 200 and found["runs_that_differ"] == 0


def test_a_run_that_differs_is_seen(faults, tmp_path):
    """Planted: one bit of one weight."""
    import shutil

    import welltuned

    model, data = faults.made_up(tmp_path)
    welltuned.train(out=tmp_path / "a", **{**faults.options("lora", model, data), "max_steps": 4})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert faults.same(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b" / "adapter" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert not faults.same(tmp_path / "a", tmp_path / "b")
