"""What a search was asked: sweep.json as it is at the start, with which the rest can be made again."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from welltuned.advice.codec import from_plain, to_plain
from welltuned.advice.plan import Plan
from welltuned.errors import InputError
from welltuned.recipe import Recipe, load_recipe, recipe_to_dict
from welltuned.search.arms import Question
from welltuned.training.rundir import SWEEP, RunDir

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Asked:
    """What is searched, and the plan that its arms depart from.

    Attributes:
        grid: every arm is trained to its end.
        ray: where a search over several machines runs; None for this process. workers: how many, None by what is there.
    """

    question: Question
    recipe: Recipe
    plan: Plan
    grid: bool = False
    ray: str | None = None
    workers: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "question": to_plain(self.question),
            "recipe": to_plain(recipe_to_dict(self.recipe)),
            "plan": to_plain(self.plan),
            "grid": self.grid,
            "ray": self.ray,
            "workers": self.workers,
        }


def is_sweep(path: Path) -> bool:
    """Whether a directory holds a search, finished or not."""
    return (path / SWEEP).is_file()


def write_asked(directory: RunDir, asked: Asked) -> None:
    directory.write_json(SWEEP, {"format": FORMAT, "asked": asked.to_json()})


def read_asked(path: Path) -> Asked:
    """What a search was asked.

    Raises:
        InputError: sweep.json is damaged.
    """
    try:
        plain = json.loads((path / SWEEP).read_text(encoding="utf-8"))["asked"]
        question = from_plain(Question, {**plain["question"], "over": []})
        over = tuple((name, tuple(values)) for name, values in plain["question"]["over"])
        plan = from_plain(Plan, plain["plan"])
        recipe = load_recipe(None, plain["recipe"])
        return Asked(replace(question, over=over), recipe, plan, plain["grid"], plain.get("ray"), plain.get("workers"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{SWEEP} is damaged ({error})", where=str(path)) from error
