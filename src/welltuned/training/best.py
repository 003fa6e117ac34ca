"""The best weights of a run, by its held-out rows, in the place of the last."""

from dataclasses import replace

from welltuned.training.checkpoint import Damaged, folder_of, read_checkpoint
from welltuned.training.events import Note
from welltuned.training.loop import Loop
from welltuned.training.snapshot import restore_weights


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
    loop.ranks.spread_([loop.trained.flat_KP])
    held_out = setting.prepared.held_out
    last = loop.with_memory(lambda: setting.objective.evaluate(loop.engine, held_out), "the evaluation")
    loop.at = replace(loop.at, last=last)
    text = f"the weights of update {best}, the best on the held-out rows (loss {last.loss:.4f}), are the result"
    loop.tell(Note(f"{text}, not those of the last, {loop.at.step}"))
    return True


def _read(loop: Loop, step: int) -> str | None:
    """Put a checkpoint's weights in the place of the last; what is wrong with it, where that is so."""
    try:
        restore_weights(loop.trained, read_checkpoint(folder_of(loop.setting.directory.path, step)))
    except Damaged as damage:
        return str(damage)
    return None
