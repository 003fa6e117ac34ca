"""welltuned sweep: settle on the user's own rows what the advice cannot know."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from welltuned.cli.arms_view import ArmsShown, print_found
from welltuned.cli.plan import recipe_of
from welltuned.cli.plan_view import print_plan
from welltuned.cli.report import print_report
from welltuned.cli.terminal import RowsShown, quiet_libraries
from welltuned.cli.train import print_json, print_result
from welltuned.training.rundir import require_free

if TYPE_CHECKING:
    from welltuned.search.result import SweepResult


def run(arguments: argparse.Namespace) -> int:
    recipe, out = recipe_of(arguments), Path(arguments.out)
    require_free(out)
    from welltuned.search.arms import question_of
    from welltuned.search.sweep import sweep  # brings torch: after what can be refused without it
    from welltuned.training.prepare import prepare

    question = question_of(arguments.arms, arguments.over, arguments.trials, arguments.minutes)
    quiet_libraries()
    prepared = prepare(recipe, progress=RowsShown())
    print_plan(prepared.plan)
    shown = ArmsShown(set(prepared.plan.warnings))
    try:
        result = sweep(prepared, question, out, shown, ray=arguments.ray, workers=arguments.workers)
    finally:
        shown.close()
    return end(result, as_json=arguments.json)


def resume(path: Path, *, accept_changes: bool, as_json: bool) -> int:
    """Go on with a search that was ended."""
    from welltuned.search.sweep import resume_sweep

    quiet_libraries()
    shown = ArmsShown()
    try:
        result = resume_sweep(path, shown, accept_changes=accept_changes)
    finally:
        shown.close()
    return end(result, as_json=as_json)


def end(result: "SweepResult", *, as_json: bool) -> int:
    """The table, what it changes, and the winner's Run."""
    print_found(result.found)
    print_result(result.run)
    print_report(result.run.path)
    if as_json:
        print_json(result.run.path)
    return 0
