from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from welltuned.data.mix import Mixture, epoch_order, mixture
from welltuned.data.stream import update_indices
from welltuned.errors import InputError

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=4)


@given(st.integers(1, 60), st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(0, 12))
def test_one_dataset_has_the_order_it_always_had(rows, seed, batch, step):
    assert mixture([rows], seed).update(batch, step) == update_indices(rows, seed, batch, step)


@given(SIZES, st.integers(0, 9), st.integers(1, 20))
def test_all_rows_of_all_datasets_once_an_epoch(sizes, seed, batch):
    mixed = mixture(sizes, seed)
    for epoch in range(3):
        steps = range(epoch * mixed.steps_per_epoch(batch), (epoch + 1) * mixed.steps_per_epoch(batch))
        seen = [row for step in steps for row in mixed.update(batch, step)]
        assert sorted(seen) == list(range(sum(sizes)))
        assert epoch == 0 or len(seen) < 8 or seen != [r for s in range(len(steps)) for r in mixed.update(batch, s)]


@given(st.data(), SIZES, st.integers(0, 9))
def test_counts_are_kept_exactly_and_rows_take_turns(data, sizes, seed):
    counts = data.draw(st.lists(st.integers(1, 75), min_size=len(sizes), max_size=len(sizes)))
    mixed = mixture(sizes, seed, counts=counts)
    assert mixed.epoch_rows == sum(counts)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    ever = Counter()
    for epoch in range(4):
        seen = Counter(epoch_order(mixed, epoch).tolist())
        ever += seen
        for start, have, count in zip(starts, sizes, counts, strict=True):
            mine = [seen[row] for row in range(start, start + have)]
            assert sum(mine) == count and max(mine) - min(mine) <= 1
            if count <= have:
                assert max(mine) == 1
    for start, have in zip(starts, sizes, strict=True):
        turns = [ever[row] for row in range(start, start + have)]
        assert max(turns) - min(turns) <= 1


@given(st.data(), st.lists(st.integers(1, 500), min_size=2, max_size=4), st.integers(0, 9))
def test_weights_make_the_largest_epoch_in_which_no_row_repeats(data, sizes, seed):
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    mixed = mixture(sizes, seed, weights=weights)
    assert all(0 < quota <= have for quota, have in zip(mixed.quotas, sizes, strict=True))
    assert any(quota == have for quota, have in zip(mixed.quotas, sizes, strict=True))
    scale = min(have / weight for have, weight in zip(sizes, weights, strict=True))
    assert all(abs(q - scale * w) <= 1 for q, w in zip(mixed.quotas, weights, strict=True))
    assert max(Counter(epoch_order(mixed, 1).tolist()).values()) == 1


def test_a_mixture_is_golden():
    """Frozen, like the single stream."""
    mixed = mixture([6, 3], 7, counts=[4, 4])
    assert [mixed.update(5, step) for step in range(6)] == GOLDEN


GOLDEN = [[2, 5, 4, 8, 6], [6, 1, 7], [7, 6, 0, 7, 8], [1, 5, 3], [3, 6, 8, 4, 7], [2, 0, 8]]


def test_quotas():
    assert mixture([100, 300], 0) == Mixture((100, 300), (100, 300), 0)
    assert mixture([100, 300], 0, weights=[0.5, 0.5]).quotas == (100, 100)
    assert mixture([100, 300], 0, weights=[3, 1]).quotas == (100, 33)
    assert mixture([100, 10_000], 0, weights=[1000, 1]).quotas == (100, 1)
    assert mixture([100, 300], 0, counts=[500, 1]).quotas == (500, 1)
    assert mixture([100], 0, counts=[30]).quotas == (30,)


def test_refusals():
    with pytest.raises(InputError, match="data_rows has a length of 1, and there are 2 datasets"):
        mixture([1, 2], 0, counts=[1])
    with pytest.raises(InputError, match=r"b\.jsonl: no training row of this dataset is left"):
        mixture([1, 0], 0, names=["a.jsonl", "b.jsonl"])
