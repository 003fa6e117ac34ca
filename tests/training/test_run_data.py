"""Runs on several datasets, with policies, cuts and groups: what is trained on, and what the Run tells of it."""

import json

import pytest

import welltuned
from welltuned.advice.plan import plan_from_yaml
from welltuned.errors import InputError
from welltuned.recipe import load_recipe
from welltuned.training.prepare import prepare


@pytest.fixture
def two(rows, write_rows, tmp_path):
    return [write_rows(tmp_path / "a.jsonl", rows[:60]), write_rows(tmp_path / "b.jsonl", rows[60:])]


def plan_of(path):
    return plan_from_yaml((path / "plan.yaml").read_text())


def test_two_datasets_in_counts(run, two):
    done = run(data=two, data_rows=[20, 30], max_steps=8, effective_batch_size=10)
    assert done.result.after.loss < done.result.before.loss
    assert done.updates[4]["epoch"] == 1.0
    assert done.summary["mixture"]["quotas"] == [20, 30] and done.summary["mixture"]["rows"] == [54, 18]
    plan = plan_of(done.path)
    assert [(part.rows, part.rows_of_epoch) for part in plan.facts.dataset.mixture] == [(54, 20), (18, 30)]
    assert plan.recipe == load_recipe(str(done.path / "recipe.yaml")) and plan.recipe.data == tuple(two)
    assert plan.facts.dataset.rows == 50
    assert any("20 of 54 rows of" in n and "30 of 18 rows of" in n and "(repeated)" in n for n in done.summary["notes"])


def test_the_rows_trained_on_are_the_mixtures(two, tiny_model_dir):
    """By their tokens: what an update trained on is what the mixture says, a pure function."""
    options = dict(model=str(tiny_model_dir), data=two, data_rows=[20, 30], effective_batch_size=10, seed=5)
    first, second = (prepare(load_recipe(None, options)) for _ in range(2))
    assert first.mixture == second.mixture and first.mixture.seed == 5
    for step in (0, 4, 5, 11):
        rows = first.mixture.update(10, step)
        assert rows == second.mixture.update(10, step)
        assert [first.train[i].origin for i in rows] == [second.train[i].origin for i in rows]
    epoch = [first.train[i].origin for step in range(5) for i in first.mixture.update(10, step)]
    assert sum("a.jsonl" in origin for origin in epoch) == 20


def test_the_audit_is_in_plan_and_run(run, rows, write_rows, tmp_path):
    planted = [*rows, rows[0], {"messages": [{"role": "system", "content": " "}, *rows[1]["messages"]]}]
    done = run(data=write_rows(tmp_path / "x.jsonl", planted), max_steps=2, eval_fraction=0.05)
    warnings, notes, audit = plan_of(done.path).warnings, done.summary["notes"], done.summary["audit"]
    for words in ("repeat an earlier training row exactly", "have a blank user or system turn"):
        [sentence] = [text for text in warnings if words in text]
        assert sentence in notes and sentence in [p["sentence"] for p in audit["problems"]]
    assert audit["found"]["duplicate"]["policy"] == "keep" and audit["found"]["duplicate"]["done"] == "kept"
    assert audit["found"]["duplicate"]["rows"] == 1 and audit["found"]["empty_turn"]["rows"] == 1
    assert audit["found"]["bad_row"] == {
        "policy": "error", "rows": 0, "of": 82, "done": None, "dropped": 0, "origins": [],
    }  # fmt: skip
    assert audit["speakers"]["assistant"]["trained"] == audit["supervised_tokens"] > 0
    assert sum(share["tokens"] for share in audit["speakers"].values()) == audit["tokens"]


def test_rows_left_out_make_another_plan(tiny_model_dir, data_file):
    options = dict(model=str(tiny_model_dir), data=data_file, effective_batch_size=8, num_train_epochs=1.0)
    whole = welltuned.plan(**options)
    short = welltuned.plan(**options, max_length=34, on_too_long="drop")
    left = short.facts.dataset.rows
    assert left < whole.facts.dataset.rows and short.updates == -(-left // 8) < whole.updates
    assert short.facts.dataset.length_max <= 34
    [warning] = [w for w in short.warnings if "are longer than max_length; left out (on_too_long)" in w]
    assert warning.startswith(f"{whole.facts.dataset.rows - left} of {whole.facts.dataset.rows} training rows")
    cut = welltuned.plan(**options, max_length=34)
    assert cut.facts.dataset.rows == whole.facts.dataset.rows
    assert any("longer than max_length 34 and were cut: " in w and "would cut none, for" in w for w in cut.warnings)
    with pytest.raises(InputError, match="colours.jsonl:.* the row is longer than max_length"):
        welltuned.plan(**options, max_length=34, on_too_long="error")


def test_rows_that_lose_their_answers_can_be_left_out(tiny_model_dir, rows, write_rows, tmp_path):
    longer = [{"messages": [{"role": "system", "content": "a red hat, " * 3}, *row["messages"]]} for row in rows[:20]]
    data = write_rows(tmp_path / "x.jsonl", [*longer, *rows[20:]])
    options = dict(model=str(tiny_model_dir), data=data, max_length=30)
    with pytest.raises(InputError, match="cut to max_length 30 it loses its whole answer"):
        welltuned.plan(**options)
    prepared = prepare(load_recipe(None, {**options, "on_untrained": "drop"}))
    assert 0 < len(prepared.train) < 72 and all(e.mask.any() for e in prepared.train)
    assert prepared.plan.facts.dataset.rows == len(prepared.train)
    assert prepared.audit.to_json()["found"]["untrained"]["dropped"] == 80 - len(prepared.train) - len(
        prepared.held_out
    )


def test_a_dropped_leak_is_not_trained_on(run, rows, write_rows, tmp_path):
    own = write_rows(tmp_path / "own.jsonl", rows[:5])
    done = run(eval_data=own, max_steps=2, on_leak="drop")
    assert done.summary["audit"]["rows"] == 75 and done.summary["audit"]["found"]["leak"]["dropped"] == 5
    assert any("the training rows are left out (on_leak)" in note for note in done.summary["notes"])


def test_the_second_plan_reads_the_cache(tiny_model_dir, rows, write_rows, tmp_path, monkeypatch):
    from welltuned.data import build

    monkeypatch.setattr(build, "SMALLEST_CACHED", 1)
    monkeypatch.setenv("WELLTUNED_CACHE", str(tmp_path / "cache"))
    options = dict(model=str(tiny_model_dir), data=write_rows(tmp_path / "x.jsonl", rows))
    first = welltuned.plan(**options).to_json()
    monkeypatch.setattr(build, "_built", lambda *_: pytest.fail("tokenised again"))
    second = welltuned.plan(**options).to_json()
    for plan in (first, second):
        plan["facts"].pop("machine"), plan["memory"].pop("fits")  # what is free changes
    assert json.dumps(first["facts"]) == json.dumps(second["facts"]) and first["warnings"] == second["warnings"]
