"""Loss spikes: single updates whose loss and gradient stand far out, and which training recovers from."""

from welltuned.advice.plan import Plan
from welltuned.recipe import Method
from welltuned.training.events import Finding, Remedy, Severity
from welltuned.training.monitor.history import History, Update
from welltuned.training.monitor.remedies import lower_rate, present
from welltuned.training.monitor.thresholds import limit

NAMED = 4  # rows that a sentence names


def spike(history: History, plan: Plan) -> Finding | None:
    """The first one, with its rows."""
    found = _spikes(history, plan)
    if not found:
        return None
    remedy = Remedy("look at those rows; one spike alone does no harm")
    return Finding("spike", Severity.HINT, found[0].step, _what(found[0]), _CAUSE, (remedy,))


def spikes(history: History, plan: Plan) -> Finding | None:
    """Several within the window: no accident."""
    found = _spikes(history, plan)
    if len(found) < limit("spike_many"):
        return None
    steps = ", ".join(str(u.step) for u in found)
    what = f"{len(found)} of the last {len(history.updates)} updates were spikes ({steps}); in the last of them "
    remedies = present(Remedy("look at their rows, and drop what is broken"), lower_rate(plan, 2))
    return Finding("spikes", Severity.WARNING, history.step, what + _what(found[-1]), _CAUSE, remedies)


_CAUSE = "Rows unlike the others (damaged text, another language, a wrong answer) do this, or a rate at the edge"


def _spikes(history: History, plan: Plan) -> list[Update]:
    if plan.recipe.method is Method.GRPO:
        return []
    return [update for update in history.updates if update.spike]


def _what(update: Update) -> str:
    rows = ", ".join(update.origins[:NAMED])
    more = f" and {len(update.origins) - NAMED} more" if len(update.origins) > NAMED else ""
    rows = f" on {rows}{more}" if rows else ""
    before = update.loss - update.residual
    return f"the loss of update {update.step} was {update.loss:.3f}, where {before:.3f} was usual{rows}"
