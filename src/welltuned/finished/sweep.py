"""How strong should the adapter be? Each strength is a number in the bank, so that one loaded model answers for all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from welltuned.errors import InputError
from welltuned.finished.find import Finished, Loaded, load
from welltuned.finished.heldout import (
    Difference,
    RowSet,
    Watch,
    engine_of,
    held_out_rows,
    judge,
    judge_base,
    paired,
    quiet,
    rows_of,
)
from welltuned.models.experts import LoraExperts
from welltuned.models.lora import AdapterBank
from welltuned.training.step import Engine, Evaluation

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


@dataclass(frozen=True, slots=True)
class Strength:
    """One value of lambda: 0 is the base, 1 the adapter as it was trained.

    Attributes:
        against_best: held-out loss less that of the best strength, paired.
        keep: loss on what must not be forgotten; None where nothing was named.
    """

    by: float
    held_out: Evaluation
    against_best: Difference
    keep: Evaluation | None
    against_base: Difference | None


@dataclass(frozen=True, slots=True)
class Sweep:
    strengths: tuple[Strength, ...]
    chosen: float
    reason: str
    rows: str
    keep: str | None


def sweep(
    finished: Finished,
    *,
    strengths: Sequence[float] = STRENGTHS,
    data: str | None = None,
    keep: str | None = None,
    count: int | None = None,
    watch: Watch = quiet,
) -> Sweep:
    """Judge the adapter at several strengths, and choose.

    Args:
        data: rows to judge by; None for those that the Run held out.
        keep: rows that stand for what must not be forgotten.
        count: the first so many rows only, of each; None for all.
    """
    if finished.adapter is None:
        what = "a whole model has no strength to change"
        raise InputError(what, where=str(finished.path), mend="give a run with an adapter")
    rows = held_out_rows(finished) if data is None else None
    loaded = load(finished)
    _refuse_biases(loaded)
    rows = (rows if rows is not None else rows_of(str(data), loaded.tokenizer, finished)).first(count)
    kept = None if keep is None else rows_of(keep, loaded.tokenizer, finished).first(count)
    engine = engine_of(loaded)
    found = []
    for by in strengths:
        watch(f"strength {by:g}")
        found.append((by, _at(engine, by, rows), None if kept is None else _at(engine, by, kept)))
    best = min(found, key=lambda one: one[1].loss)
    base_kept = None if kept is None else _at(engine, 0.0, kept)
    judged = tuple(
        Strength(
            by=by,
            held_out=evaluation,
            against_best=paired(evaluation, best[1], rows),
            keep=of_kept,
            against_base=None if kept is None else paired(_given(of_kept), _given(base_kept), kept),
        )
        for by, evaluation, of_kept in found
    )
    chosen, reason = choose(judged)
    return Sweep(judged, chosen, reason, rows.name, keep)


def _given(evaluation: Evaluation | None) -> Evaluation:
    assert evaluation is not None
    return evaluation


def _refuse_biases(loaded: Loaded) -> None:
    assert loaded.bank is not None
    others = [slot.name for slot in loaded.bank.slots if not slot.name.endswith(("lora_A", "lora_B"))]
    if others:
        what = f"the adapter trained {others[0]}, which alpha does not scale"
        raise InputError(what, mend="train with bias: none, without DoRA and modules_to_save")


def _at(engine: Engine, by: float, rows: RowSet) -> Evaluation:
    if by == 0.0:
        return judge_base(engine, rows)
    bank = engine.trained
    assert isinstance(bank, AdapterBank)
    set_strength(bank, by)
    try:
        return judge(engine, rows)
    finally:
        set_strength(bank, 1.0)


def set_strength(bank: AdapterBank, by: float) -> None:
    """Let the adapters add `by` times what they were trained to add."""
    for name, module in bank.modules.items():
        if isinstance(module, LoraExperts):
            module.scale_K = tuple(s.expert_scale * by for s in bank.settings)
        else:
            module.projection.scale_K = [s.scale_of(name) * by for s in bank.settings]


def choose(judged: Sequence[Strength]) -> tuple[float, str]:
    """(the strength, why): among those that are no worse than the best within one paired standard error.

    That is the one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984, section 3.4.3).
    Among these, what forgets least; where nothing is to be kept, the adapter as it was trained, or else the best.
    """
    best = min(judged, key=lambda one: one.held_out.loss)
    as_good = [one for one in judged if one is best or one.against_best.value <= _error(one.against_best)]
    range_ = f"{best.by:g} has the lowest held-out loss, {best.held_out.loss:.4f}"
    if best.keep is not None:
        chosen = min(as_good, key=lambda one: one.keep.loss if one.keep is not None else math.inf)
        names = ", ".join(f"{one.by:g}" for one in as_good)
        kept = f"{chosen.by:g} has the lowest loss on what must be kept"
        if len(as_good) == 1:
            return best.by, f"{range_}, and no other is within a standard error of it"
        return chosen.by, f"{range_}; of those within a paired standard error of it ({names}), {kept}"
    trained = next((one for one in as_good if one.by == 1.0), None)
    if trained is None or trained is best:
        return best.by, range_
    gap = trained.against_best
    return (
        1.0,
        f"{range_}, and 1, as it was trained, is within its paired error of it ({gap.value:.4f} ± {gap.error:.4f})",
    )


def _error(difference: Difference) -> float:
    return 0.0 if math.isnan(difference.error) else difference.error


def to_json(found: Sweep) -> dict[str, Any]:
    def loss(evaluation: Evaluation | None) -> dict[str, float] | None:
        if evaluation is None:
            return None
        return {"loss": evaluation.loss, "standard_error": evaluation.standard_error}

    def gap(difference: Difference | None) -> dict[str, float] | None:
        return None if difference is None else {"value": difference.value, "standard_error": difference.error}

    return {
        "rows": found.rows,
        "keep": found.keep,
        "strengths": [
            {
                "by": one.by,
                "held_out": loss(one.held_out),
                "against_best": gap(one.against_best),
                "kept": loss(one.keep),
                "kept_against_base": gap(one.against_base),
            }
            for one in found.strengths
        ],
        "chosen": found.chosen,
        "reason": found.reason,
    }
