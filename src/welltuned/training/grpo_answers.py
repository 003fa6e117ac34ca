"""Sampled completions of an update's rows with their rewards: a rank's part, all of them, and what is made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from welltuned.models.sample import Completion
from welltuned.objectives.completions import Group
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


@dataclass(frozen=True, slots=True)
class Sampled:
    """A set of completions, what they got, and what an update needs of them.

    Attributes:
        groups: the completions that have a gradient, by prompt, of this rank's prompts.
        pulling: tokens with a gradient, of all ranks.
        tokens: of all sequences, each with its prompt, however often that is computed: as plans count them.
        old, reference: log-probabilities of a completion's tokens by its number, once they are known; sampler: those
            that another engine drew them with, none where the model itself did.
    """

    groups: tuple[Group, ...]
    advantage_S: Tensor
    weight_S: Tensor
    tokens: int
    supervised_tokens: int
    pulling: int
    origins: tuple[str, ...]
    measures: Mapping[str, float]
    notes: tuple[str, ...]
    old: dict[int, Tensor] = field(default_factory=dict)
    reference: dict[int, Tensor] = field(default_factory=dict)
    sampler: dict[int, Tensor] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


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
