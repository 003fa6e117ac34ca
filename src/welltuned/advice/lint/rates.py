"""Checks of the learning rate: against what its method, its scale and its model support."""

from collections.abc import Iterator

from welltuned.advice.learning_rate import as_at_the_sweeps, two_digits
from welltuned.advice.lint.bands import (
    Band,
    grpo,
    preference_adapter,
    preference_full,
    supervised_adapter,
    supervised_full,
)
from welltuned.advice.lint.check import Hit, Severity, check, limit
from welltuned.advice.lint.config import Config
from welltuned.advice.lint.derived import alpha_equivalent, batch, parameters, updates
from welltuned.advice.rules import number
from welltuned.advice.settle import shown, size_words
from welltuned.recipe import Method, Tune

RATE = "learning_rate"
_PREFERENCE = (Method.DPO, Method.KTO, Method.ORPO)


def adam_rate(config: Config) -> float | None:
    """The rate where it is a positive number (others are WT096's) of an Adam: other optimisers have other ranges.

    With LoRA+ it is B's, with which the first updates go; the file has A's.
    """
    rate, optimiser = config.number(RATE), config.text("optim").lower()
    if (optimiser and "adam" not in optimiser) or "optim" in config.unread or config.on("use_onebitllms"):
        return None
    return rate * _plus(config) if rate is not None and rate > 0 else None


def _plus(config: Config) -> float:
    """What LoRA+ multiplies B's rate with."""
    ratio = config.number("loraplus_lr_ratio") if config.trains_adapter else None
    return ratio if ratio is not None and ratio > 0 else 1.0


def said(config: Config) -> str:
    """The rate as the file has it, or as the tool's default."""
    rate = shown(float(config.number(RATE) or 0))
    return (
        f"{config.key(RATE)} {rate}"
        if config.given(RATE)
        else f"{config.key(RATE)} is not set: {config.tool}'s default {rate}"
    )


def _scale(config: Config) -> str:
    alpha = alpha_equivalent(config) or 0.0
    how = " (rsLoRA: alpha · √r)" if config.on("use_rslora") else ""
    how += f" (LoRA+: {shown(_plus(config))} times that for B)" if _plus(config) != 1 else ""
    if not alpha or alpha == number("rate_alpha"):
        return f"at alpha {shown(alpha)}{how} is"
    same = shown(two_digits(as_at_the_sweeps(adam_rate(config) or 0, alpha)))
    return f"at alpha {shown(alpha)}{how}, which does what {same} does at {shown(number('rate_alpha'))}, is"


def _model(config: Config) -> str:
    size = parameters(config)
    return f"a model of {size_words(size)}" if size else "a model of any size"


def _adapter_band(config: Config) -> Band | None:
    return supervised_adapter(config) if config.method is Method.SFT and config.trains_adapter else None


def _full(config: Config) -> Band | None:
    """None for continued pretraining as well, whose rates are others."""
    supervised = config.method is Method.SFT and config.tune is Tune.FULL and config.stage != "pt"
    supervised = supervised and "adapter_unused" not in config.facts  # WT020's
    return supervised_full(config) if supervised else None


def supervised_band(config: Config) -> Band | None:
    """The sound range of SFT, with an adapter or in full."""
    return _adapter_band(config) or _full(config)


def span(low: float, high: float) -> str:
    return f"{shown(two_digits(low))} to {shown(two_digits(high))}"


@check(
    "WT001",
    "adapter-rate-diverges",
    Severity.ERROR,
    looks_for="SFT with LoRA: a rate more than three times above where runs have diverged.",
    why="Of the 80 runs that diverged in one sweep at alpha 32, 72 had the rate 3e-3; their loss did not come back.",
    mend="lower the rate into the range, or leave it to `welltuned plan`",
    evidence=("E024", "E094"),
    factor=3.0,
)
def adapter_rate_diverges(config: Config) -> Iterator[Hit]:
    band, rate = _adapter_band(config), adam_rate(config)
    if band and rate and rate > band.high * limit("WT001", "factor") * 0.999:
        yield Hit(
            name=RATE,
            sentence=f"{said(config)} {_scale(config)} {rate / band.high:.0f} times above what {_model(config)} "
            f"has stood: {span(band.low, band.high)} is sound",
        )


