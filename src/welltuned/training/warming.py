"""Compiling before the first update: for which lengths of packed rows, or for any, where padding costs too much."""

from collections.abc import Sequence
from itertools import islice

from welltuned.advice.compiling import most_lengths, most_padding
from welltuned.data.packing import pack
from welltuned.models.compiled import LAYER, warm_up
from welltuned.models.fuse import Fused
from welltuned.models.packed import shares
from welltuned.models.static import MULTIPLE, Static, padded_share, static_lengths
from welltuned.objectives.answers import laid_length
from welltuned.recipe import Method
from welltuned.training.events import Compiled
from welltuned.training.preference import METHODS
from welltuned.training.prepare import Prepared
from welltuned.training.step import Engine

LOOKED_AT = 64  # updates whose micro-batches are laid out to choose lengths by


def warmed(engine: Engine, static: Static, fused: Fused, prepared: Prepared) -> Compiled:
    """Compile the layers for the lengths that this run's micro-batches ask for: the fewest that pad next to nothing.

    Where even the most lengths pad more than compiling is put to bring, or lengths are not known before (sampled
    answers), one code takes every length as it is. Layers that run uncompiled are not counted among what is fused.
    """
    method, gain = prepared.recipe.method, most_padding()
    known, shared = method is not Method.GRPO, method in METHODS and method is not Method.KTO and shares(engine.model)
    sizes = micro_batches(engine, prepared, shared=shared) if known else [engine.token_budget]
    choices = [static_lengths(sizes, count) for count in range(1, most_lengths() + 1)]
    lengths = next((c for c in choices if padded_share(sizes, c) <= gain / 2), choices[-1])
    padding = padded_share(sizes, lengths)
    any_length = padding > gain or not known
    if any_length:
        largest = -(-max(sizes) // MULTIPLE) * MULTIPLE
        lengths, padding = (largest, largest // 2 + 1), 0.0  # two that show that one code does for both
    longest = _longest(engine, prepared, sizes)
    found = warm_up(engine.model, engine.trained, static, lengths, longest, any_length=any_length)
    if found.problem is not None:
        fused.done.pop(LAYER, None)
    return Compiled(found.seconds, found.lengths, found.graphs, found.error, padding, found.problem)


def micro_batches(engine: Engine, prepared: Prepared, *, shared: bool) -> list[int]:
    """Tokens of this process's micro-batches in the first updates."""
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


def report_of(found: Compiled | None, static: Static | None) -> dict[str, dict[str, object]]:
    """What run.json says of it; nothing where it was not asked for."""
    if found is None or static is None:
        return {}
    laid = static.tokens + static.padding
    told = {
        "seconds": round(found.seconds, 1),
        "lengths": list(found.lengths),
        "graphs": static.graphs,
        "error": found.error,
        "padded_share": round(static.padding / laid, 4) if laid else 0.0,
        "micro_batches_uncompiled": static.plain,
        "problem": static.problem,
    }
    return {"torch_compile": told}
