"""What a run does about its own faults: no memory, numbers that are not finite."""

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

from torch import Tensor

from welltuned.advice.plan import Plan
from welltuned.choice import SetBy
from welltuned.training.step import Gradient, NotFinite

IN_A_ROW = 3  # updates without a finite loss and gradient, one after the other, until something is done
MOST_RETURNS = 3  # times that a run goes back to a checkpoint
LARGEST_NORM = 1e18  # of a gradient: its square would overflow AdamW's second moment in fp32 (3.4e38)


class OnNonfinite(StrEnum):
    """What follows on `IN_A_ROW` updates that had to be left out."""

    BACK = "back"  # to the newest checkpoint, from there with half the rate
    STOP = "stop"


def policy_of(plan: Plan) -> OnNonfinite:
    """The recipe's `on_nonfinite`. Unset: back where the advice chose the rate, stop where the user did.

    The advice may correct itself while everybody sleeps; a rate that the user set is not changed.
    """
    given = plan.recipe.on_nonfinite
    if given is not None:
        return OnNonfinite(given)
    return OnNonfinite.STOP if plan.choices["learning_rate"].set_by is SetBy.USER else OnNonfinite.BACK


def is_sound(norm: float, made: Gradient) -> bool:
    """Whether a gradient may enter the weights."""
    return math.isfinite(made.loss) and norm < LARGEST_NORM


def culprits(rows: Sequence[Any], finite: Callable[[Sequence[int]], bool]) -> list[int]:
    """Indices of those rows that are at fault by themselves: halves are tried, then their halves.

    With one of n at fault that takes 2 log2(n) tries with 2n rows in all. All of them where none is alone at fault.

    >>> culprits("aaxaaaxa", lambda some: not any("aaxaaaxa"[i] == "x" for i in some))
    [2, 6]
    """

    def among(some: Sequence[int]) -> list[int]:
        if finite(some):
            return []
        if len(some) == 1:
            return list(some)
        middle = len(some) // 2
        return among(some[:middle]) + among(some[middle:])

    every = list(range(len(rows)))
    middle = max(1, len(every) // 2)
    return among(every[:middle]) + (among(every[middle:]) if every[middle:] else []) or every


def finite_alone(
    make: Callable[[Sequence[Any], Sequence[int]], Gradient],
    norm: Callable[[], Tensor],
    grad_KP: Tensor,
    rows: Sequence[Any],
    keys: Sequence[int],
) -> Callable[[Sequence[int]], bool]:
    """Whether some of an update's rows have a finite loss and gradient; leaves the gradients cleared.

    Args:
        make: fills the flat gradient, over all ranks; `norm` is its length afterwards, on all of them.
    """

    def finite(some: Sequence[int]) -> bool:
        try:
            made = make([rows[i] for i in some], [keys[i] for i in some])
            return is_sound(float(norm().norm()), made)
        except NotFinite:
            return False
        finally:
            grad_KP.zero_()

    return finite


def halved(budget: int, tokens: int | None) -> int:
    """The next smaller token budget; `tokens` of the largest update so far, since a budget beyond that cuts nothing."""
    return max(1, min(budget, tokens or budget) // 2)
