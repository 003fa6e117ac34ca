import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from welltuned.data.stream import (
    _permutation,
    balanced_shares,
    hold_out,
    position_of,
    steps_per_epoch,
    steps_per_run,
    update_indices,
)


def groups(prompts):
    """A number for each row: the same for the same prompt, in no order."""
    return np.array([hash(str(p)) & (2**64 - 1) for p in prompts], np.uint64)


def held(split):
    return np.flatnonzero(split.held_out).tolist()


@given(st.integers(1, 60), st.integers(0, 2**32), st.integers(1, 70), st.integers(0, 4))
def test_each_epoch_is_a_permutation_cut_into_batches(count, seed, batch, epoch):
    steps = steps_per_epoch(count, batch)
    updates = [update_indices(count, seed, batch, epoch * steps + s) for s in range(steps)]
    assert sorted(i for u in updates for i in u) == list(range(count))
    assert all(len(u) == batch for u in updates[:-1])
    assert 1 <= len(updates[-1]) <= batch
    assert [position_of(count, batch, epoch * steps + s) for s in range(steps)] == [
        (epoch, s * batch) for s in range(steps)
    ]


def test_the_stream_is_golden():
    """Frozen: a run resumed under another version of numpy must see the same rows."""
    assert [update_indices(10, 7, 4, step) for step in range(6)] == GOLDEN


GOLDEN = [[1, 3, 2, 7], [8, 4, 5, 9], [0, 6], [8, 6, 4, 0], [5, 7, 1, 3], [9, 2]]


def test_epochs_and_seeds_differ():
    first, second = update_indices(100, 1, 100, 0), update_indices(100, 1, 100, 1)
    assert first != second
    assert first != update_indices(100, 2, 100, 0)


def test_steps_per_run():
    assert steps_per_run(10, 4, 1) == 3
    assert steps_per_run(10, 4, 3) == 9
    assert steps_per_run(7473, 16, 0.5) == 234
    assert steps_per_run(3, 8, 0.1) == 1
    assert steps_per_run(100, 10, 0.3) == 3


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 9))
def test_ranks_share_an_update_by_tokens(tokens, world):
    """Every row once; and no share is longer than the mean by more than one row, the longest."""
    shares = balanced_shares(tokens, world)
    assert sorted(i for share in shares for i in share) == list(range(len(tokens)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(tokens[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(tokens, default=0)


# ── held-out rows ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("count", "expected"), [(2, 1), (10, 1), (100, 10), (999, 100), (1000, 50), (7473, 374)])
def test_default_fractions(count, expected):
    split = hold_out(groups(range(count)))
    assert len(held(split)) == expected
    assert str(expected) in split.sentence


def test_default_is_capped_and_says_so_and_a_users_fraction_is_not():
    many = groups(range(12_000))
    assert len(held(hold_out(many))) == 512
    assert "capped at 512" in hold_out(many).sentence
    assert len(held(hold_out(many, 0.1))) == 1200


def test_nothing_is_held_out_when_asked_or_impossible():
    assert held(hold_out(groups(range(5)), 0.0)) == []
    assert held(hold_out(groups([1]))) == []
    assert "only one row" in hold_out(groups([1])).sentence
    assert "there are no rows" in hold_out(groups([])).sentence
    with pytest.raises(ValueError):
        hold_out(groups([1, 2]), 1.0)


def test_same_seed_same_split():
    data = groups(range(300))
    assert held(hold_out(data, seed=3)) == held(hold_out(data, seed=3))
    assert held(hold_out(data, seed=3)) != held(hold_out(data, seed=4))


@given(st.lists(st.integers(0, 12), min_size=2, max_size=80), st.integers(0, 99))
def test_no_prompt_on_both_sides_unless_said(prompts, seed):
    split = hold_out(groups(prompts), seed=seed)
    assert 0 < split.held_out.sum() < len(prompts)
    of = np.array(prompts)
    shared = set(of[split.held_out].tolist()) & set(of[~split.held_out].tolist())
    assert not shared or "one prompt" in split.sentence


def test_one_prompt_for_all_rows_falls_back_to_rows():
    split = hold_out(groups(["same"] * 50))
    assert len(held(split)) == 5
    assert "most rows share one prompt" in split.sentence
    assert "most rows share the same `customer`" in hold_out(groups(["x"] * 50), shared="the same `customer`").sentence


def reference(prompts, target, seed):
    """The split as it was first written: whole groups, in order of first appearance, tried in random order."""
    rows_of = {}
    for index, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(index)
    every = list(rows_of.values())
    chosen = []
    for index in _permutation(len(every), seed, 0).tolist():
        if len(chosen) + len(every[index]) <= target:
            chosen += every[index]
    smallest = min(every, key=len)
    if not chosen and 2 * len(smallest) <= len(prompts):
        chosen = list(smallest)
    return sorted(chosen) or sorted(_permutation(len(prompts), seed, 0)[:target].tolist())


@given(st.lists(st.integers(0, 30), min_size=2, max_size=120), st.integers(0, 9), st.floats(0.02, 0.9))
def test_the_same_rows_as_ever(prompts, seed, fraction):
    target = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    assert held(hold_out(groups(prompts), fraction, seed)) == reference(prompts, target, seed)


@given(
    st.lists(st.lists(st.integers(0, 99), min_size=20, max_size=90), min_size=2, max_size=4),
    st.integers(0, 9),
)
def test_each_dataset_gives_its_share(datasets, seed):
    """Datasets whose groups are single rows: each is off its exact share by less than a row, or gives the one."""
    names = [[(d, i) for i in range(len(rows))] for d, rows in enumerate(datasets)]
    owner = np.repeat(np.arange(len(datasets)), [len(rows) for rows in datasets])
    split = hold_out(groups([name for rows in names for name in rows]), 0.2, seed, owner=owner)
    given = np.bincount(owner[split.held_out], minlength=len(datasets))
    exact = np.array([0.2 * len(rows) for rows in datasets])
    assert (abs(given - exact) < 1.5).all() and split.held_out.sum() == round(0.2 * len(owner))


def test_small_datasets_are_held_out_of_too_and_single_rows_are_not():
    owner = np.repeat(np.arange(3, dtype=np.uint16), [900, 5, 1])
    split = hold_out(groups(range(906)), owner=owner)
    assert np.bincount(owner[split.held_out], minlength=3).tolist() == [90, 1, 0]


def test_a_prompt_in_two_datasets_stays_on_one_side():
    prompts = [*range(100), *range(50, 150)]
    owner = np.repeat([0, 1], 100)
    split = hold_out(groups(prompts), seed=1, owner=owner)
    of = np.array(prompts)
    assert not set(of[split.held_out].tolist()) & set(of[~split.held_out].tolist())
    assert "rows that share a prompt stay on one side" in split.sentence
