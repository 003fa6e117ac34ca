"""The learning rate: a law fitted to a published sweep and to short runs of our own, converted to the run at hand.

For supervised LoRA (QLoRA is the same), at alpha 32, batch 128, 780 updates and linear decay (D001, D013):

    lr = c(family) · (P / 8e9)^-0.12 · (4e9 / P)^0.60 below 4e9 parameters · (r / 16)^0.18

and from there to this run:

    · (32 / alpha)^0.46   the rate moves A as well as B, so less than alpha counts (M027; E094 says why, E095 saw it)
    · (batch / 128)^0.31  below 128 (D010)
    · (780 / updates)^p   below 780 updates; p is 0.1, so the length of a run matters little (D002)

alpha is that of 1/r scaling; with rsLoRA it counts as alpha·sqrt(r) (E091). The three exponents were measured at 135M,
with batches of 1 to 16 and 10 to 480 updates (benchmarks/lr_law.py). Beyond that they are an extrapolation, said to the
user and paid for with a wider range. The rate stays below those at which runs have diverged.

Full fine-tuning has no open sweep: the rate is the geometric mean of a tenth of LoRA's at alpha 32 and what released
recipes of that size use, with LoRA's term for batches and a term of its own for updates (D011). Preference and
reinforcement learning have no law at all: their bands are those of recipes (R) and vendors (V), in alpha · lr, since at
rates as low as theirs A hardly moves (E094).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from welltuned.advice.rules import cited, number, rule
from welltuned.advice.settle import counted, shown, size_words, times
from welltuned.choice import Choice
from welltuned.recipe import Method, Tune


@dataclass(frozen=True, slots=True, kw_only=True)
class RateSetting:
    """What the rate depends on. `family` is the configuration's model_type, `parameters` the total."""

    family: str
    parameters: int
    batch: int
    updates: int
    r: int = 1
    alpha: float = 1.0
    use_rslora: bool = False
    mixture: bool = False

    @property
    def alpha_equivalent(self) -> float:
        """The alpha with which 1/r scaling would do the same."""
        return self.alpha * math.sqrt(self.r) if self.use_rslora else self.alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A rate and the factors it is made of. `doubt` is how far the range reaches to either side, as a factor.

    Above `highest` runs have diverged.
    """

    value: float
    base: float
    alpha_factor: float = 1.0
    batch_factor: float = 1.0
    updates_factor: float = 1.0
    doubt: float
    highest: float = math.inf
    limited: str = ""
    extrapolated: bool = False
    evidence: tuple[str, ...]


# ── the law ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def family_of(model_type: str) -> str | None:
    """The sweep's name for a model_type; None where the sweep has no such family."""
    name: str | None = rule("rate_families").value.get(model_type)
    return name


def base_rate(family: str, parameters: int, r: int) -> float:
    """The law at the sweep's own alpha, batch and number of updates."""
    known = family_of(family)
    suffix = "" if known else "_unknown"
    start = rule("rate_base").value[known] if known else number("rate_base_unknown")
    size = (parameters / number("rate_size")) ** number(f"rate_size_exponent{suffix}")
    small = max(1.0, number("rate_knee") / parameters) ** number(f"rate_small_exponent{suffix}")
    rank = (r / number("rate_rank")) ** number(f"rate_rank_exponent{suffix}")
    return float(start * size * small * rank)


def alpha_factor(alpha_equivalent: float) -> float:
    return float((number("rate_alpha") / alpha_equivalent) ** number("rate_alpha_exponent"))


def as_at_the_sweeps(rate: float, alpha_equivalent: float) -> float:
    """The rate at the sweep's alpha that does what this one does at this alpha."""
    return rate / alpha_factor(alpha_equivalent)


def batch_factor(batch: int) -> float:
    return float(min(1.0, batch / number("rate_batch")) ** number("rate_batch_exponent"))


def updates_factor(updates: int, exponent: str = "rate_updates_exponent") -> float:
    """At least 1: how much higher the rate of a short run is than that of 780 updates."""
    return float(_shortness(updates) ** number(exponent))


def _shortness(updates: int) -> float:
    return max(1.0, number("rate_updates") / max(1, updates))


