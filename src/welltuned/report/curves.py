"""The curves of a Run as plain numbers, few enough to draw."""

from collections.abc import Sequence
from typing import Any

from welltuned.report.read import RunRead
from welltuned.report.table import Table, plain, smoothed, thinned

MEASURED = ("learning_rate", "grad_norm", "tokens_per_second", "memory_bytes", "weight_change")
_KNOWN = frozenset(("step", "loss", "epoch", "tokens", "supervised_tokens", "eval_loss", "eval_loss_se", *MEASURED))


def curves(run: RunRead) -> dict[str, Any]:
    """What the page draws of one Run: columns of `updates` and `evaluations`, and `findings` with their step."""
    updates, evaluations = run.log.updates, run.log.evaluations
    own = [name for name in updates.names if name not in _KNOWN]  # the objective's, such as rewards/margins
    judged = [name for name in evaluations.names if name not in _KNOWN and name.startswith("eval_")]
    drawn = _columns(updates, "loss", ("step", "loss", *(n for n in MEASURED if n in updates.names), *own))
    loss = updates.column("loss")
    drawn["smooth"] = plain(smoothed(loss)[thinned(loss)])
    findings = [{"step": f.step, "id": f.id, "severity": str(f.severity)} for f in run.log.findings]
    return {
        "name": run.name,
        "updates": drawn,
        "evaluations": _columns(evaluations, "eval_loss", ("step", "eval_loss", "eval_loss_se", *judged)),
        "findings": findings,
    }


def _columns(table: Table, by: str, names: Sequence[str]) -> dict[str, list[float | None]]:
    """Columns of a table, thinned where `by` has no peak."""
    keep = thinned(table.column(by))
    return {name: plain(table.column(name)[keep]) for name in names}
