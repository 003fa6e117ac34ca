"""A learning rate that never leaves its warm-up."""

from welltuned.advice.plan import Plan
from welltuned.advice.schedule import choose_warmup
from welltuned.advice.settle import shown
from welltuned.training.events import Finding, Severity
from welltuned.training.monitor.history import History
from welltuned.training.monitor.remedies import change
from welltuned.training.monitor.thresholds import limit


def never_warm(history: History, plan: Plan) -> Finding | None:
    """Most of the run is warm-up: said at the first update, while it costs nothing to start again."""
    warmup, total, shape = plan.value("warmup_steps"), history.total, plan.value("lr_scheduler_type")
    if not total or shape == "constant" or warmup < max(1, limit("warmup_share") * total):
        return None
    peak, advised = plan.value("learning_rate"), choose_warmup(total, shape).value
    if warmup <= advised:  # of a few updates one is much, and no fewer can be advised
        return None
    highest = peak * min(1, total / (warmup + 1))
    reached = f"the rate reaches {shown(highest)} of {shown(peak)}"
    what = f"the warm-up takes {warmup} updates and the run has {total}: {reached}"
    cause = "A warm-up copied from a longer run is longer than this one has room for"
    severity = Severity.ERROR if warmup >= total else Severity.WARNING
    remedy = change(f"set warmup_steps to {advised}", warmup_steps=advised)
    return Finding("warmup", severity, history.step, what, cause, (remedy,))