def _distance_from_measured(parameters: int) -> float:
    """0 at (and below) the size of our own runs, 1 at 8B and above, linear in ln(parameters)."""
    measured, large = number("rate_measured_size"), number("rate_size")
    return min(1.0, max(0.0, math.log(parameters / measured) / math.log(large / measured)))


def lora_rate(setting: RateSetting) -> Rate:
    """The law for supervised LoRA and QLoRA, unrounded."""
    base = base_rate(setting.family, setting.parameters, setting.r)
    to_alpha = alpha_factor(setting.alpha_equivalent)
    to_batch, to_updates = batch_factor(setting.batch), updates_factor(setting.updates)
    rate = base * to_alpha * to_batch * to_updates
    limited, evidence = "", _law_evidence(setting)
    floor, cap = (at_sweeps * to_alpha for at_sweeps in (number("rate_floor"), _cap(setting)))
    if rate > cap:
        rate, limited = cap, f"held at {shown(two_digits(cap))}, above which runs have diverged"
        evidence = _merged(evidence, cited("rate_cap"))
    elif rate < floor:
        rate, limited = floor, f"raised to {shown(two_digits(floor))}, below which little is learned"
        evidence = _merged(evidence, cited("rate_floor"))
    return Rate(
        value=rate,
        base=base,
        alpha_factor=to_alpha,
        batch_factor=to_batch,
        updates_factor=to_updates,
        doubt=_doubt(setting),
        highest=cap,
        limited=limited,
        extrapolated=_converted(setting) and setting.parameters > number("rate_measured_size"),
        evidence=evidence,
    )


def _converted(setting: RateSetting) -> bool:
    """Whether the run is shorter, or its batches smaller, than those of the sweep."""
    return setting.updates < number("rate_updates") or setting.batch < number("rate_batch")


def full_rate(setting: RateSetting) -> Rate:
    """Supervised full fine-tuning, unrounded."""
    at_law = replace(setting, r=int(number("rate_rank")), alpha=number("rate_alpha"), use_rslora=False)
    tenth = base_rate(setting.family, setting.parameters, at_law.r) / number("rate_full_ratio")
    base = math.sqrt(tenth * _between(rule("rate_full_recipes").value, setting.parameters))
    to_batch = batch_factor(setting.batch)
    to_updates = updates_factor(setting.updates, "rate_full_updates_exponent")
    return Rate(
        value=base * to_batch * to_updates,
        base=base,
        batch_factor=to_batch,
        updates_factor=to_updates,
        doubt=number("rate_full_range") * _doubt(setting) / _family_doubt(setting.family),
        extrapolated=_converted(setting),
        evidence=_merged(
            cited("rate_full_recipes", "rate_full_ratio", "rate_full_updates_exponent"), _law_evidence(at_law)
        ),
    )


def _law_evidence(setting: RateSetting) -> tuple[str, ...]:
    names = ["rate_base" if family_of(setting.family) else "rate_base_unknown", "rate_rank_exponent"]
    if setting.alpha_equivalent != number("rate_alpha"):
        names.append("rate_alpha_exponent")
    if setting.batch < number("rate_batch"):
        names.append("rate_batch_exponent")
    if setting.updates < number("rate_updates"):
        names.append("rate_updates_exponent")
    if setting.use_rslora:
        names.append("lora_rslora")
    return cited(*names)


def _cap(setting: RateSetting) -> float:
    """The highest rate at alpha 32."""
    sizes, caps = rule("rate_cap_sizes").value, rule("rate_cap").value
    if setting.parameters >= sizes["dense_huge"] and not setting.mixture:
        return float(caps["dense_huge"])
    if setting.parameters >= sizes["large"]:
        return float(caps["large"])
    return float(caps["small" if setting.parameters >= sizes["small"] else "tiny"])


def _family_doubt(family: str) -> float:
    return number("rate_range_known" if family_of(family) else "rate_range_unknown")


def _doubt(setting: RateSetting) -> float:
    """The family's factor, times what the exponents of batch and updates may be wrong by."""
    distance, fewer = _distance_from_measured(setting.parameters), max(1.0, number("rate_batch") / setting.batch)
    doubt = _family_doubt(setting.family)
    for name, ratio in (("rate_batch_doubt", fewer), ("rate_updates_doubt", _shortness(setting.updates))):
        widths = rule(name).value
        doubt *= ratio ** (widths["measured"] + (widths["assumed"] - widths["measured"]) * distance)
    return float(doubt)


