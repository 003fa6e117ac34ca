"""What to do next, as commands: what this run's state and findings ask for."""

import shlex
from dataclasses import dataclass

from welltuned.recipe import Method, Tune
from welltuned.report.read import RunRead
from welltuned.report.verdict import Health, held_out, verdict
from welltuned.search.applied import METHODS
from welltuned.training.rundir import RECIPE


@dataclass(frozen=True, slots=True)
class Step:
    why: str
    command: str


def next_steps(run: RunRead) -> list[Step]:
    """Commands, the most urgent first."""
    folder = shlex.quote(str(run.path))
    if run.summary is None:
        return [Step("Go on with it from its newest checkpoint:", f"welltuned resume {folder}")]
    steps = list(_mending(run))
    if verdict(run).health is Health.FAILED:
        return steps
    method = run.plan.recipe.method
    if method is not Method.REWARD:
        steps.append(Step("Talk to it, beside the model as it was:", f"welltuned chat {folder} --base"))
    if method is Method.SFT and held_out(run) is not None:
        if run.shown["replies"]:
            why, more = "Measure its loss and its replies on held-out rows, beside the base:", " --metrics exact"
        else:
            why, more = "Measure it on held-out rows, beside the base:", ""
        steps.append(Step(why, f"welltuned eval {folder}{more}"))
    if run.search is None and method in METHODS and run.plan.recipe.tune is not Tune.FULL:
        recipe = shlex.quote(str(run.path / RECIPE))
        why = "Settle on your own rows what the advice cannot know, the rate first:"
        steps.append(Step(why, f"welltuned sweep {recipe} --out swept"))
    if run.plan.recipe.tune is not Tune.FULL:
        steps += [
            Step("See where it learned, and that it is whole:", f"welltuned adapter verify {folder}"),
            Step("Find how strong the adapter should be:", f"welltuned adapter scale {folder} --sweep --out scaled"),
            Step("One model without adapters:", f"welltuned adapter merge {folder} --out merged"),
            Step("For llama.cpp and Ollama:", f"welltuned adapter export {folder} --to gguf --out exported"),
        ]
    return steps


def _mending(run: RunRead) -> list[Step]:
    """For each finding the first remedy that recipe keys can do."""
    steps = []
    for finding in run.log.findings:
        remedy = next((r for r in finding.remedies if r.changes), None)
        if remedy is not None:
            changes = " ".join(f"--set {shlex.quote(f'{key}={_text(value)}')}" for key, value in remedy.changes.items())
            recipe = shlex.quote(str(run.path / RECIPE))
            steps.append(Step(f"{finding.id}: {remedy.text}:", f"welltuned train {recipe} {changes} --out again"))
    return steps


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
