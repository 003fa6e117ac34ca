"""Tiny models that are really trained, well and badly, and what the monitor says of it."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from welltuned.errors import RunError
from welltuned.training.events import Evaluated, Finding, Updated

WORDS = ("hat", "cup", "lamp", "door", "boat", "kite", "drum", "ring", "sock", "vase")
MACHINE = {"throughput"}  # findings about the machine that tests run on, which may be busy


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@dataclass(frozen=True)
class Watched:
    """A run's events, why it failed if it did, and its directory."""

    path: Path
    events: list
    error: str | None

    @property
    def findings(self):
        return {event.id: event for event in self.events if isinstance(event, Finding) and event.id not in MACHINE}

    @property
    def every_finding(self):
        return [event for event in self.events if isinstance(event, Finding)]

    @property
    def updates(self):
        return [event for event in self.events if isinstance(event, Updated)]

    @property
    def evaluations(self):
        return [event for event in self.events if isinstance(event, Evaluated)]

    @property
    def summary(self):
        return json.loads((self.path / "run.json").read_text())

    @property
    def metrics(self):
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def watched(tiny_model_dir, data_file, tmp_path_factory):
    """A function that trains the tiny model and keeps every event: 12 healthy updates, unless options say otherwise.

    A fifth of the 80 rows is held out: with the usual tenth the monitor would say that 8 rows cannot tell much.
    """
    from welltuned.recipe import load_recipe
    from welltuned.training.prepare import prepare
    from welltuned.training.run import train

    usual = {"model": str(tiny_model_dir), "data": data_file, "effective_batch_size": 16, "eval_fraction": 0.2}

    def watched(**options):
        given = {**usual, "learning_rate": 2e-2, **({} if options.get("tune") == "full" else {"r": 8}), **options}
        out, events = tmp_path_factory.mktemp("watched") / "out", []
        prepared = prepare(load_recipe(None, given))
        try:
            train(prepared, out, events.append)
        except RunError as error:  # a run that is bad enough fails in the end; what was said before is what counts
            return Watched(out, events, str(error))
        return Watched(out, events, None)

    return watched


@pytest.fixture(scope="session")
def planned(tiny_model_dir, data_file):
    """A function that plans a run of any method on the tiny model's facts, without training it."""
    from welltuned.advice.plan import make_plan
    from welltuned.recipe import load_recipe
    from welltuned.training.prepare import prepare

    usual = {"model": str(tiny_model_dir), "data": data_file, "eval_fraction": 0.2}
    facts = prepare(load_recipe(None, usual)).plan.facts

    def planned(**options):
        return make_plan(load_recipe(None, {**usual, **options}), facts.model, facts.dataset, facts.machine)

    return planned


@pytest.fixture(scope="session")
def schooled_dir(watched):
    """The tiny model after full fine-tuning: it has something to lose, as every model that people start from has."""
    return str(watched(tune="full", learning_rate=1e-2, num_train_epochs=12, seed=1).path / "model")


@pytest.fixture(scope="session")
def noise(write_rows, tmp_path_factory):
    """A function that writes rows whose answers follow from nothing: they can only be learned by heart."""

    def noise(count, seed):
        draw = random.Random(seed)

        def row(i):
            answer = " ".join(draw.choices(WORDS, k=6))
            return {"messages": [{"role": "user", "content": f"item {i}"}, {"role": "assistant", "content": answer}]}

        first = 1000 * seed  # no question of one file stands in another
        rows = [row(first + i) for i in range(count)]
        return write_rows(tmp_path_factory.mktemp("noise") / f"noise{seed}.jsonl", rows)

    return noise


@pytest.fixture(scope="session")
def damaged_file(rows, write_rows, tmp_path_factory):
    """The usual rows, and three whose answers are rubbish."""
    draw = random.Random(2)
    rubbish = ["".join(chr(draw.randrange(0x21, 0x7E)) for _ in range(60)) for _ in range(3)]
    asked = [{"messages": [{"role": "user", "content": "a hat"}, {"role": "assistant", "content": r}]} for r in rubbish]
    return write_rows(tmp_path_factory.mktemp("damaged") / "damaged.jsonl", [*rows, *asked])
