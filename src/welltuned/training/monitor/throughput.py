"""Throughput collapse: something else took the machine, or memory began to swap."""

from welltuned.advice.plan import Plan
from welltuned.training.events import Finding, Remedy, Severity
from welltuned.training.monitor.history import History
from welltuned.training.monitor.thresholds import limit


def slowed(history: History, plan: Plan) -> Finding | None:
    """Updates in a row at a fraction of the speed that the run has had."""
    count = int(limit("throughput_updates"))
    latest = history.updates[-count:]
    slow = limit("throughput_share") * history.fastest
    if len(latest) < count or any(
        u.tokens_per_second > slow or u.seconds < limit("throughput_seconds") for u in latest
    ):
        return None
    now = max(u.tokens_per_second for u in latest)
    what = f"the last {count} updates ran at {now:,.0f} tokens/s or less, and it was {history.fastest:,.0f} before"
    cause = "Another process took the processor, the machine throttles, or memory is short and swaps"
    remedy = Remedy("see what else runs and how much memory is free; the result does not depend on it")
    return Finding("throughput", Severity.WARNING, history.step, what, cause, (remedy,))
