"""Conversations that begin alike are different ones: they are divided, and no leak is told of where none is."""

import numpy as np
import pytest

from welltuned.data.conversation import Kind
from welltuned.data.dataset import open_sources, read_dataset
from welltuned.data.prompts import read_prompts
from welltuned.data.stream import hold_out
from welltuned.errors import InputError
from welltuned.recipe import load_recipe

OPENING = [
    {"role": "system", "content": "You are a clerk."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello, how can I help?"},
]


def talk(question, answer="It will."):
    """A conversation with the opening that all share."""
    return {
        "messages": [*OPENING, {"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "place": question,
    }


def asked(rows):
    return {example.origin.rpartition(":")[2] for example in rows}


@pytest.fixture
def read(tokenizer, write_rows, tmp_path):
    """A function that reads training rows, and held-out rows where they are given, by a recipe."""

    def read(train, held=None, **options):
        recipe = {"model": "m", "data": str(write_rows(tmp_path / "train.jsonl", train)), "chat_template": "chatml"}
        if held is not None:
            recipe["eval_data"] = str(write_rows(tmp_path / "held.jsonl", held))
        return read_dataset(load_recipe(None, {**recipe, **options}), tokenizer)

    return read


@pytest.mark.parametrize("loss_on", ["assistant", "last"])
def test_a_shared_opening_is_no_leak(read, loss_on):
    train = [talk(f"Will it rain on day {i}?") for i in range(40)]
    held = [talk(f"Will it snow on day {i}?") for i in range(9)]
    dataset = read(train, [*held, talk("Will it rain on day 7?", "No."), train[11]], loss_on=loss_on)
    named = dict(dataset.findings[Kind.LEAK].named)
    found = {key.rpartition(":")[2]: beside.rpartition(":")[2] for key, beside in named.items()}
    assert found == {"10": "8", "11": "12"}


def test_conversations_that_begin_alike_are_split_as_others_are(read):
    rows = [talk(f"Will it rain on day {i}?") for i in range(60)]
    dataset = read([*rows, *(talk(f"Will it rain on day {i}?", "Perhaps.") for i in range(20))])
    assert (len(dataset.train), len(dataset.held_out), dataset.findings[Kind.LEAK].rows) == (72, 8, 0)
    days = [{int(n) - 1 - 60 * (int(n) > 60) for n in asked(rows)} for rows in (dataset.train, dataset.held_out)]
    assert not days[0] & days[1]  # a question and its other answer stay on one side
    [note] = [note for note in dataset.notes if "held out" in note]
    assert "80 rows begin alike, and are divided by what they are asked last" in note


def test_few_that_begin_alike_stay_together(read):
    """A conversation in several rows, each an answer longer, is one; as long as it can be held out as a whole."""
    rows = [{"messages": [{"role": "user", "content": f"case {i // 3}"}, *turns(i % 3)]} for i in range(90)]
    dataset = read(rows)
    cases = [{(int(n) - 1) // 3 for n in asked(rows)} for rows in (dataset.train, dataset.held_out)]
    assert not cases[0] & cases[1] and len(dataset.held_out) == 9


def turns(more):
    """An answer, and `more` questions with theirs."""
    said = [{"role": "assistant", "content": "first"}]
    for n in range(more):
        said += [{"role": "user", "content": f"and {n}?"}, {"role": "assistant", "content": f"then {n}"}]
    return said


def test_a_named_group_is_never_divided(read):
    rows = [{**talk(f"question {i}"), "place": "all"} for i in range(30)] + [
        {**talk(f"other {i}"), "place": f"p{i}"} for i in range(30)
    ]
    dataset = read(rows, group_by="place")
    assert not {int(n) for n in asked(dataset.held_out)} & set(range(1, 31)) and len(dataset.held_out) == 6


def test_groups_are_divided_by_dataset_only_where_they_are_too_large():
    rng = np.random.default_rng(0)
    numbers = rng.integers(1, 2**63, 400).astype(np.uint64)
    coarse = numbers.copy()
    coarse[:100] = 7  # all of the first dataset
    coarse[100:103] = 8  # few enough
    owner = np.repeat(np.array([0, 1], np.uint16), [100, 300])
    split = hold_out(coarse, 0.1, 5, owner=owner, finer=numbers)
    assert split.held_out[:100].sum() == 10 and split.held_out[100:].sum() == 30
    assert split.held_out[100:103].sum() in (0, 3) and "100 rows begin alike" in split.sentence
    same = hold_out(coarse, 0.1, 5, owner=owner)
    assert not same.held_out[:100].any() and "begin alike" not in same.sentence


def test_what_cannot_be_divided_is_not_said_to_be():
    """One prompt with many answers, and a dataset too small to spare a row."""
    prompts = np.repeat(np.array([3, 4, 5, 6], np.uint64), [40, 30, 29, 1])
    owner = np.repeat(np.array([0, 1], np.uint16), [99, 1])
    for seed in range(5):
        split = hold_out(prompts, 0.1, seed, owner=owner, finer=prompts + np.uint64(7))
        plain = hold_out(prompts, 0.1, seed, owner=owner)
        assert (split.held_out == plain.held_out).all() and split.sentence == plain.sentence


def grpo(tokenizer, write_rows, tmp_path, train, held=None, **options):
    recipe = {"model": "m", "data": str(write_rows(tmp_path / "t.jsonl", train)), "chat_template": "chatml"}
    recipe |= {"method": "grpo", "rewards": "exact_match", **options}
    if held is not None:
        recipe["eval_data"] = str(write_rows(tmp_path / "h.jsonl", held))
    recipe = load_recipe(None, recipe)
    return read_prompts(recipe, tokenizer, open_sources(recipe))


def question(text):
    return {"prompt": [*OPENING, {"role": "user", "content": text}], "answer": "yes"}


def test_prompts_with_one_opening_are_divided_and_no_leak(tokenizer, write_rows, tmp_path):
    rows = [question(f"Will it rain on day {i}?") for i in range(50)]
    found = grpo(tokenizer, write_rows, tmp_path, rows)
    assert (len(found.train), len(found.held_out), found.findings[Kind.LEAK].rows) == (45, 5, 0)
    found = grpo(tokenizer, write_rows, tmp_path, rows, [question("Will it snow?"), rows[3]])
    [(origin, beside)] = found.findings[Kind.LEAK].named
    assert origin.endswith("h.jsonl:2") and beside.endswith("t.jsonl:4") and len(found.train) == 50


def test_leaked_prompts_follow_the_policy(tokenizer, write_rows, tmp_path):
    rows = [question(f"Will it rain on day {i}?") for i in range(50)]
    held = [question("Will it snow?"), rows[3]]
    found = grpo(tokenizer, write_rows, tmp_path, rows, held, on_leak="drop")
    assert "4" not in asked(found.train) and len(found.train) == 49 and sum(found.mixture.rows) == 49
    with pytest.raises(InputError, match="h.jsonl:2: the held-out row repeats a training row or its prompt"):
        grpo(tokenizer, write_rows, tmp_path, rows, held, on_leak="error")
