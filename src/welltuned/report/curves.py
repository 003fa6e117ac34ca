"""The curves of a Run as plain numbers, few enough to draw."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from welltuned.report.arms import drawn
from welltuned.report.read import RunRead
from welltuned.report.table import MOST_POINTS, Floats, Table, plain, smoothed, thinned

MEASURED = ("learning_rate", "grad_norm", "tokens_per_second", "memory_bytes", "weight_change")
_PEAKS = ("loss", "grad_norm")  # curves whose highest and lowest values are kept
_NOISY = ("loss", "reward", "rewards/margins", "rewards/accuracies")  # drawn smoothed besides
Columns = Mapping[str, list[float | None]]
_LEFT = frozenset(("epoch", "tokens", "supervised_tokens"))
_OF_AN_ARM = frozenset(("tokens_per_second", "memory_bytes"))  # a search has them for all of its arms together


def curves(run: RunRead, most: int = MOST_POINTS) -> dict[str, Any]:
    """What the page draws of one Run.

    `updates` and `evaluations` are columns by name, `smooth` some of the first smoothed; `findings` have their step;
    `search` is there for a search's Run.

    Args:
        most: points of a curve.
    """
    updates, evaluations = run.log.updates, run.log.evaluations
    left = _LEFT | _OF_AN_ARM if run.search is not None else _LEFT
    own = [name for name in updates.names if name not in (*_LEFT, *MEASURED, "step", "loss", "eval_loss_se")]
    own = [name for name in own if not name.startswith("eval_")]
    shown = ["step", "loss", *(n for n in MEASURED if n in updates.names and n not in left), *own]
    keep = _kept(updates, _PEAKS, most)
    judged = ["eval_loss", *(n for n in evaluations.names if n.startswith("eval_") and n != "eval_loss")]
    judged_keep = _kept(evaluations, ("eval_loss",), most)
    found = {
        "name": run.name,
        "method": str(run.plan.recipe.method),
        "updates": _columns(updates, shown, keep),
        "smooth": {name: plain(smoothed(_column(updates, name))[keep]) for name in _NOISY if name in shown},
        "evaluations": _columns(evaluations, ["step", *judged], judged_keep),
        "findings": [{"step": f.step, "id": f.id, "severity": str(f.severity)} for f in run.log.findings],
    }
    return found if run.search is None else {**found, "search": drawn(run.search, run.log)}


def _kept(table: Table, peaks: Sequence[str], most: int) -> NDArray[np.intp]:
    """Which rows are drawn: all of few; of many those at the peaks of these columns."""
    there = [name for name in peaks if name in table.names] or list(peaks[:1])
    return np.unique(np.concatenate([thinned(table.column(name), most // len(there)) for name in there]))


def _columns(table: Table, names: Iterable[str], keep: NDArray[np.intp]) -> Columns:
    return {name: plain(_column(table, name)[keep], 12 if name == "step" else 6) for name in names}


def _column(table: Table, name: str) -> Floats:
    """A column; accuracies without those of ties, where the margin is exactly 0: a model is its own reference then."""
    values = table.column(name)
    margins = name.removesuffix("accuracies") + "margins"
    return np.where(table.column(margins) == 0, np.nan, values) if name.endswith("rewards/accuracies") else values
