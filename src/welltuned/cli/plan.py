"""welltuned plan."""

import argparse
import json

from welltuned.advice.plan import Plan
from welltuned.cli.plan_view import print_plan, train_command
from welltuned.cli.safe import visible
from welltuned.cli.terminal import RowsShown, console, quiet_libraries
from welltuned.recipe import Recipe, load_recipe


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe that a command's options describe."""
    names = ("model", "data", "eval_data", "map", "subset", "split", "memory", "method", "tune")
    options = {name: vars(arguments)[name] for name in names}
    return load_recipe(arguments.recipe, options, arguments.sets)


def run(arguments: argparse.Namespace) -> int:
    recipe = recipe_of(arguments)
    from welltuned.training.prepare import prepare

    quiet_libraries()
    prepared = prepare(recipe, progress=RowsShown(), weights_needed=arguments.probe)
    if arguments.probe:
        from welltuned.training.speed import probe

        probe(prepared)
        prepared = prepare(recipe)  # once more, with the speed that is known now
    if arguments.emit is not None:
        return _emit(prepared.plan, arguments.emit)
    if arguments.json:
        print(json.dumps(prepared.plan.to_json(), ensure_ascii=False))
        return 0
    for note in (note for note in prepared.notes if note not in prepared.plan.warnings):
        console.print(f"  {visible(note)}", style="dim", markup=False)
    processes = prepared.plan.facts.machine.gpus  # one for each GPU
    print_plan(prepared.plan, whole=arguments.all, command=train_command(arguments, processes))
    return 0


def _emit(plan: Plan, target: str) -> int:
    """The file on stdout; what it cannot say, and what the plan warns of, on stderr."""
    from welltuned.interop.emit import Target, emit

    emitted = emit(plan, Target(target))
    print(emitted.text, end="")
    for warning in plan.warnings:
        console.print(f"! {visible(warning)}", style="yellow", markup=False)
    console.print(f"Not, or otherwise, for {target}:", markup=False)
    for sentence in emitted.missing:
        console.print(f"- {sentence}", markup=False)
    return 0
