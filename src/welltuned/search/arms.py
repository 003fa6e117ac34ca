"""Which arms a search begins with: settings that are tried, each with a whole plan of its own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType
from typing import Any

import yaml

from welltuned.advice.learning_rate import two_digits
from welltuned.advice.plan import Plan, make_plan
from welltuned.advice.rate import rate_setting
from welltuned.advice.settle import shown
from welltuned.choice import Choice
from welltuned.errors import InputError
from welltuned.recipe import load_recipe, recipe_to_dict
from welltuned.recipe.check import checked
from welltuned.recipe.read import YamlLoader
from welltuned.search.applied import RATE, require_searchable
from welltuned.search.curve import Prior

SEARCHED = (RATE, "r", "lora_alpha", "lora_dropout", "num_train_epochs", "effective_batch_size", "seed")
MOST_ARMS = 64
"""Arms that one bank is asked to hold."""
TRIALS, AT_ONCE = 12, 4  # of a sampler's arms
MANY = 3  # open dimensions from which on a sampler chooses
_SHARED = (  # what arms in one bank have in common, whatever they differ in
    *("max_length", "dtype", "target_modules", "packing", "max_grad_norm", "weight_decay", "adam_beta1", "adam_beta2"),
    *("loraplus_lr_ratio", "gradient_checkpointing"),
)


@dataclass(frozen=True, slots=True)
class Range:
    """A dimension of which every value between two is open."""

    name: str
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Question:
    """What is searched.

    Attributes:
        arms: how many rates are tried at the start, where the rate is searched; of a sampler's arms, how many at once.
        over: the dimensions with their values; no values means rates around the advice.
        ranges: dimensions that a sampler chooses from. trials: how many arms it may propose.
        minutes: what the search may take; None for no limit.
    """

    arms: int = 3
    over: tuple[tuple[str, tuple[Any, ...]], ...] = ((RATE, ()),)
    ranges: tuple[Range, ...] = ()
    trials: int = TRIALS
    minutes: float | None = None

    @property
    def searches_rate(self) -> bool:
        return any(name == RATE for name, _ in self.over)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all open dimensions."""
        return (*(name for name, _ in self.over), *(span.name for span in self.ranges))

    @property
    def is_sampled(self) -> bool:
        """Whether there are more arms than can all be tried: ranges, or three dimensions with many values."""
        whole = math.prod(len(values) or self.arms for _, values in self.over)
        return bool(self.ranges) or (len(self.over) >= MANY and whole > self.trials)


@dataclass(frozen=True, slots=True)
class Arm:
    """One set of values. `settings` are those that it was given, `plan` is what follows from them."""

    number: int
    settings: Mapping[str, Any]
    plan: Plan

    @property
    def x(self) -> float:
        """ln(alpha · rate), with the alpha that 1/r scaling would need to do the same."""
        return math.log(_alpha(self.plan) * self.plan.value(RATE))

    @property
    def group(self) -> str:
        """All its settings but the rate, as text; arms of one group lie on one curve."""
        return ", ".join(f"{name} {shown(value)}" for name, value in self.settings.items() if name != RATE)

    @property
    def name(self) -> str:
        """As people read it: `1.3e-3, r 16`."""
        return ", ".join(part for part in (shown(float(self.plan.value(RATE))), self.group) if part)


def question_of(
    arms: int | None, over: Sequence[str], trials: int | None = None, minutes: float | None = None
) -> Question:
    """The question of `--arms N --over NAME=VALUE,VALUE --over NAME=LOW..HIGH --over NAME`.

    Raises:
        InputError: an unknown dimension, too few arms, a value twice, a limit that makes no sense.
    """
    if arms is not None and not 2 <= arms <= MOST_ARMS:
        raise InputError(f"a search compares 2 to {MOST_ARMS} arms, not {arms}", where="--arms")
    if minutes is not None and not 0 < minutes < math.inf:
        raise InputError(f"{minutes:g} minutes are no time", where="--minutes", mend="give a number above 0")
    found: dict[str, tuple[Any, ...]] = {}
    ranges: dict[str, Range] = {}
    for text in over:
        name, _, values = text.partition("=")
        name = name.strip()
        if name not in SEARCHED:
            raise InputError(f"{name!r} is nothing that arms can differ in", where="--over", mend=_known())
        if name in found or name in ranges:
            raise InputError(f"{name} is given twice", where="--over", mend="give all of its values at once")
        if ".." in values:
            ranges[name] = _range(name, values)
        else:
            found[name] = _values(name, values)
    if not found and not ranges:
        found = {RATE: ()}
    most = TRIALS if trials is None else trials
    question = Question(arms or 3, tuple(found.items()), tuple(ranges.values()), most, minutes)
    if question.is_sampled:
        question = replace(question, arms=arms or AT_ONCE)
        if not question.arms <= question.trials <= MOST_ARMS:
            what = f"{question.arms} arms at once do not go into {question.trials} trials"
            raise InputError(what, where="--trials", mend=f"give {question.arms} to {MOST_ARMS} trials")
    elif trials is not None:
        what = "all values are tried, and nothing is left to be chosen from"
        raise InputError(what, where="--trials", mend="remove it, or open a range such as --over r=8..64")
    return question


