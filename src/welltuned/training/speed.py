"""How fast this machine trains such a model, as runs and probes measured it: remembered, so that plans can say it.

What is remembered are operations a second, not tokens: they carry over to other data, ranks and lengths of the same
model, where a token costs more or less. The key is what decides how fast they go: processor, model, number format.
"""

import time
from typing import TYPE_CHECKING, Any

from welltuned.advice.plan import Plan
from welltuned.models.memo import recall, remember
from welltuned.training.events import silent

if TYPE_CHECKING:
    from welltuned.training.prepare import Prepared

LEAST_SECONDS = 20.0  # the first updates are slow: memory is new, threads wake; a shorter run says too little
PROBE_SECONDS = 10.0
PROBE_UPDATES = 8  # at most; the first is for warming up


def known_speed(plan: Plan) -> float | None:
    """Operations a second that the last run like it reached on this machine; None where none was measured."""
    found = recall("speed", _key(plan))
    return float(found["flops_per_second"]) if isinstance(found, dict) and "flops_per_second" in found else None


def remember_speed(plan: Plan, tokens_per_second: float, seconds: float) -> None:
    """Keep what a run reached, unless it was too short to say."""
    if seconds >= LEAST_SECONDS:
        _remember(plan, tokens_per_second)


def _remember(plan: Plan, tokens_per_second: float) -> None:
    remember("speed", _key(plan), {"flops_per_second": tokens_per_second * plan.time.flops_per_token})


def _key(plan: Plan) -> dict[str, Any]:
    model, machine = plan.facts.model, plan.facts.machine
    return {
        "machine": [machine.gpu_name or machine.processor, machine.cores, str(machine.device)],
        "model": [model.family, model.parameters, model.active_parameters, model.layers, model.hidden_size],
        "run": [str(plan.recipe.method), str(plan.recipe.tune), plan.value("dtype"), plan.value("packing")],
        "checkpointing": plan.value("gradient_checkpointing"),
        **({"processes": machine.processes} if machine.processes > 1 else {}),
    }


def probe(prepared: "Prepared") -> float:
    """Tokens a second over a few real updates, on weights that are thrown away; remembered for later plans.

    Raises:
        InputError: what training would refuse: no weights, no memory.
    """
    from welltuned.advice.plan import require_memory
    from welltuned.models.packed import packed_model
    from welltuned.training.run import make_ready, with_objective

    plan = prepared.plan
    require_memory(plan)
    ready = with_objective(make_ready(plan), prepared, silent)
    ready.engine.trained.claim_gradients()
    batch, tokens, spent = plan.value("effective_batch_size"), 0, 0.0
    with packed_model(ready.model):
        for step in range(min(PROBE_UPDATES, plan.updates)):
            chosen = prepared.mixture.update(batch, step)
            started = time.perf_counter()
            made = ready.objective.accumulate_gradient(ready.engine, [prepared.train[i] for i in chosen], chosen)
            seconds = time.perf_counter() - started
            if step or plan.updates == 1:  # what is measured first is the warming up
                tokens, spent = tokens + made.tokens, spent + seconds
            if spent > PROBE_SECONDS:
                break
    _remember(plan, tokens / spent)
    return tokens / spent
