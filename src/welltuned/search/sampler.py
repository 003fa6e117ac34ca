"""Arms that Optuna proposes, where more dimensions are open than all values of which could be tried.

Every proposal is a function of the seed and of what earlier arms came to, so that nothing but those must be saved for
a search to go on as it would have.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from welltuned.advice.learning_rate import two_digits
from welltuned.advice.plan import Plan
from welltuned.errors import InputError
from welltuned.search.applied import RATE, require_searchable
from welltuned.search.arms import Arm, Question, Range, arm_of, first_arms

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

AROUND = 4.0  # a rate without values lies between the advice divided and multiplied by this
DRAWN_AGAIN = 50  # times, where a proposal has been tried before
_DOUBLED = ("r", "effective_batch_size")  # ranges of these hold doublings of their lower end
_LOG = (RATE, "lora_alpha")


@dataclass(frozen=True, slots=True)
class Dimension:
    """What one setting may be: `levels`, in order; or, where there are none, anything between two numbers."""

    name: str
    levels: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0

    def distribution(self) -> "BaseDistribution":
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.levels:
            return IntDistribution(0, len(self.levels) - 1)
        return FloatDistribution(self.low, self.high, log=self.name in _LOG)

    def value(self, parameter: float) -> Any:
        """The setting that a sampler's number means; two digits, so that people can read it."""
        if self.levels:
            return self.levels[int(parameter)]
        return min(max(two_digits(parameter), self.low), self.high) if parameter else 0.0

    def parameter(self, value: Any) -> float:
        """The sampler's number of a setting, or of the nearest that the dimension has."""
        if self.levels:
            return min(range(len(self.levels)), key=lambda i: abs(self.levels[i] - value))
        return min(max(float(value), self.low), self.high)


@dataclass(frozen=True, slots=True)
class OptunaSampler:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), multivariate (Falkner et al. 2018).

    Attributes:
        start: settings of the first arm: the advice's own, or what is nearest to them.
    """

    dimensions: tuple[Dimension, ...]
    start: Mapping[str, Any]
    seed: int
    trials: int
    batch: int

    def ask(self, told: Sequence[tuple[Mapping[str, Any], float | None]], count: int) -> list[dict[str, Any]]:
        """Settings of the next arms, which none has had before; fewer where no more are found.

        Args:
            told: settings of every arm so far with its loss; None where it diverged.
        """
        seen = [dict(settings) for settings, _ in told]
        found: list[dict[str, Any]] = []
        if not told:
            found.append(dict(self.start))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that some of this is experimental there
            study = self._study(told)
            distributions = {d.name: d.distribution() for d in self.dimensions}
            for _ in range(count + DRAWN_AGAIN):
                if len(found) >= count:
                    break
                trial = study.ask(distributions)
                settings = {d.name: d.value(trial.params[d.name]) for d in self.dimensions}
                if settings not in seen and settings not in found:
                    found.append(settings)
        return found

    def _study(self, told: Sequence[tuple[Mapping[str, Any], float | None]]) -> "Study":
        import optuna
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState, create_trial

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = TPESampler(
            seed=self.seed * 1_009 + len(told), multivariate=True, constant_liar=True, n_startup_trials=self.batch
        )
        study = optuna.create_study(sampler=sampler)
        for settings, loss in told:
            study.add_trial(
                create_trial(
                    params={d.name: d.parameter(settings[d.name]) for d in self.dimensions},
                    distributions={d.name: d.distribution() for d in self.dimensions},
                    value=loss,
                    state=TrialState.COMPLETE if loss is not None else TrialState.PRUNED,  # pruned: worse than all
                )
            )
        return study


def starting(base: Plan, question: Question) -> tuple[tuple[Arm, ...], OptunaSampler | None]:
    """The arms that a search begins with, and who proposes the others; None where these are all.

    Raises:
        InputError: settings that a run would refuse, or Optuna is needed and not installed.
    """
    if not question.is_sampled:
        return first_arms(base, question), None
    require_searchable(base)
    if find_spec("optuna") is None:
        what = "Optuna, which chooses among so many arms, is not installed"
        raise InputError(what, where="--over", mend="pip install 'welltuned[search]', or open fewer dimensions")
    sampler = _sampler_of(base, question)
    asked = sampler.ask([], sampler.batch)
    if len(asked) < 2:
        raise InputError("there is only one arm in what is open", where="--over", mend="open more")
    return tuple(arm_of(base, number, settings) for number, settings in enumerate(asked)), sampler


def _sampler_of(base: Plan, question: Question) -> OptunaSampler:
    dimensions = [_listed(base, name, values) for name, values in question.over]
    dimensions += [_between(span) for span in question.ranges]
    start = {d.name: d.value(d.parameter(base.value(d.name))) for d in dimensions}
    return OptunaSampler(tuple(dimensions), start, base.value("seed"), question.trials, question.arms)


def _listed(base: Plan, name: str, values: tuple[Any, ...]) -> Dimension:
    if values:
        return Dimension(name, tuple(sorted(values)))
    centre = base.value(RATE)
    return Dimension(name, (), two_digits(centre / AROUND), two_digits(centre * AROUND))


def _between(span: Range) -> Dimension:
    if span.name not in _DOUBLED:
        if span.name in _LOG and not span.low > 0:
            raise InputError(f"{span.low:g} is no end of a range of {span.name}", where="--over", mend="begin above 0")
        return Dimension(span.name, (), span.low, span.high)
    count = math.floor(math.log2(span.high / span.low) + 1e-9)
    doublings = [int(span.low) * 2**k for k in range(count + 1)]
    return Dimension(span.name, tuple(doublings))


def largest_rank(base: Plan, question: Question, arms: Sequence[Arm]) -> Plan | None:
    """The plan of an arm with the largest rank that may be proposed, where no arm has it yet."""
    if "r" not in question.names or not question.is_sampled:
        return None
    most = max(_sampler_of(base, question).dimensions[question.names.index("r")].levels)
    if any(arm.plan.value("r") >= most for arm in arms):
        return None
    return arm_of(base, 0, {**arms[0].settings, "r": most}).plan
