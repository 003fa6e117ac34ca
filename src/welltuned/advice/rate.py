"""The learning rate of any method: the measured law where there is one, else the band of recipes, moved by this run.

Recipes of preference learning ran about 460 updates. A run of fewer gets a higher rate, within the band:

    rate = band · min(band's reach, (460 / updates)^0.5)                                          (D101; not measured)

What a run can move is alpha · rate · updates. Below a known failure of it (D102) a warning says that nothing will
happen: with preference losses the curve of such a run looks calm, not broken.
"""

from collections.abc import Mapping
from dataclasses import replace

from welltuned.advice.learning_rate import RateSetting, choose_learning_rate, two_digits
from welltuned.advice.rules import cited, number
from welltuned.advice.settle import counted, shown
from welltuned.choice import Choice
from welltuned.facts.model import ModelFacts
from welltuned.recipe import Method, Tune

MOVED_BY_UPDATES = (Method.DPO, Method.KTO, Method.ORPO)
_BY_BETA = "; beta leaves it as it is (AdamW does not see the loss's scale), but a lower one wants more updates"


def rate_setting(model: ModelFacts, choices: Mapping[str, Choice], batch: int, updates: int) -> RateSetting:
    """What the rate depends on, of a plan in the making or made."""
    adapter = {name: choices[key].value for name, key in (("r", "r"), ("alpha", "lora_alpha")) if key in choices}
    return RateSetting(
        family=model.family,
        parameters=model.parameters,
        batch=batch,
        updates=updates,
        use_rslora=choices["use_rslora"].value if "use_rslora" in choices else False,
        mixture=model.experts > 0,
        **adapter,
    )


def choose_rate(method: Method, tune: Tune, setting: RateSetting, rows: int, text: bool = False) -> Choice:
    """The rate with its range and a reason that names this run's numbers. `text`: of plain texts, not of answers."""
    band = choose_learning_rate(method, tune, setting, rows)
    if method is Method.SFT:
        return _to_keep_what_is_known(band) if text else band
    if method not in MOVED_BY_UPDATES:
        run = f"your {counted(setting.updates, 'update')} of {setting.batch} do not move that"
        return replace(band, reason=f"{band.reason}; {run}")
    short = max(1.0, number("preference_updates") / max(1, setting.updates))
    factor = min(short ** number("preference_updates_exponent"), band.high / band.value)
    beta = "" if method is Method.ORPO else _BY_BETA
    usual = f"recipes ran about {number('preference_updates'):.0f}"
    centre, _, rest = band.reason.partition("; ")
    if factor == 1:
        return replace(band, reason=f"{centre}; {usual} updates, yours are no fewer{beta}; {rest}")
    held = ", as far as their band reaches" if factor == band.high / band.value else ""
    return replace(
        band,
        value=two_digits(band.value * factor),
        reason=f"{centre}, ×{factor:.2g} for your {counted(setting.updates, 'update')}{held}; {usual}{beta}; {rest}",
        evidence=tuple(dict.fromkeys((*band.evidence, *cited("preference_updates", "preference_updates_exponent")))),
    )


def _to_keep_what_is_known(band: Choice) -> Choice:
    """Plain texts are to be learned without losing the rest; and forgetting grows with the rate."""
    factor = number("rate_text_factor")
    why = f"×{shown(factor)} for plain texts: it costs next to nothing in loss, and the model forgets less"
    evidence = tuple(dict.fromkeys((*band.evidence, *cited("rate_text_factor"))))
    low = min(band.low, two_digits(band.value * factor))
    return replace(
        band, value=two_digits(band.value * factor), low=low, reason=f"{band.reason}; {why}", evidence=evidence
    )


def movement(tune: Tune, setting: RateSetting, rate: float) -> float:
    """alpha · rate · updates, a full rate counted as the adapter's that does as much."""
    full = number("rate_full_ratio") * number("rate_alpha")
    return (full if tune is Tune.FULL else setting.alpha_equivalent) * rate * setting.updates


def moves_nothing(method: Method, tune: Tune, setting: RateSetting, rate: float, beta: float) -> str | None:
    """A sentence where preference learning is likely to end where it began, though its curves look calm."""
    if method not in (Method.DPO, Method.KTO) or beta <= 0:
        return None
    lower = max(1.0, number("preference_movement_beta") / beta)
    least = number("preference_least_movement") * lower ** number("preference_movement_exponent")
    moved = movement(tune, setting, rate)
    if moved >= least:
        return None
    ended = "a loss of ln 2, where it began" if method is Method.DPO else "the loss that it began with"
    return (
        f"{counted(setting.updates, 'update')} at a rate of {shown(rate)} will hardly move the model: alpha · rate · "
        f"updates is {shown(moved)}, and below about {shown(least)} {method} has ended with {ended}; more rows or "
        "epochs, a higher rate or smaller batches"
    )
