"""A plan's preference objective, made ready: what it is compared with, and how the prompts of pairs are shared."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from torch import nn

from welltuned.advice.plan import Plan
from welltuned.data.mix import Mixture
from welltuned.data.render import Example
from welltuned.models.packed import shares
from welltuned.models.reward import SCORE
from welltuned.objectives.preference import DpoSettings, KtoSettings, LossType
from welltuned.recipe import Method
from welltuned.training.preference_step import Dpo, Judge, Kto, Orpo, Pairwise, Reward, mismatches
from welltuned.training.reference import Reference, reference_for
from welltuned.training.step import Engine, Objective

METHODS = (Method.DPO, Method.ORPO, Method.KTO, Method.REWARD)


def preference_objective(
    engine: Engine,
    plan: Plan,
    train: Sequence[Example],
    held_out: Sequence[Example],
    mixture: Mixture,
    note: Callable[[str], None],
    progress: Callable[[str], None],
    also: Iterable[Example] = (),
) -> Objective:
    """The objective of a preference method. Call it before the first update, and before a checkpoint is restored.

    Args:
        note: told of what the run should be remembered with; `progress` of what takes time now.
        also: rows that will be asked for beside the plan's own.
    """
    recipe = plan.recipe
    shared = shares(engine.model)
    if recipe.method is not Method.KTO and not shared:
        note("this model cannot share the prompt of a pair between its answers, so it is computed for each of them")

    def reference(rows: Iterator[Example], shared: bool) -> Reference:
        fresh = recipe.adapter is None
        return reference_for(engine, rows, shared=shared, fresh=fresh, note=note, progress=progress)

    match recipe.method:
        case Method.KTO:
            longest = int(plan.value("max_length"))
            updates = (*updates_of(plan, mixture, train), list(held_out))
            rows = (row for some in updates for row in (*some, *mismatches(some, longest)))
            return Kto(kto_settings(plan), reference(rows, False), longest)
        case Method.DPO:
            settings = dpo_settings(plan)
            used = chain(rows_used(plan, mixture, train, held_out), also)
            needed = reference(used, shared) if settings.has_reference else None
            judge: Judge = Dpo(settings, needed)
        case Method.ORPO:
            judge = Orpo(float(plan.value("beta")))
        case _:
            score = engine.model.get_submodule(SCORE)
            assert isinstance(score, nn.Linear)
            judge = Reward(score, float(plan.value("center_rewards_coefficient")))
    return Pairwise(judge, shared)


def dpo_settings(plan: Plan) -> DpoSettings:
    given = {
        name: float(plan.value(name)) for name in ("beta", "label_smoothing", "simpo_gamma") if name in plan.choices
    }
    return DpoSettings(loss_type=LossType(plan.value("loss_type")), **given)


def kto_settings(plan: Plan) -> KtoSettings:
    return KtoSettings(**{name: float(plan.value(name)) for name in ("beta", "desirable_weight", "undesirable_weight")})


def updates_of(plan: Plan, mixture: Mixture, train: Sequence[Example]) -> Iterator[list[Example]]:
    """The rows of each of the run's updates."""
    batch = plan.value("effective_batch_size")
    for step in range(plan.updates):
        yield [train[i] for i in mixture.update(batch, step)]


def rows_used(plan: Plan, mixture: Mixture, train: Sequence[Example], held_out: Sequence[Example]) -> Iterator[Example]:
    """Every row that the run reads, once."""
    batch = plan.value("effective_batch_size")
    numbers = {i for step in range(plan.updates) for i in mixture.update(batch, step)}
    yield from (train[i] for i in sorted(numbers))
    yield from held_out
