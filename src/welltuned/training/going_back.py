"""Back to the newest checkpoint, from there with half the rate, where numbers stay not finite; or an end."""

from dataclasses import replace
from typing import TYPE_CHECKING

from welltuned.errors import RunError
from welltuned.training.checkpoint import Checkpoint, newest
from welltuned.training.events import Note
from welltuned.training.healing import MOST_RETURNS, OnNonfinite, policy_of

if TYPE_CHECKING:
    from welltuned.training.loop import Loop


def back_or_stop(loop: "Loop", why: str) -> None:
    """Go back, or end the run, by the policy.

    Raises:
        RunError: the run ends; its newest checkpoint is intact.
    """
    loop.say(loop.setting.keeper.join())
    run, before = loop.setting.directory.path, loop.at
    mend = f"lower learning_rate in {run}/recipe.yaml and: welltuned resume {run} --accept-changes"
    if policy_of(loop.plan) is OnNonfinite.STOP or before.returns >= MOST_RETURNS:
        after = f" after {before.returns} returns to a checkpoint" if before.returns else ""
        raise RunError(f"{why}{after}; the last checkpoint is as it was; look at the rows, or {mend}")
    found: Checkpoint | None = None
    notes: tuple[str, ...] = ()

    def look() -> bool:
        nonlocal found, notes
        found, notes = newest(run, loop.setting.origin.run, tensors=loop.numbers.pieces is None)
        return found is not None

    if loop.ranks.first(look):
        loop.restore(found)
    elif not loop.start_over():
        raise RunError(f"{why}; there is no checkpoint yet to go back to; lower learning_rate, or look at the rows")
    loop.at = replace(
        loop.at,
        rate_factor=before.rate_factor / 2,
        returns=before.returns + 1,
        skipped=before.skipped,
        in_a_row=0,
    )
    loop.cut_to(before.token_budget)
    loop.say(notes)
    text = f"{why}: back to update {loop.at.step}, from there with {loop.at.rate_factor:g} of the planned rate"
    loop.tell(Note(f"{text} (return {loop.at.returns} of at most {MOST_RETURNS})"))
