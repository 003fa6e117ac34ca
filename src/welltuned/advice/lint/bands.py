"""The range of learning rates that some evidence supports, for a run as a file describes it.

A file rarely says how many rows it trains on, so the law of advice/learning_rate alone does not settle its rate. The
range here is the hull of what the law gives and of what released recipes use: a rate outside it is outside everything.
"""

import math
from dataclasses import dataclass

from welltuned.advice.learning_rate import RateSetting, alpha_factor, full_rate, lora_rate
from welltuned.advice.lint.config import Config
from welltuned.advice.lint.derived import (
    active_parameters,
    alpha_equivalent,
    batch,
    family,
    is_mixture,
    parameters,
    updates,
)
from welltuned.advice.rules import number, rule
from welltuned.recipe import Method

# Full fine-tuning: the highest rates of released recipes by size (E048, E044, E051), between which lines are drawn in
# logarithms. No recipe of that size is above the line.
_FULL_HIGHEST = ((3.6e8, 1.0e-3), (1.7e9, 3.0e-4), (8.0e9, 5.0e-5), (7.0e10, 2.0e-5))
_LARGE = 1.0e9  # from here on E024's divergence bounds the rate
_SHORT = 100  # updates below which recipes, which are of longer runs, say nothing
_SMALL = 2.0e8  # parameters up to which short runs were measured (M001 to M011, at 135M)
_USUAL_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Rates from `low` to `high` are sound. `centre` is the law's, where the run is known well enough for it."""

    low: float
    high: float
    centre: float | None = None


def supervised_adapter(config: Config) -> Band | None:
    """LoRA and QLoRA; None where alpha is not known. Bounds were found at alpha 32 and are moved as the law says."""
    alpha = alpha_equivalent(config)
    if alpha is None:
        return None
    size, run = parameters(config), updates(config)
    caps = rule("rate_cap").value
    cap = caps["small"] if size is None or size < _LARGE else caps["large"]
    low, high = (bound * alpha_factor(alpha) for bound in (number("rate_floor"), cap))
    if size is None or run is None:
        return Band(low=low, high=high)
    rate = lora_rate(_setting(config, size, run, alpha))
    law_low, law_high = rate.value / rate.doubt, rate.value * rate.doubt
    if run < _SHORT and size <= _SMALL:
        return Band(low=law_low, high=max(law_high, high), centre=rate.value)
    return Band(low=min(low, law_low), high=max(high, law_high), centre=rate.value)


def supervised_full(config: Config) -> Band:
    """Full fine-tuning; an unknown size gets the range of the smallest."""
    size, run = parameters(config), updates(config)
    active = active_parameters(config)
    highest = _highest(active if active is not None else _FULL_HIGHEST[0][0])
    lowest = rule("rate_full_recipes").value[-1][1] / 10
    if size is None:
        return Band(low=lowest, high=highest)
    rate = full_rate(_setting(config, size, run or int(number("rate_updates")), 1.0))
    high = max(highest, rate.value * rate.doubt) if run is not None else highest
    return Band(low=min(lowest, rate.value / rate.doubt), high=high, centre=rate.value if run is not None else None)


def preference_adapter(config: Config, method: Method) -> Band | None:
    """DPO, KTO and ORPO with an adapter: recipes' centre, a decade to either side.

    At rates as low as these A hardly moves, so that alpha · rate is what counts (E094); nothing else was measured.
    """
    alpha = alpha_equivalent(config)
    if alpha is None:
        return None
    centre = number(f"{method}_alpha_rate") / alpha
    return Band(low=centre / 10, high=centre * 10)


def preference_full(config: Config, method: Method) -> Band:
    """DPO, KTO and ORPO in full: half a decade above and a decade below what recipes of any size use."""
    points = rule(f"{method}_full_rate").value
    return Band(low=min(rate for _, rate in points) / 10, high=max(rate for _, rate in points) * 4)


def grpo(config: Config, adapter: bool) -> Band | None:
    """GRPO: a decade to either side of the recipes' centre; E041's highest rate that learned, 1e-4 at alpha 32."""
    if not adapter:
        centre = float(rule("grpo_full_rate").value[0][1])
        return Band(low=centre / 10, high=centre * 10)
    alpha = alpha_equivalent(config)
    if alpha is None:
        return None
    centre = number("grpo_alpha_rate") / alpha
    return Band(low=centre / 10, high=centre * 10)


def _setting(config: Config, size: int, run: int, alpha: float) -> RateSetting:
    return RateSetting(
        family=family(config),
        parameters=size,
        batch=max(1, batch(config) or _USUAL_BATCH),
        updates=run,
        r=max(1, config.whole("r") or int(number("rate_rank"))),
        alpha=alpha,
        mixture=is_mixture(config),
    )


def _highest(size: float) -> float:
    points = _FULL_HIGHEST
    if size <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if size <= x1:
            return float(y0 * (y1 / y0) ** (math.log(size / x0) / math.log(x1 / x0)))
    return points[-1][1]