@check(
    "WT002",
    "adapter-rate-high",
    Severity.WARNING,
    looks_for="SFT with LoRA: a rate above the range that the sweep and the recipes support.",
    why="Divergence begins here: the best rates of 35 swept models lie below it.",
    mend="lower the rate into the range; halve it where forgetting matters",
    evidence=("E024", "E021", "E094"),
)
def adapter_rate_high(config: Config) -> Iterator[Hit]:
    band, rate = _adapter_band(config), adam_rate(config)
    if band and rate and band.high * 1.001 < rate <= band.high * limit("WT001", "factor") * 0.999:
        yield Hit(
            name=RATE,
            sentence=f"{said(config)} {_scale(config)} above the sound range {span(band.low, band.high)} "
            f"for {_model(config)}",
        )


@check(
    "WT003",
    "full-rate-for-adapter",
    Severity.WARNING,
    looks_for="SFT with LoRA: a rate that belongs to full fine-tuning, about ten times too low for an adapter.",
    why="LoRA's best rate is about ten times that of full fine-tuning; at a tenth of it the run costs the same and "
    "learns a fraction: at 4e-5, the lowest rate of one sweep, losses lay 3.6 % above their best on average.",
    mend="multiply the rate by about 10, or ask `welltuned plan`",
    evidence=("E031", "E063", "E021", "D003"),
)
def full_rate_for_adapter(config: Config) -> Iterator[Hit]:
    band, rate = _adapter_band(config), adam_rate(config)
    if band and rate and band.low / limit("WT004", "factor") <= rate < band.low * 0.999:
        yield Hit(
            name=RATE,
            sentence=f"{said(config)} {_scale(config)} below the sound range {span(band.low, band.high)} "
            f"of an adapter for {_model(config)}",
        )


@check(
    "WT004",
    "rate-too-low-to-learn",
    Severity.ERROR,
    looks_for="SFT: a rate more than ten times below everything that any evidence supports.",
    why="The weights hardly leave their start; the run ends with the model it began with.",
    mend="take a rate from the range, or leave it to `welltuned plan`",
    evidence=("D003", "E026", "E051"),
    factor=10.0,
)
def rate_too_low_to_learn(config: Config) -> Iterator[Hit]:
    band, rate = supervised_band(config), adam_rate(config)
    if band and rate and rate < band.low / limit("WT004", "factor"):
        yield Hit(
            name=RATE,
            sentence=f"{said(config)} is {band.low / rate:,.0f} times below the lowest sound "
            f"rate, {shown(two_digits(band.low))}",
        )


@check(
    "WT005",
    "adapter-rate-for-full",
    Severity.ERROR,
    looks_for="SFT in full: a rate that belongs to LoRA, three times or more above every recipe of that size.",
    why="Full fine-tuning wants about a tenth of LoRA's rate: at LoRA's, what the model knew is overwritten.",
    mend="divide the rate by about 10, or train an adapter",
    evidence=("E031", "E063", "E044", "E048", "E051"),
    factor=3.0,
)
def adapter_rate_for_full(config: Config) -> Iterator[Hit]:
    band, rate = _full(config), adam_rate(config)
    if band and rate and rate >= band.high * limit("WT005", "factor"):
        yield Hit(
            name=RATE,
            sentence=f"{said(config)} trains all weights of {_model(config)}: {rate / band.high:.1f} times "
            f"the highest sound rate, {shown(two_digits(band.high))}",
        )


@check(
    "WT006",
    "full-rate-high",
    Severity.WARNING,
    looks_for="SFT in full: a rate above every released recipe of that size, and above the law.",
    why="Recipes go from 1e-3 at 360M over 3e-4 at 1.7B to 2e-5 at 7B and 2e-6 at 70B; higher rates forget.",
    mend="lower the rate into the range",
    evidence=("E044", "E048", "E051", "E031"),
)
def full_rate_high(config: Config) -> Iterator[Hit]:
    band, rate = _full(config), adam_rate(config)
    if band and rate and band.high * 1.001 < rate < band.high * limit("WT005", "factor"):
        yield Hit(
            name=RATE,
            sentence=f"{said(config)} trains all weights of {_model(config)}, above the sound "
            f"range {span(band.low, band.high)}",
        )


