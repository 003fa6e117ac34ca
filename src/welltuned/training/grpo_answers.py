"""Sampled completions of an update's rows with their rewards, as each rank has a part of them and as all know them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from welltuned.models.sample import Completion
from welltuned.objectives.rewards import Fault, Scores


@dataclass(frozen=True, slots=True)
class Answered:
    """Completions of rows, and their rewards in the same order.

    Attributes:
        rows: numbers of the rows that this rank sampled for, ascending.
        made: of each row, those of its names.
        seconds: what sampling and rewarding took here.
    """

    rows: tuple[int, ...]
    made: Sequence[Sequence[Completion]]
    scores: Scores
    seconds: Mapping[str, float]


def together(parts: Sequence[Answered], mine: Sequence[int]) -> Answered:
    """The parts of all ranks as one, in the rows' order; `rows` are `mine`, and `seconds` those of the slowest."""
    made: dict[int, Sequence[Completion]] = {}
    total: dict[int, Sequence[float]] = {}
    each: dict[str, dict[int, Sequence[float]]] = {name: {} for name in parts[0].scores.each}
    faults: list[Fault] = []
    for part in parts:
        start = 0
        for row, group in zip(part.rows, part.made, strict=True):
            end = start + len(group)
            made[row], total[row] = group, part.scores.total[start:end]
            for name, values in part.scores.each.items():
                each[name][row] = values[start:end]
            start = end
        faults += part.scores.faults
    scores = Scores(_flat(total), {name: _flat(values) for name, values in each.items()}, tuple(faults))
    seconds = {name: max(part.seconds[name] for part in parts) for name in parts[0].seconds}
    return Answered(tuple(mine), [made[row] for row in sorted(made)], scores, seconds)


def _flat(values: Mapping[int, Sequence[float]]) -> tuple[float, ...]:
    return tuple(value for row in sorted(values) for value in values[row])
