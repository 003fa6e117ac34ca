"""Where a run's numbers go besides: the real packages, without a network; and what happens when one fails."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

import welltuned
from welltuned.errors import InputError
from welltuned.recipe import Tracker, load_recipe, recipe_to_yaml
from welltuned.training import trackers
from welltuned.training.events import Note


@pytest.fixture
def trained(tiny_model_dir, data_file, tmp_path):
    """A function that trains four updates and gives the lines of its metrics, and the notes."""

    def train(*names):
        seen = []
        options = dict(model=str(tiny_model_dir), data=data_file, max_steps=4, eval_steps=2, learning_rate=1e-2)
        welltuned.train(
            out=tmp_path / "run", observer=seen.append, **({"report_to": list(names)} if names else {}), **options
        )
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        return lines, [event.text for event in seen if isinstance(event, Note)]

    return train


def test_the_recipe_names_them(tmp_path, data_file):
    recipe = load_recipe(None, {"model": "x", "data": data_file}, ["report_to=tensorboard,wandb"])
    assert recipe.report_to == (Tracker.TENSORBOARD, Tracker.WANDB)
    (tmp_path / "r.yaml").write_text(recipe_to_yaml(recipe))
    assert load_recipe(str(tmp_path / "r.yaml")) == recipe
    with pytest.raises(InputError, match="did you mean 'wandb'"):
        load_recipe(None, {"model": "x", "data": data_file}, ["report_to=wandbb"])


def test_tensorboard(trained, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lines, _ = trained("tensorboard")
    found = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    losses = [(e.step, e.value) for e in found.Scalars("train/loss")]
    assert losses == [(line["step"], pytest.approx(line["loss"])) for line in lines if "loss" in line]
    held_out = [(e.step, e.value) for e in found.Scalars("eval/loss")]
    assert held_out == [(line["step"], pytest.approx(line["eval_loss"])) for line in lines if "eval_loss" in line]
    assert "learning_rate" in str(found.Tensors("plan/text_summary")[0].tensor_proto)


def test_wandb_offline(trained, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    _, notes = trained("wandb")
    assert not [note for note in notes if "wandb" in note]
    [kept] = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    written = kept.read_bytes()
    assert b"train/loss" in written and b"eval/loss" in written and b"num_train_epochs" in written


@pytest.mark.slow
def test_trackio_offline(tiny_model_dir, data_file, tmp_path):
    """In a process of its own, since trackio reads where to write when it is imported."""
    pytest.importorskip("trackio")
    home = {"TRACKIO_DIR": str(tmp_path / "store"), "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    sets = ("report_to=trackio", "max_steps=4", "eval_steps=2", "learning_rate=1e-2")
    command = ["train", "--model", str(tiny_model_dir), "--data", data_file, "--out", str(tmp_path / "run")]
    command += [word for text in sets for word in ("--set", text)]
    done = subprocess.run(
        [sys.executable, "-m", "welltuned", *command], env={**os.environ, **home}, capture_output=True, timeout=200
    )
    said = done.stderr.decode()
    assert done.returncode == 0 and "hears no more" not in said, said
    assert not done.stdout, "stdout is for the JSON document"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    [store] = (tmp_path / "store").glob("*.db")
    with closing(sqlite3.connect(store)) as database:
        rows = database.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
        [config] = database.execute("SELECT config FROM configs").fetchone()
    kept = [(step, json.loads(metrics)) for step, metrics in rows]
    losses = [(step, found["train/loss"]) for step, found in kept if "train/loss" in found]
    assert losses == [(line["step"], pytest.approx(line["loss"])) for line in lines if "loss" in line]
    held_out = [(step, found["eval/loss"]) for step, found in kept if "eval/loss" in found]
    assert held_out == [(line["step"], pytest.approx(line["eval_loss"])) for line in lines if "eval_loss" in line]
    assert json.loads(config)["lora_alpha"]


def test_what_is_not_installed_is_refused_before_anything_is_loaded(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="trackio is not installed; pip install trackio"):
        trained("trackio")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("breaks", ["open", "log", "close"])
def test_one_that_fails_is_told_once_and_ends_no_run(trained, monkeypatch, breaks):
    class Broken:
        def __init__(self, *_):
            self.fail("open")

        def fail(self, where):
            if where == breaks:
                raise ConnectionError("planted")

        def log(self, step, numbers):
            self.fail("log")

        def say(self, step, text): ...

        def close(self):
            self.fail("close")

    monkeypatch.setitem(trackers._OPEN, Tracker.TENSORBOARD, Broken)
    monkeypatch.setattr(trackers, "find_spec", lambda name: sys.modules)
    lines, notes = trained("tensorboard")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [note for note in notes if "tensorboard" in note] == [
        "tensorboard hears no more of this run (planted); training goes on"
    ]


def test_nothing_is_sent_where_nothing_is_asked_for(trained, monkeypatch):
    for name in Tracker:
        monkeypatch.setitem(trackers._OPEN, name, None)
    trained()