@check(
    "WT007",
    "full-rate-low",
    Severity.WARNING,
    looks_for="SFT in full: a rate below every released recipe.",
    why="The lowest recipe is 2e-6, at 70B.",
    mend="raise the rate into the range",
    evidence=("E051", "E044"),
)
def full_rate_low(config: Config) -> Iterator[Hit]:
    band, rate = _full(config), adam_rate(config)
    if band and rate and band.low / limit("WT004", "factor") <= rate < band.low:
        yield Hit(
            name=RATE,
            sentence=f"{said(config)} is below the sound range {span(band.low, band.high)} of full fine-tuning",
        )


@check(
    "WT008",
    "rate-far-from-law",
    Severity.NOTE,
    looks_for="SFT with LoRA, where the model's size and the number of updates are known: "
    "a rate more than three times off "
    "the fitted law, and yet in the range that recipes support.",
    why="One sweep's loss is 1 % above its best at 3.2 times off; short runs of small models lose far more.",
    mend="ask `welltuned plan` for the law's rate and its reasons, or try it beside yours",
    evidence=("E021", "E025", "M002", "M006"),
    factor=3.0,
)
def rate_far_from_law(config: Config) -> Iterator[Hit]:
    band, rate = _adapter_band(config), adam_rate(config)
    if not band or not rate or band.centre is None or not band.low <= rate <= band.high:
        return
    ratio = max(rate / band.centre, band.centre / rate)
    if ratio > limit("WT008", "factor"):
        side = "above" if rate > band.centre else "below"
        run = f"{updates(config):,} updates of {batch(config) or '?'}"
        yield Hit(
            name=RATE,
            sentence=f"{said(config)} is {ratio:.1f} times {side} the law's {shown(two_digits(band.centre))} "
            f"for {_model(config)} in {run}",
        )


# ── preferences and reinforcement ────────────────────────────────────────────────────────────────────────────────────


def _preference_band(config: Config) -> Band | None:
    if config.method not in _PREFERENCE or config.method is None:
        return None
    if config.trains_adapter:
        return preference_adapter(config, config.method)
    full = config.tune is Tune.FULL and "adapter_unused" not in config.facts
    return preference_full(config, config.method) if full else None


def _preference_bounds(config: Config) -> tuple[float, float] | None:
    """Above the first a preference rate is too high, from the second on it destroys."""
    band = _preference_band(config)
    if band is None:
        return None
    if not config.trains_adapter:
        return band.high, max(band.high * 2, limit("WT010", "full"))
    if config.method is Method.ORPO:  # its loss has a supervised part and takes supervised rates
        return max(limit("WT009", "orpo"), band.high), limit("WT010", "adapter") * 10
    return min(limit("WT009", "adapter"), max(band.high, 1e-5)), limit("WT010", "adapter")


def _preference_mend(config: Config) -> str | None:
    """ORPO, whose loss has a supervised part, has rates of its own."""
    return "about 5e-5 with an adapter, 5e-6 in full" if config.method is Method.ORPO else None


@check(
    "WT009",
    "preference-rate-high",
    Severity.WARNING,
    looks_for="DPO or KTO with LoRA at 5e-5 and above, in full above 4 times the recipes; ORPO above 2e-4.",
    why="SimPO's authors report incoherent text at 1e-5 in full; 2e-4 is a supervised "
    "rate, twenty times what preference "
    "recipes with adapters use.",
    mend="5e-6 to 1e-5 with an adapter, about 5e-7 in full",
    evidence=("E047", "E060", "E063", "E077", "E076"),
    adapter=5e-5,
    orpo=2e-4,
)
def preference_rate_high(config: Config) -> Iterator[Hit]:
    bounds, rate = _preference_bounds(config), adam_rate(config)
    if bounds and rate and bounds[0] * 0.999 <= rate < bounds[1] and (rate > bounds[0] or config.trains_adapter):
        yield Hit(
            name=RATE,
            sentence=f"{said(config)} is high for {config.method}: {shown(two_digits(bounds[0]))} "
            "is where recipes are left behind",
            mend=_preference_mend(config),
        )


