"""Where in an example what lies: its trained tokens, and the two sequences of a pair. For the records of a store."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from welltuned.data.render import Example


def ends(examples: Sequence[Example], trained: Sequence[NDArray[np.int64]]) -> tuple[list[int], list[int]]:
    """Positions of the first and the last trained token of each row, -1 for none, in their sequences."""
    found = []
    for example, at in zip(examples, trained, strict=True):
        places = at if example.fork is None else example.fork.positions(len(example.ids))[at]
        found.append((int(places.min()), int(places.max())) if len(places) else (-1, -1))
    return [first for first, _ in found], [last for _, last in found]


def last_answer(example: Example, trained: NDArray[np.int64]) -> int:
    """Where the last run of trained tokens begins, of a pair the first one: what stands before it was asked.

    Conversations may share their opening, a greeting say, and be different; those that ask the same last are not.
    0 where nothing is trained.
    """
    if not len(trained):
        return 0
    breaks = np.flatnonzero(np.diff(trained) != 1)
    return int(trained[0] if example.fork is not None or not len(breaks) else trained[breaks[-1] + 1])


def forks(examples: Sequence[Example], firsts: Sequence[int]) -> Iterator[list[int]]:
    """The fields shared, second, longest and needed of each row, a list for each field."""
    rows = []
    for example, first in zip(examples, firsts, strict=True):
        n = len(example.ids)
        if example.fork is None:
            rows.append((n, n, n, first + 1))
            continue
        shared, second = example.fork
        own = [slice(shared, second), slice(second, n)]
        both = [example.ids[at] for at in own]
        least = min(map(len, both))
        differs = np.flatnonzero(both[0][:least] != both[1][:least])
        needed = int(differs[0]) if len(differs) else least
        needed = max(needed, *(int(example.mask[at].argmax()) for at in own))
        rows.append((shared, second, shared + max(map(len, both)), shared + needed + 1))
    yield from map(list, zip(*rows, strict=True))
