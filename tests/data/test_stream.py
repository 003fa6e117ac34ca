import pytest
from hypothesis import given
from hypothesis import strategies as st

from welltuned.data.conversation import Conversation, Message
from welltuned.data.stream import split_held_out, steps_per_epoch, steps_per_run, update_indices


def rows(prompts):
    return [
        Conversation((Message("user", str(p)), Message("assistant", f"answer {i}")), f"x.jsonl:{i + 1}")
        for i, p in enumerate(prompts)
    ]


@given(st.integers(1, 60), st.integers(0, 2**32), st.integers(1, 70), st.integers(0, 4))
def test_each_epoch_is_a_permutation_cut_into_batches(count, seed, batch, epoch):
    steps = steps_per_epoch(count, batch)
    updates = [update_indices(count, seed, batch, epoch * steps + s) for s in range(steps)]
    assert sorted(i for u in updates for i in u) == list(range(count))
    assert all(len(u) == batch for u in updates[:-1])
    assert 1 <= len(updates[-1]) <= batch


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


@pytest.mark.parametrize(("count", "held"), [(2, 1), (10, 1), (100, 10), (999, 100), (1000, 50), (7473, 374)])
def test_default_fractions(count, held):
    split = split_held_out(rows(range(count)))
    assert len(split.held_out) == held
    assert sorted(split.train + split.held_out) == list(range(count))
    assert str(held) in split.sentence


def test_default_is_capped_and_says_so_and_a_users_fraction_is_not():
    many = rows(range(12_000))
    assert len(split_held_out(many).held_out) == 512
    assert "capped at 512" in split_held_out(many).sentence
    assert len(split_held_out(many, 0.1).held_out) == 1200


def test_nothing_is_held_out_when_asked_or_impossible():
    assert split_held_out(rows(range(5)), 0.0).held_out == ()
    assert split_held_out(rows([1])).held_out == ()
    assert "only one row" in split_held_out(rows([1])).sentence
    with pytest.raises(ValueError):
        split_held_out(rows([1, 2]), 1.0)


def test_same_seed_same_split():
    data = rows(range(300))
    assert split_held_out(data, seed=3) == split_held_out(data, seed=3)
    assert split_held_out(data, seed=3) != split_held_out(data, seed=4)


@given(st.lists(st.integers(0, 12), min_size=2, max_size=80), st.integers(0, 99))
def test_no_prompt_on_both_sides_unless_said(prompts, seed):
    split = split_held_out(rows(prompts), seed=seed)
    assert split.held_out
    assert split.train
    shared = {prompts[i] for i in split.train} & {prompts[i] for i in split.held_out}
    assert not shared or "one prompt" in split.sentence


def test_one_prompt_for_all_rows_falls_back_to_rows():
    split = split_held_out(rows(["same"] * 50))
    assert len(split.held_out) == 5
    assert "most rows share one prompt" in split.sentence