def _between(points: Sequence[Sequence[float]], parameters: int) -> float:
    """Straight lines through (size, rate) in logarithms, level beyond the ends."""
    size = math.log(min(max(parameters, points[0][0]), points[-1][0]))
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if size <= math.log(x1):
            share = (size - math.log(x0)) / math.log(x1 / x0)
            return float(y0 * (y1 / y0) ** share)
    return float(points[-1][1])


def _merged(*groups: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(id for group in groups for id in group))


def two_digits(value: float) -> float:
    """Rounded to two significant digits: no evidence supports more."""
    return float(f"{value:.1e}")


# ── choices ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def choose_learning_rate(method: Method, tune: Tune, setting: RateSetting, rows: int) -> Choice:
    """The rate with its range and a reason that names this run's numbers."""
    if method is Method.SFT:
        rate = full_rate(setting) if tune is Tune.FULL else lora_rate(setting)
        low, high = rate.value / rate.doubt, min(rate.value * rate.doubt, max(rate.value, rate.highest))
        return _choice(rate.value, low, high, _reason(tune, setting, rate, rows), rate.evidence)
    if tune is Tune.FULL:
        return _recipe_choice(method, f"{method}_full_rate", _full_preference_rate(method, setting), setting, "")
    value = number(f"{method}_alpha_rate") / setting.alpha_equivalent
    unit = f"at your alpha of {shown(setting.alpha_equivalent)}"
    return _recipe_choice(method, f"{method}_alpha_rate", value, setting, unit)


def _full_preference_rate(method: Method, setting: RateSetting) -> float:
    return _between(rule(f"{method}_full_rate").value, setting.parameters)


def _recipe_choice(method: Method, name: str, value: float, setting: RateSetting, unit: str) -> Choice:
    """No law exists for these methods: the band of the recipes."""
    if method is Method.GRPO:
        spread: Any = rule("grpo_range").value
        below, above, ranges = spread["low"], spread["high"], "grpo_range"
    else:
        below = above = number("preference_range")
        ranges = "preference_range"
    where = unit or f"{size_words(setting.parameters)} parameters, all of them trained"
    reason = f"released {method} recipes centre on {shown(two_digits(value))} ({where}); no law was measured"
    if unit:
        reason += f", and at such rates alpha · rate is what counts, {shown(number(f'{method}_alpha_rate'))}"
    return _choice(value, value / below, value * above, reason, cited(name, ranges))


def _choice(value: float, low: float, high: float, reason: str, evidence: tuple[str, ...]) -> Choice:
    return Choice(value=two_digits(value), low=two_digits(low), high=two_digits(high), reason=reason, evidence=evidence)


def _reason(tune: Tune, setting: RateSetting, rate: Rate, rows: int) -> str:
    size = size_words(setting.parameters)
    known = family_of(setting.family)
    if tune is Tune.FULL:
        start = f"between a tenth of LoRA's rate and what released recipes take at {size}"
    else:
        name = f"{known} models" if known else f"models of families that were not, as {setting.family},"
        start = f"from measured runs of {name}, at {size} and r {setting.r}"
    run = f"your {counted(rows, 'row')} make {counted(setting.updates, 'update')} of {setting.batch}"
    where = f"{number('rate_updates'):.0f} updates of {number('rate_batch'):.0f}"
    parts = [f"{shown(rate.base)} at {where}"]
    if rate.alpha_factor != 1:
        parts.append(f"{times(rate.alpha_factor)} for your alpha of {shown(setting.alpha_equivalent)}")
    if rate.batch_factor != 1:
        parts.append(f"{times(rate.batch_factor)} for batches of {setting.batch}")
    if two_digits(rate.updates_factor) != 1:
        parts.append(f"{times(rate.updates_factor)} for {counted(setting.updates, 'update')}")
    reason = f"{start}, where {run}; {', '.join(parts)}"
    if rate.limited:
        reason += f"; {rate.limited}"
    if rate.extrapolated:
        measured = size_words(int(number("rate_measured_size")))
        how = "full fine-tuning of any size" if tune is Tune.FULL else f"a model of {size}"
        reason += f"; short runs were measured with LoRA at {measured} only, so for {how} the range is wide"
    return reason
