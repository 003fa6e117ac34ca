"""Preference pairs as examples: one row that forks, and its two sequences apart again."""

from dataclasses import replace

import numpy as np

from welltuned.data.conversation import Kind
from welltuned.data.fork import Fork
from welltuned.data.render import Example


def joined(chosen: Example, rejected: Example) -> Example:
    """One row of both. What they share is the prompt: it ends before the first token that is trained in either."""
    firsts = [int(e.mask.argmax()) if e.mask.any() else len(e.ids) - 1 for e in (chosen, rejected)]
    most = min(*firsts, len(chosen.ids) - 1, len(rejected.ids) - 1)
    differs = np.flatnonzero(chosen.ids[:most] != rejected.ids[:most])
    shared = int(differs[0]) if len(differs) else most
    found = set(chosen.found | rejected.found)
    if shared < most:
        found.add(Kind.PROMPT_DIFFERS)
    if len(chosen.ids) == len(rejected.ids) and bool((chosen.ids == rejected.ids).all()):
        found.add(Kind.EQUAL_PAIR)
    both = [np.concatenate([a, b[shared:]]) for a, b in ((chosen.ids, rejected.ids), (chosen.mask, rejected.mask))]
    roles = None
    if chosen.roles is not None and rejected.roles is not None:
        roles = np.concatenate([chosen.roles, rejected.roles[shared:]])
    fork = Fork(shared, len(chosen.ids))
    return replace(chosen, ids=both[0], mask=both[1], roles=roles, found=frozenset(found), fork=fork)


def sequences(example: Example) -> tuple[Example, ...]:
    """The chosen and the rejected sequence of a pair, each whole; an example that is no pair is its only one."""
    if example.fork is None:
        return (example,)
    shared, second = example.fork
    rejected = np.concatenate([np.arange(shared), np.arange(second, len(example.ids))])
    return tuple(
        replace(
            example,
            ids=example.ids[index],
            mask=example.mask[index],
            roles=None if example.roles is None else example.roles[index],
            fork=None,
        )
        for index in (np.arange(second), rejected)
    )


def mismatched(asked: Example, answering: Example, max_length: int | None = None) -> Example:
    """The prompt of one row with the answer to another: what KTO estimates its reference point with."""
    ends = [int(e.mask.argmax()) for e in (asked, answering)]
    ids = np.concatenate([asked.ids[: ends[0]], answering.ids[ends[1] :]])[:max_length]
    mask = np.concatenate([asked.mask[: ends[0]], answering.mask[ends[1] :]])[:max_length]
    return Example(ids, mask, f"{asked.origin} with the answer of {answering.origin}")