@check(
    "WT010",
    "preference-rate-destroys",
    Severity.ERROR,
    looks_for="DPO or KTO with LoRA at 2e-4 and above, in full at 1e-5 and above.",
    why="SimPO's authors report incoherent text at 1e-5 in full; 2e-4 is a supervised "
    "rate, twenty times what preference "
    "recipes use.",
    mend="5e-6 to 1e-5 with an adapter, about 5e-7 in full",
    evidence=("E077", "E047", "E046", "E076"),
    adapter=2e-4,
    full=1e-5,
)
def preference_rate_destroys(config: Config) -> Iterator[Hit]:
    bounds, rate = _preference_bounds(config), adam_rate(config)
    if bounds and rate and rate >= bounds[1] * 0.999:
        centre = (_preference_band(config) or Band(low=rate, high=rate)).low * 10
        what = "an adapter" if config.trains_adapter else "all weights"
        times = f"{rate / centre:,.0f} times the recipes' centre, {shown(two_digits(centre))}"
        yield Hit(
            name=RATE,
            sentence=f"{said(config)} for {config.method} on {what} is a supervised rate, {times}",
            mend=_preference_mend(config),
        )


@check(
    "WT011",
    "preference-rate-low",
    Severity.WARNING,
    looks_for="DPO, KTO or ORPO: a rate a tenth of the recipes' or less; above all full "
    "fine-tuning's rate on an adapter.",
    why="1e-6 is TRL's default and right for full fine-tuning. With LoRA and 1e-5 a "
    "published run of 50 updates stood at "
    "accuracy 0.516 and loss 0.69: untrained.",
    mend="with an adapter multiply by about 10; count the updates as well",
    evidence=("E043", "E063", "E067"),
)
def preference_rate_low(config: Config) -> Iterator[Hit]:
    band, rate = _preference_band(config), adam_rate(config)
    if band and rate and rate < band.low:
        yield Hit(
            name=RATE,
            sentence=f"{said(config)} is {band.low * 10 / rate:,.0f} times below the recipes' centre, "
            f"{shown(two_digits(band.low * 10))}, for {config.method}",
        )


def _grpo_band(config: Config) -> Band | None:
    if config.method is not Method.GRPO or config.tune is None or "adapter_unused" in config.facts:
        return None
    return grpo(config, config.trains_adapter)


@check(
    "WT012",
    "grpo-rate-high",
    Severity.WARNING,
    looks_for="GRPO: a rate above the highest that was shown to learn, alpha · rate 3.2e-3 "
    "(1e-4 at alpha 32), or 1e-5 in full.",
    why="Published rates go up to 1e-4 at alpha 32, and that on easy tasks; none above is known to have learned.",
    mend="5e-6 to 5e-5 with an adapter, 1e-6 in full",
    evidence=("E041", "E042", "E063", "E069"),
)
def grpo_rate_high(config: Config) -> Iterator[Hit]:
    band, rate = _grpo_band(config), adam_rate(config)
    if band and rate and band.high * 1.001 < rate <= band.high * limit("WT013", "factor"):
        yield Hit(name=RATE, sentence=f"{said(config)} is above the sound range {span(band.low, band.high)} for GRPO")


@check(
    "WT013",
    "grpo-rate-destroys",
    Severity.ERROR,
    looks_for="GRPO: a rate more than five times above the highest that was shown to learn.",
    why="It is a supervised rate. No published run of GRPO has learned anywhere near it.",
    mend="5e-6 to 5e-5 with an adapter, 1e-6 in full",
    evidence=("E041", "E042", "E063"),
    factor=5.0,
)
def grpo_rate_destroys(config: Config) -> Iterator[Hit]:
    band, rate = _grpo_band(config), adam_rate(config)
    if band and rate and rate > band.high * limit("WT013", "factor"):
        yield Hit(
            name=RATE,
            sentence=f"{said(config)} is {rate / band.high:.0f} times the highest rate at which GRPO was "
            f"shown to learn, {shown(two_digits(band.high))}",
        )


@check(
    "WT014",
    "grpo-rate-low",
    Severity.WARNING,
    looks_for="GRPO with LoRA at a full-parameter rate: a tenth of the recipes' or less.",
    why="1e-6 is TRL's default and right in full; an adapter wants 1e-5 and more for the same reward curve.",
    mend="multiply the rate by about 10",
    evidence=("E063", "E064", "E067"),
)
def grpo_rate_low(config: Config) -> Iterator[Hit]:
    band, rate = _grpo_band(config), adam_rate(config)
    if band and rate and rate < band.low:
        yield Hit(name=RATE, sentence=f"{said(config)} is below the sound range {span(band.low, band.high)} for GRPO")
