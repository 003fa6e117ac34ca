"""Tiny models that are really trained, well and badly, and what the monitor says of it."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from welltuned.errors import RunError
from welltuned.training.events import Evaluated, Finding, Updated


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@dataclass(frozen=True)
class Watched:
    """A run's events, and what lies in its directory."""

    path: Path
    events: list
    error: str | None

    @property
    def findings(self):
        return {event.id: event for event in self.events if isinstance(event, Finding)}

    @property
    def updates(self):
        return [event for event in self.events if isinstance(event, Updated)]

    @property
    def evaluations(self):
        return [event for event in self.events if isinstance(event, Evaluated)]

    @property
    def summary(self):
        return json.loads((self.path / "run.json").read_text())


@pytest.fixture(scope="session")
def watched(tiny_model_dir, data_file, tmp_path_factory):
    """A function that trains the tiny model and keeps every event: healthy, unless options say otherwise."""
    from welltuned.recipe import load_recipe
    from welltuned.training.prepare import prepare
    from welltuned.training.run import train

    def watched(**options):
        usual = dict(model=str(tiny_model_dir), data=data_file, effective_batch_size=16, r=8, learning_rate=2e-2)
        out, events = tmp_path_factory.mktemp("watched") / "out", []
        prepared = prepare(load_recipe(None, {**usual, **options}))
        try:
            train(prepared, out, events.append)
        except RunError as error:  # a run that is bad enough fails in the end; what was said before is what counts
            return Watched(out, events, str(error))
        return Watched(out, events, None)

    return watched


@pytest.fixture(scope="session")
def noise_file(write_rows, tmp_path_factory):
    """Rows whose answers follow from nothing: all that can be done with them is to learn them by heart."""
    draw = random.Random(1)
    words = ("hat", "cup", "lamp", "door", "boat", "kite", "drum", "ring", "sock", "vase")

    def row(i):
        answer = " ".join(draw.choices(words, k=6))
        return {"messages": [{"role": "user", "content": f"item {i}"}, {"role": "assistant", "content": answer}]}

    return write_rows(tmp_path_factory.mktemp("noise") / "noise.jsonl", [row(i) for i in range(60)])
