"""Compiling before the first update: for which lengths of packed rows, and whether their padding is worth it."""

from collections.abc import Sequence
from itertools import islice

from welltuned.advice.compiling import most_lengths, most_padding
from welltuned.choice import SetBy
from welltuned.data.packing import pack
from welltuned.models.compiled import warm_up
from welltuned.models.static import MULTIPLE, Static, padded_share, static_lengths
from welltuned.objectives.answers import laid_length
from welltuned.recipe import Method
from welltuned.training.events import Compiled
from welltuned.training.prepare import Prepared
from welltuned.training.step import Engine

LOOKED_AT = 64  # updates whose micro-batches are laid out to choose lengths by


def warmed(engine: Engine, static: Static, prepared: Prepared, *, shared: bool) -> Compiled:
    """Compile the layers for the lengths that this run's micro-batches ask for.

    Where compiling is the plan's own choice it is left off if the padding would cost more than it is said to bring.

    Args:
        shared: whether the prompt of a pair is laid out once.
    """
    most, gain = most_lengths(), most_padding()
    sizes = micro_batches(engine, prepared, shared=shared)
    choices = [static_lengths(sizes, count) for count in range(1, most + 1)]
    lengths = next((c for c in choices if padded_share(sizes, c) <= gain / 2), choices[-1])
    padding = padded_share(sizes, lengths)
    own = prepared.plan.choices["torch_compile"].set_by is not SetBy.USER
    if own and padding > gain and static.problem is None:
        static.give_up(f"its micro-batches would be {padding:.1%} padding, and compiling is said to bring {gain:.0%}")
    found = warm_up(engine.model, engine.trained, static, lengths, _longest(engine, prepared, sizes))
    return Compiled(found.seconds, found.lengths, found.graphs, found.error, padding, found.problem)


def micro_batches(engine: Engine, prepared: Prepared, *, shared: bool) -> list[int]:
    """Tokens of this process's micro-batches in the first updates; of sampled answers, steps up to the budget."""
    if prepared.recipe.method is Method.GRPO:
        most = most_lengths()
        return [max(MULTIPLE, engine.token_budget * step // most) for step in range(1, most + 1)]
    batch, mixture = prepared.plan.value("effective_batch_size"), prepared.mixture
    sizes: list[int] = []
    for step in islice(range(prepared.plan.updates), LOOKED_AT):
        lengths = [laid_length(prepared.train[i], shared) for i in mixture.update(batch, step)]
        mine = [lengths[i] for i in engine.ranks.share(lengths)]
        sizes += [sum(mine[i] for i in bin_) for bin_ in pack(mine, engine.token_budget)]
    return sizes


def _longest(engine: Engine, prepared: Prepared, sizes: Sequence[int]) -> int:
    """No sequence is longer: a multiple of what tiles are."""
    longest: int = prepared.plan.value("max_length")
    if prepared.recipe.method is Method.GRPO:
        longest = engine.token_budget
    return -(-min(longest, max(sizes)) // MULTIPLE) * MULTIPLE


def report_of(found: Compiled, static: Static) -> dict[str, object]:
    """What run.json says of it."""
    laid = static.tokens + static.padding
    return {
        "seconds": round(found.seconds, 1),
        "lengths": list(found.lengths),
        "graphs": static.graphs,
        "error": found.error,
        "padded_share": round(static.padding / laid, 4) if laid else 0.0,
        "micro_batches_uncompiled": static.plain,
        "problem": static.problem,
    }
