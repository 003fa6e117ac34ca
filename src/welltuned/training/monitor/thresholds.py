"""The monitor's numbers, each with its evidence (thresholds.yaml)."""

from functools import cache
from types import MappingProxyType

from welltuned.advice.rules import Rule, read_rules


@cache
def thresholds() -> MappingProxyType[str, Rule]:
    return read_rules("welltuned.training.monitor", "thresholds.yaml")


def limit(name: str) -> float:
    """A threshold by name."""
    return float(thresholds()[name].value)


def share_of_run(name: str, total: int) -> int:
    """A share of the run's updates, within the threshold's own bounds where it has any."""
    found = thresholds()[name]
    count = round(found.value * total)
    return max(found.low or 1, min(count, found.high if found.high is not None else count))
