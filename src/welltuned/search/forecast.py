"""What a search will take: said before it starts, and kept to where the user sets a limit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from welltuned.advice.effort import SpeedFrom
from welltuned.advice.plan import Plan
from welltuned.advice.rules import number
from welltuned.advice.settle import counted, span_words
from welltuned.errors import InputError
from welltuned.search.arms import Arm


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchForecast:
    """Seconds on one device; None where a run's time cannot be forecast.

    Attributes:
        arms: of the whole search. run: one arm by itself, to its end.
        low: the search stops at the first rung that it may stop at. high: every arm goes to its end.
    """

    arms: int
    run: float | None
    low: float | None
    high: float | None
    speed_from: SpeedFrom

    def sentence(self) -> str:
        """For before the start."""
        what = f"the search: {counted(self.arms, 'arm')}"
        if self.run is None or self.low is None or self.high is None:
            return f"{what}; how long it takes cannot be forecast"
        sure = ", right to a factor of about two" if self.speed_from is SpeedFrom.ARITHMETIC else ""
        return (
            f"{what}, about {span_words(self.low)} where they soon tell, at most {span_words(self.high)} "
            f"(one run: {span_words(self.run)}{sure}); --minutes N sets a limit, --set max_steps=N makes it shorter"
        )


def forecast(
    base: Plan, arms: Sequence[Arm], shares: Sequence[float], *, more: int = 0, trials: int | None = None
) -> SearchForecast:
    """What these arms will take; evaluations are counted, loading the model is not.

    Args:
        base: what the arms depart from, with the speed that is known of this machine.
        shares: after which shares of its run each arm is judged.
        more: arms that may be added. trials: arms of the whole search, where a sampler proposes them.
    """
    count, speed = max(len(arms), trials or 0), base.time.tokens_per_second
    if speed is None:
        return SearchForecast(arms=count, run=None, low=None, high=None, speed_from=base.time.speed_from)
    mean = math.fsum(arm.plan.time.tokens for arm in arms) / len(arms) / speed
    look = base.facts.dataset.heldout_tokens * number("evaluation_cost_of_token") / speed
    first = min(1, len(shares) - 1)  # the look before it decides nothing
    alone = mean * (1 - shares[first]) + look * (len(shares) - first - 1)
    low = count * (mean * shares[first] + look * (first + 1)) + alone + 2 * look  # before and after, once
    high = (count + more) * (mean + look * len(shares)) + 2 * look
    return SearchForecast(arms=count, run=mean, low=low, high=high, speed_from=base.time.speed_from)


def require_time(found: SearchForecast, seconds: float | None, plan: Plan) -> None:
    """Refuse a limit that one run alone is forecast not to keep."""
    if seconds is None or found.run is None or found.run <= seconds:
        return
    fewer = max(1, math.floor(0.5 * plan.updates * seconds / found.run))
    what = f"one run alone is forecast to take {span_words(found.run)}, and {minutes_words(seconds)} are given"
    raise InputError(what, where="--minutes", mend=f"make the runs shorter: --set max_steps={fewer}; or give more time")


def affordable(runs_left: float, now: float, following: float) -> int:
    """How many arms can be trained from one share of their run to the following, and one of them to its end.

    >>> affordable(1.5, 0.2, 0.4), affordable(0.1, 0.2, 0.4)
    (4, 1)
    """
    if not math.isfinite(runs_left):
        return 1
    return max(1, math.floor((runs_left - (1 - following)) / (following - now) + 1e-9))


def minutes_words(seconds: float) -> str:
    """As the limit was given."""
    minutes = round(seconds / 60, 2)
    return f"{minutes:g} minute{'' if minutes == 1 else 's'}"
