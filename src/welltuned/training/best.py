"""The best weights of a run, by its held-out rows, in the place of the last."""

from dataclasses import replace
from typing import TYPE_CHECKING

from welltuned.training.checkpoint import Damaged, folder_of, read_checkpoint, verify
from welltuned.training.events import Note
from welltuned.training.loop import Loop
from welltuned.training.snapshot import restore_weights

if TYPE_CHECKING:
    from welltuned.models.sharded import ShardedParameters


def take_best(loop: Loop) -> bool:
    """Put the best evaluated update's weights in the place of the last, where the plan says so; whether it did.

    Call within `packed_model`.
    """
    best, setting = loop.watch.best_step, loop.setting
    if best is None or best == loop.at.step or not loop.plan.value("load_best_model_at_end"):
        return False
    if best == 0:
        loop.tell(Note("no update made the held-out loss lower than it was: the last weights are kept"))
        return False
    damaged = loop.ranks.first(lambda: _read(loop, best))
    if damaged is not None:
        loop.tell(Note(f"the weights of update {best} were the best, but {damaged}: the last ones are kept"))
        return False
    if loop.numbers.pieces is None:
        loop.ranks.spread_([loop.trained.flat_KP])
    else:
        _read_pieces(loop, loop.numbers.pieces, best)
    held_out = setting.prepared.held_out
    last = loop.with_memory(lambda: setting.objective.evaluate(loop.engine, held_out), "the evaluation")
    loop.at = replace(loop.at, last=last)
    text = f"the weights of update {best}, the best on the held-out rows (loss {last.loss:.4f}), are the result"
    loop.tell(Note(f"{text}, not those of the last, {loop.at.step}"))
    return True


def _read_pieces(loop: Loop, trained: "ShardedParameters", step: int) -> None:
    from welltuned.training.pieces import read_own_part

    folder = folder_of(loop.setting.directory.path, step)
    loop.ranks.each(lambda: read_own_part(folder, {"trained": trained.flat_KP}, trained))


def _read(loop: Loop, step: int) -> str | None:
    """Put a checkpoint's weights in the place of the last; what is wrong with it, where that is so."""
    folder = folder_of(loop.setting.directory.path, step)
    try:
        if loop.numbers.pieces is None:
            restore_weights(loop.trained, read_checkpoint(folder))
        else:
            verify(folder)
    except Damaged as damage:
        return str(damage)
    return None
