"""Runs of a tiny model: trained once each, and looked at from many sides."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for faulty.py, which several tests here share


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@dataclass(frozen=True)
class Finished:
    """A run's directory, read back."""

    path: Path
    result: object

    @property
    def metrics(self):
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def updates(self):
        return [line for line in self.metrics if "loss" in line]

    @property
    def evaluations(self):
        return [line for line in self.metrics if "eval_loss" in line]

    @property
    def losses(self):
        return [line["loss"] for line in self.updates]

    @property
    def adapter(self):
        from safetensors.torch import load_file

        return load_file(self.path / "adapter" / "adapter_model.safetensors")

    @property
    def summary(self):
        return json.loads((self.path / "run.json").read_text())


@pytest.fixture(scope="session")
def run(tiny_model_dir, data_file, tmp_path_factory):
    """A function that trains the tiny model: 12 updates of 16 rows of ragged answers, unless options say otherwise."""
    import welltuned

    def run(**options):
        out = tmp_path_factory.mktemp("run") / "out"
        usual = dict(model=str(tiny_model_dir), data=data_file, effective_batch_size=16, max_steps=12)
        return Finished(out, welltuned.train(out=out, **{**usual, "learning_rate": 2e-2, **options}))

    return run
