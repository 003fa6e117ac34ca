"""The curves of a Run as plain numbers, few enough to draw."""

from collections.abc import Sequence
from typing import Any

from welltuned.report.read import Line, RunRead
from welltuned.report.series import column, rounded, smoothed, thinned

MEASURED = ("learning_rate", "grad_norm", "tokens_per_second", "memory_bytes", "weight_change")
_KNOWN = frozenset(
    ("step", "loss", "epoch", "tokens", "supervised_tokens", "event", "eval_loss", "eval_loss_se", *MEASURED)
)


def curves(run: RunRead) -> dict[str, Any]:
    """What the page draws of one Run: columns of `updates` and `evaluations`, and `findings` with their step."""
    loss = column(run.updates, "loss")
    keep = thinned(loss)
    smooth = smoothed(loss)
    updates = {"step": _picked(column(run.updates, "step"), keep), "loss": _picked(loss, keep)}
    updates["smooth"] = _picked(smooth, keep)
    for name in (*MEASURED, *measures(run.updates)):
        values = _picked(column(run.updates, name), keep)
        if any(value is not None for value in values):
            updates[name] = values
    names = ("step", "eval_loss", "eval_loss_se", *(m for m in measures(run.evaluations) if m.startswith("eval_")))
    kept = thinned(column(run.evaluations, "eval_loss"))
    evaluations = {name: _picked(column(run.evaluations, name), kept) for name in names}
    findings = [{"step": f.step, "id": f.id, "severity": str(f.severity)} for f in run.findings]
    return {"name": run.name, "updates": updates, "evaluations": evaluations, "findings": findings}


def _picked(values: Sequence[float | None], keep: Sequence[int]) -> list[float | None]:
    return rounded([values[i] for i in keep])


def measures(lines: Sequence[Line]) -> list[str]:
    """The objective's own numbers among the keys, such as rewards/margins, in the order in which they first come."""
    names: dict[str, None] = {}
    for line in lines:
        for name, value in line.items():
            if name not in _KNOWN and isinstance(value, int | float):
                names.setdefault(name)
    return list(names)
