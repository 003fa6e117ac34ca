"""The average of a run's weights, judged on the held-out rows beside the result, and written to the Run's `ema`."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from welltuned.models.adapter_file import save_adapter
from welltuned.models.lora import AdapterBank
from welltuned.training.events import Note
from welltuned.training.loop import Loop
from welltuned.training.ranks import Group
from welltuned.training.rundir import AVERAGE
from welltuned.training.starting import save_model
from welltuned.training.step import Evaluation, NotFinite

ORIGIN = "welltuned.json"


def finish_average(loop: Loop, folder: AbstractContextManager[Path], facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """What run.json says of the average; None where the run keeps none. Call within `packed_model`.

    Args:
        folder: gives a place beside its name, and the name when all in it is written.
        facts: what is noted beside it: the keys of run.json that inference needs.
    """
    average, trained, prepared = loop.average, loop.trained, loop.setting.prepared
    if average is None:
        return None
    average.exchange(trained.flat_KP)
    try:
        found = _judged(loop) if prepared.held_out else None
        _save(loop, folder, facts)
    finally:
        average.exchange(trained.flat_KP)
    text = f"{AVERAGE}/ holds the average of the weights (ema_decay {average.decay:g})"
    if found is None or loop.at.last is None:
        loop.tell(Note(text))
        return {"decay": average.decay, "held_out": None}
    better = "lower than" if found.loss < loop.at.last.loss else "not lower than"
    loop.tell(Note(f"{text}, whose held-out loss {found.loss:.4f} is {better} the result's {loop.at.last.loss:.4f}"))
    return {"decay": average.decay, "held_out": {"loss": found.loss, "standard_error": found.standard_error}}


def _save(loop: Loop, folder: AbstractContextManager[Path], facts: Mapping[str, Any]) -> None:
    if loop.numbers.pieces is None:
        loop.ranks.first(lambda: _write(loop, folder, facts))
        return
    from welltuned.training.gathered import gathered_file

    assert isinstance(loop.ranks, Group)
    with gathered_file(loop.numbers.pieces, loop.setting.directory.path, loop.ranks) as file:
        loop.ranks.first(lambda: _write(loop, folder, facts, file))


def _write(
    loop: Loop, folder: AbstractContextManager[Path], facts: Mapping[str, Any], gathered: Path | None = None
) -> None:
    trained, prepared = loop.trained, loop.setting.prepared
    with folder as place:
        if gathered is not None:
            from welltuned.training.gathered import save_stored

            save_stored(prepared, gathered, place)
        elif isinstance(trained, AdapterBank):
            save_adapter(trained, place, base=str(loop.engine.model.config.name_or_path))
        else:
            save_model(loop.engine.model, prepared.recipe.method, place)
            prepared.tokenizer.save_pretrained(place)
        (place / ORIGIN).write_text(json.dumps(dict(facts), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _judged(loop: Loop) -> Evaluation | None:
    """None where its held-out loss is not finite: that is no fault of the result beside it."""
    held_out = loop.setting.prepared.held_out
    try:
        return loop.with_memory(lambda: loop.setting.objective.evaluate(loop.engine, held_out), "the evaluation")
    except NotFinite as error:
        loop.tell(Note(f"the average of the weights cannot be judged: {error}"))
        return None
