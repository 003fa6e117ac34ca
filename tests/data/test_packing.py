import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from welltuned.data.packing import pack

lengths_lists = st.lists(st.integers(1, 300), max_size=200)


@given(lengths_lists, st.integers(1, 256))
def test_every_example_once_and_no_bin_over_budget(lengths, budget):
    bins = pack(lengths, budget)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    for indices in bins:
        assert sum(lengths[i] for i in indices) <= budget or len(indices) == 1


@given(lengths_lists, st.integers(1, 256))
def test_no_two_bins_could_be_one(lengths, budget):
    loads = sorted(sum(lengths[i] for i in b) for b in pack(lengths, budget))
    assert all(a + b > budget for a, b in zip(loads, loads[1:], strict=False))


@given(lengths_lists, st.integers(1, 256))
def test_same_as_plain_best_fit_decreasing(lengths, budget):
    """As many bins, equally full, as the definition gives when every open bin is looked at."""
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [f for f in free if f >= length]
        if fitting:
            free.remove(min(fitting))
        free.append((min(fitting) if fitting else budget) - length)
    assert sorted(budget - sum(lengths[i] for i in b) for b in pack(lengths, budget)) == sorted(free)


def test_deterministic_golden():
    assert pack([5, 3, 9, 2, 2, 7, 12], 10) == [[6], [2], [5, 1], [0, 3, 4]]
    assert pack([], 10) == []


def test_gsm8k_like_lengths_fill_more_than_97_percent_fast():
    lengths = np.random.default_rng(0).lognormal(5.3, 0.35, 50_000).astype(int).clip(60, 600).tolist()
    bins = pack(lengths, 2048)
    assert sum(lengths) / (2048 * len(bins)) > 0.97


@pytest.mark.parametrize(("lengths", "budget"), [([0], 4), ([3, -1], 4), ([1], 0)])
def test_nonsense_is_refused(lengths, budget):
    with pytest.raises(ValueError):
        pack(lengths, budget)
