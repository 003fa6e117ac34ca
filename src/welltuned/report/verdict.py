"""The head of the page: whether the run did what it should, in one sentence, and how healthy it was."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from welltuned.recipe import Method
from welltuned.report.arms import sentence
from welltuned.report.read import RunRead
from welltuned.training.events import Severity


class Health(StrEnum):
    HEALTHY = "healthy"
    WARNED = "look at the findings"
    FAILED = "this run is lost"
    UNFINISHED = "not finished"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`sure` is whether the change of the held-out measure stands out from noise; None where nothing was held out."""

    health: Health
    sentence: str
    sure: bool | None


def verdict(run: RunRead) -> Verdict:
    if run.search is not None and run.summary is None:
        return Verdict(_health(run), sentence(run.search), None)
    said, sure = _what_changed(run)
    chosen = ""
    if run.search is not None and run.search.winner is not None:
        chosen = f"Of {len(run.search.arms)} arms {run.search.winner.name} was chosen. "
    return Verdict(_health(run), f"{chosen}{said}{_wins(run)}", sure)


def _wins(run: RunRead) -> str:
    """In how many held-out pairs the chosen answer is the likelier one, for a run on pairs."""
    shares = run.log.evaluations.column("eval_rewards/accuracies")
    shares = shares[np.isfinite(shares)]
    return f" The chosen answer wins in {shares[-1]:.0%} of the held-out pairs; chance is 50%." if len(shares) else ""


def _health(run: RunRead) -> Health:
    severities = {finding.severity for finding in run.log.findings}
    if Severity.ERROR in severities:
        return Health.FAILED
    if run.summary is None:
        return Health.UNFINISHED
    return Health.WARNED if Severity.WARNING in severities or run.log.skipped else Health.HEALTHY


def held_out(run: RunRead) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """Loss and standard error before and after training: run.json's, or the first and the last line so far."""
    if run.summary is not None:
        found = run.summary.get("held_out") or {}
        before, after = found.get("before"), found.get("after")
        return (before, after) if before and after else None
    table = run.log.evaluations
    losses, errors = table.column("eval_loss"), table.column("eval_loss_se")
    if len(table) < 2:
        return None
    first, last = (
        {"loss": float(losses[at]), "standard_error": float(errors[at]) if math.isfinite(errors[at]) else None}
        for at in (0, -1)
    )
    return first, last


def _what_changed(run: RunRead) -> tuple[str, bool | None]:
    updates = f"{len(run.log.updates):,} of {run.plan.updates:,} updates"
    done = (
        f"After {updates}"
        if run.summary is None
        else f"In {run.summary.get('updates', len(run.log.updates)):,} updates"
    )
    found = held_out(run)
    if found is None:
        return f"{done}, nothing was held out, so nothing says how good the result is.", None
    before, after = found
    reward = run.plan.recipe.method is Method.GRPO  # whose loss is minus the mean reward
    sign, what = (-1, "reward") if reward else (1, "loss")
    first, last = sign * before["loss"], sign * after["loss"]
    error = after.get("standard_error")
    near = f"\u00a0±\u00a0{error:.3f}" if error is not None else ""
    better = last > first if reward else last < first
    errors = [value["standard_error"] for value in (before, after) if value.get("standard_error") is not None]
    sure = None
    if len(errors) == 2:  # the rows are the same, so this errs on the side of doubt
        sure = abs(last - first) > 2 * math.hypot(*errors)
    share = "" if reward or not first else f" ({abs(last - first) / abs(first):.0%})"
    moved = f"went from {first:.3f} to {last:.3f}{near}"
    if sure is False:
        return f"{done} the held-out {what} {moved}: within the noise of these held-out rows.", sure
    word = "improved" if better else "got worse"
    return f"{done} the held-out {what} {word}{share}: it {moved}.", sure
