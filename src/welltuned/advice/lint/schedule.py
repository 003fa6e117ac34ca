"""Checks of the schedule: warm-up, its shape, and the decay of the weights."""

from collections.abc import Iterator

from welltuned.advice.lint.check import Hit, Severity, check, limit
from welltuned.advice.lint.config import Config
from welltuned.advice.lint.derived import updates
from welltuned.advice.lint.rates import RATE, adam_rate, said, span, supervised_band
from welltuned.advice.rules import number
from welltuned.advice.settle import shown


@check(
    "WT015",
    "constant-ignores-warmup",
    Severity.WARNING,
    looks_for="A warm-up with the `constant` schedule, which has none.",
    why="transformers' `constant` takes no warm-up and says nothing; QLoRA's own scripts carry the same pair.",
    mend="write `constant_with_warmup`, or remove the warm-up",
    evidence=("E055", "L001"),
)
def constant_ignores_warmup(config: Config) -> Iterator[Hit]:
    given = [name for name in ("warmup_steps", "warmup_ratio") if name in config.settings and config.number(name)]
    if config.text("lr_scheduler_type") == "constant" and given:
        name = given[0]
        yield Hit(
            name=name,
            sentence=f"{config.key(name)} {shown(config.value(name))} is ignored: the schedule "
            "`constant` has no warm-up",
        )


@check(
    "WT016",
    "warmup-never-ends",
    Severity.ERROR,
    looks_for="A fixed warm-up as long as the run, or longer.",
    why="The rate never reaches the value that was set; a copied `warmup_steps: 100` does this to every short run.",
    mend="5 % of the run, at least 5 updates",
    evidence=("D007", "P008"),
    least=5,
)
def warmup_never_ends(config: Config) -> Iterator[Hit]:
    run, steps = updates(config), config.number("warmup_steps")
    if run is not None and steps is not None and steps >= run >= limit("WT016", "least"):
        yield Hit(
            name="warmup_steps",
            sentence=f"{config.key('warmup_steps')} {shown(steps)} of {run:,} updates: the rate never "
            f"reaches {shown(config.value(RATE))}",
        )


@check(
    "WT017",
    "warmup-long",
    Severity.WARNING,
    looks_for="A warm-up longer than 10 % of the run (and than 10 updates), or a share above 20 %.",
    why="B starts at zero and is a ramp of its own; beyond a few updates for Adam's "
    "averages a warm-up only takes away.",
    mend="3 to 5 % of the run, at least 5 updates",
    evidence=("D007", "P008", "E055"),
    share=0.10,
    least=10,
    ratio=0.20,
)
def warmup_long(config: Config) -> Iterator[Hit]:
    run, steps = updates(config), config.number("warmup_steps")
    if run is not None and steps is not None and 1 <= steps < run:
        if steps > run * limit("WT017", "share") and steps > limit("WT017", "least"):
            yield Hit(
                name="warmup_steps",
                sentence=f"{config.key('warmup_steps')} {shown(steps)} is {steps / run:.0%} "
                f"of the run's {run:,} updates",
            )
        return
    for name in ("warmup_ratio", "warmup_steps"):
        share = config.number(name)
        if name in config.settings and share is not None and limit("WT017", "ratio") < share < 1:
            yield Hit(name=name, sentence=f"{config.key(name)} {shown(share)}: {share:.0%} of the run is warm-up")


@check(
    "WT018",
    "no-warmup-at-high-rate",
    Severity.WARNING,
    looks_for="No warm-up with a rate in the upper part of its range.",
    why="Adam's first updates have the length of the rate whatever the gradient is; near the edge of divergence a few "
    "warm-up updates are cheap insurance.",
    mend="add 3 to 5 % of warm-up, or lower the rate",
    evidence=("D007", "E024", "P008"),
    share=0.5,
)
def no_warmup_at_high_rate(config: Config) -> Iterator[Hit]:
    band, rate = supervised_band(config), adam_rate(config)
    if not band or not rate or {"warmup_steps", "warmup_ratio"} & config.unread.keys():
        return
    if (config.number("warmup_steps") or 0) > 0 or (config.number("warmup_ratio") or 0) > 0:
        return
    if "warmup_steps" not in config.defaults and not config.given("warmup_steps") and not config.given("warmup_ratio"):
        return  # the tool chooses one
    if band.high * limit("WT018", "share") <= rate <= band.high:
        yield Hit(
            name="warmup_steps",
            sentence=f"no warm-up, and {said(config)} is in the upper half of the sound range "
            f"{span(band.low, band.high)}",
        )


@check(
    "WT019",
    "weight-decay-inert",
    Severity.NOTE,
    looks_for="Weight decay that cannot act in so few updates.",
    why="AdamW forgets over 1/(rate · decay) updates: at 2e-4 and 0.01 over 500,000. "
    "Against overfitting it does nothing "
    "in a run of thousands.",
    mend="leave it, or remove it; against overfitting use fewer epochs",
    evidence=("D008", "E059"),
)
def weight_decay_inert(config: Config) -> Iterator[Hit]:
    run, rate, decay = updates(config), adam_rate(config), config.number("weight_decay")
    if "weight_decay" not in config.settings or not decay or decay <= 0 or not run or not rate:
        return
    reach = 1 / (rate * decay)
    if reach > number("weight_decay_inert") * run:
        yield Hit(
            name="weight_decay",
            sentence=f"weight_decay {shown(decay)} acts over {reach:,.0f} updates at the rate "
            f"{shown(rate)}; the run has {run:,}",
        )
