"""A run's numbers sent to TensorBoard, Weights & Biases or trackio, where the recipe's `report_to` asks for it.

Nothing is sent anywhere otherwise. A tracker that fails while a run trains is told once and left alone: no run ends for
want of a chart.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from welltuned.advice.plan import Plan
from welltuned.errors import InputError
from welltuned.models.tokenizer import in_short
from welltuned.recipe import Recipe, Tracker
from welltuned.training.events import Evaluated, Event, Finding, Note, Observer, Updated

PROJECT = "welltuned"
_TRAINED = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "epoch", "memory_bytes", "weight_change")


class Sink(Protocol):
    """Where numbers go."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def say(self, step: int, text: str) -> None: ...
    def close(self) -> None: ...


def require_trackers(recipe: Recipe) -> None:
    """Refuse a tracker whose package is not installed, before anything is loaded."""
    for name in recipe.report_to or ():
        if find_spec(name) is None:
            mend = f"pip install {name}, or leave report_to out"
            raise InputError(f"{name} is not installed", where="report_to", mend=mend)


@contextmanager
def tracked(observer: Observer, plan: Plan, run: Path, run_id: str) -> Iterator[Observer]:
    """The observer, which the recipe's trackers hear with.

    Args:
        run_id: a run that goes on later goes on under it.
    """
    sinks: dict[Tracker, Sink] = {}

    def attempt(name: Tracker, what: Callable[[], Any]) -> Any:
        try:
            with redirect_stdout(sys.stderr):  # ours is for the JSON document, and some of them print
                return what()
        except Exception as error:
            sinks.pop(name, None)
            observer(Note(f"{name} hears no more of this run ({in_short(error)}); training goes on"))

    for name in plan.recipe.report_to or ():
        made = attempt(name, partial(_OPEN[name], plan, run, run_id))
        if made is not None:
            sinks[name] = made

    def both(event: Event) -> None:
        observer(event)
        for name, sink in tuple(sinks.items()):
            attempt(name, partial(_pass_on, event, sink))

    try:
        yield both
    finally:
        for name, sink in tuple(sinks.items()):
            attempt(name, sink.close)


def _pass_on(event: Event, sink: Sink) -> None:
    match event:
        case Updated():
            numbers = {name: getattr(event, name) for name in _TRAINED} | dict(event.measures)
            sink.log(event.step, {f"train/{name}": value for name, value in numbers.items() if value is not None})
        case Evaluated():
            measures = {name.removeprefix("eval_"): value for name, value in event.measures.items()}
            numbers = {"loss": event.eval_loss, "loss_se": event.eval_loss_se, **measures}
            sink.log(event.step, {f"eval/{name}": value for name, value in numbers.items()})
        case Finding():
            sink.say(event.step, event.sentence)


def _settings(plan: Plan) -> dict[str, Any]:
    """What a tracker shows as the run's configuration."""
    chosen = {name: choice.value for name, choice in plan.choices.items()}
    recipe = plan.recipe
    return {
        "model": recipe.model,
        "data": recipe.data,
        "method": str(recipe.method),
        "tune": str(recipe.tune),
        **chosen,
    }


class _TensorBoard:
    def __init__(self, plan: Plan, run: Path, run_id: str):
        self.writer: Any = import_module("torch.utils.tensorboard").SummaryWriter(str(run / "tensorboard"))
        lines = "\n".join(f"- {name}: {value}" for name, value in _settings(plan).items())
        self.writer.add_text("plan", lines)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def say(self, step: int, text: str) -> None:
        self.writer.add_text("findings", text, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """A run of the project `welltuned`, unless WANDB_PROJECT names another; offline where WANDB_MODE says so."""

    def __init__(self, plan: Plan, run: Path, run_id: str):
        project, settings = os.environ.get("WANDB_PROJECT", PROJECT), _settings(plan)
        named = {"project": project, "name": run.resolve().name, "id": run_id, "resume": "allow"}
        self.run: Any = import_module("wandb").init(**named, dir=str(run), config=settings)
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log({"step": step, **numbers})

    def say(self, step: int, text: str) -> None:
        self.run.alert(title="welltuned", text=text)

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    def __init__(self, plan: Plan, run: Path, run_id: str):
        self.module: Any = import_module("trackio")
        settings = {
            name: value if isinstance(value, str | int | float) else str(value)
            for name, value in _settings(plan).items()
        }
        self.module.init(project=PROJECT, name=f"{run.resolve().name}-{run_id}", resume="allow", config=settings)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.module.log(dict(numbers), step=step)

    def say(self, step: int, text: str) -> None:
        self.module.log({"finding": text}, step=step)

    def close(self) -> None:
        self.module.finish()


_OPEN: Mapping[Tracker, Callable[[Plan, Path, str], Sink]] = {
    Tracker.TENSORBOARD: _TensorBoard,
    Tracker.WANDB: _Wandb,
    Tracker.TRACKIO: _Trackio,
}
