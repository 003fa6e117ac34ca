"""welltuned plan."""

import argparse
import json

from welltuned.cli.terminal import console, print_plan, quiet_libraries
from welltuned.recipe import Recipe, load_recipe


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe that a command's options describe."""
    options = {name: vars(arguments)[name] for name in ("model", "data", "eval_data", "memory", "method", "tune")}
    return load_recipe(arguments.recipe, options, arguments.sets)


def run(arguments: argparse.Namespace) -> int:
    recipe = recipe_of(arguments)
    from welltuned.training.prepare import prepare

    quiet_libraries()
    prepared = prepare(recipe)
    if arguments.json:
        print(json.dumps(prepared.plan.to_json(), ensure_ascii=False))
        return 0
    for note in prepared.notes:
        console.print(f"  {note}", style="dim", markup=False)
    print_plan(prepared.plan)
    return 0
