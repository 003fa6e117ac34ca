"""What to do next, as commands: what this run's state and findings ask for."""

import shlex
from dataclasses import dataclass

from welltuned.recipe import Method, Tune
from welltuned.report.read import RunRead
from welltuned.report.verdict import Health, verdict


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
    if run.plan.recipe.method is not Method.REWARD:
        steps.append(Step("Talk to it, beside the model as it was:", f"welltuned chat {folder} --base"))
        steps.append(Step("Measure its replies on held-out rows, beside the base:", f"welltuned eval {folder}"))
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
            recipe = shlex.quote(str(run.path / "recipe.yaml"))
            steps.append(Step(f"{finding.id}: {remedy.text}:", f"welltuned train {recipe} {changes} --out again"))
    return steps


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