def _values(name: str, text: str) -> tuple[Any, ...]:
    read = (yaml.load(v, Loader=YamlLoader) for v in text.split(",") if v.strip())
    values = tuple(checked(name, v, f"--over {name}") for v in read)
    if not values and name != RATE:
        raise InputError(f"{name} has no values", where="--over", mend=f"such as --over {name}=8,32")
    if len(set(values)) < len(values):
        raise InputError(f"{name} names a value twice", where="--over")
    return values


def _range(name: str, text: str) -> Range:
    ends = [part.strip() for part in text.split("..")]
    low, high = (_values(name, end) for end in ends) if len(ends) == 2 else ((), ())
    if len(low) != 1 or len(high) != 1 or not low[0] < high[0]:
        raise InputError(f"{text} is no range", where=f"--over {name}", mend=f"such as --over {name}=8..64")
    if name == "seed":
        raise InputError("of seeds every one is as good as another", where="--over seed", mend="list them: seed=1,2,3")
    return Range(name, low[0], high[0])


def _known() -> str:
    return f"they can differ in {', '.join(SEARCHED)}"


def factors(arms: int) -> list[float]:
    """By what the advised rate is multiplied: evenly from a half to double, with guards at 1/4 and 4 from five arms on.

    >>> [round(f, 2) for f in factors(3)], [round(f, 2) for f in factors(5)], [round(f, 2) for f in factors(2)]
    ([0.5, 1.0, 2.0], [0.25, 0.5, 1.0, 2.0, 4.0], [0.71, 1.41])
    """
    if arms == 2:
        return [2**-0.5, 2**0.5]
    inner = arms - 2 if arms >= 5 else arms
    between = [2.0 ** (-1 + 2 * i / (inner - 1)) for i in range(inner)]
    return [0.25, *between, 4.0] if arms >= 5 else between


def first_arms(base: Plan, question: Question) -> tuple[Arm, ...]:
    """The arms that the search begins with.

    Raises:
        InputError: settings that a run would refuse, or more arms than one bank takes.
    """
    require_searchable(base)
    others = [(name, values) for name, values in question.over if name != RATE]
    made: list[dict[str, Any]] = []
    for values in product(*(v for _, v in others)):
        settings = dict(zip((name for name, _ in others), values, strict=True))
        made += _with_rates(base, question, settings)
    if not 2 <= len(made) <= MOST_ARMS:
        what = f"the values make {len(made)} arms, and a search compares 2 to {MOST_ARMS}"
        raise InputError(what, where="--over", mend="give fewer values, or more than one")
    arms = tuple(arm_of(base, number, settings) for number, settings in enumerate(made))
    return arms


def _with_rates(base: Plan, question: Question, settings: dict[str, Any]) -> list[dict[str, Any]]:
    if not question.searches_rate:
        return [settings]
    given = next(values for name, values in question.over if name == RATE)
    if given:
        return [{**settings, RATE: rate} for rate in given]
    centre = arm_of(base, 0, settings).plan.value(RATE) if settings else base.value(RATE)
    return [{**settings, RATE: two_digits(centre * f)} for f in factors(question.arms)]


def arm_of(base: Plan, number: int, settings: Mapping[str, Any]) -> Arm:
    """The arm with these settings: the recipe with them, planned anew on the same facts."""
    wanted = {**recipe_to_dict(base.recipe), **settings}
    recipe = replace(load_recipe(None, wanted), tune_given=True, policies=base.recipe.policies)
    facts = base.facts
    plan = make_plan(recipe, facts.model, facts.dataset, facts.machine, None, facts.adapter)
    for name in _SHARED:
        if name in base.choices and plan.value(name) != base.value(name):
            what = f"with {_words(settings)} the plan has another {name} ({shown(plan.value(name))})"
            raise InputError(what, where="--over", mend=f"set {name} yourself, so that arms can be compared")
    known = {name: recipe.hyperparameters[name] for name in settings}
    return Arm(number, MappingProxyType(known), plan)


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {shown(value)}" for name, value in settings.items())


def _alpha(plan: Plan) -> float:
    return rate_setting(
        plan.facts.model, plan.choices, plan.value("effective_batch_size"), plan.updates
    ).alpha_equivalent


def prior_of(arm: Arm, centre: float) -> Prior:
    """What the advice knows of the arm's group: `centre` is the rate that it would have given there."""
    choice: Choice = arm.plan.choices[RATE]
    doubt = math.log(choice.high / choice.low) / 2 if choice.low and choice.high else math.log(2.0)
    return Prior(math.log(_alpha(arm.plan) * centre), max(doubt, math.log(1.3)))
