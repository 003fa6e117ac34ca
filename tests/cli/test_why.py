import json

import pytest

from welltuned.advice.why import entries


@pytest.fixture
def asked(tiny_model_dir, data_file):
    return ["--model", tiny_model_dir, "--data", data_file]


def test_without_a_key_every_key_has_a_line(welltuned):
    said = welltuned("why")
    assert said.code == 0 and said.out == ""
    for key, found in entries().items():
        assert key in said.err and len(found) >= 1
    document = json.loads(welltuned("why", "--json").out)
    assert [found["key"] for found in document["keys"]] == list(entries())


def test_a_rule_with_rows_for_and_against(welltuned):
    said = welltuned("why", "learning_rate")
    assert said.code == 0 and said.out == ""
    for words in ("Rule", "E021 derived", "Against", "units, batch", "times below that range", "they agree", "sweep"):
        assert words in said.err, words
    assert "135M" in said.err and "LoRA 40" in said.err and "full 1,000" in said.err
    assert "there is no law" in said.err  # the other methods in a line each


def test_one_method(welltuned):
    said = welltuned("why", "learning_rate", "--method", "dpo", "--tune", "lora")
    assert said.code == 0 and "ln 2" in said.err and "LoRA 40" not in said.err
    full = welltuned("why", "learning_rate", "--tune", "full")
    assert "No open sweep" in " ".join(full.err.split()) and "E120" in full.err
    assert "Recipes and vendors only" not in full.err


def test_here(welltuned, asked):
    said = welltuned("why", "learning_rate", *asked)
    assert said.code == 0 and "Here" in said.err and "updates instead of 780" in said.err
    mine = welltuned("why", "r", *asked, "--set", "r=4")
    assert "set by you" in mine.err


def test_json_is_one_document(welltuned, asked):
    said = welltuned("why", "learning_rate", *asked, "--json")
    document = json.loads(said.out)
    assert said.code == 0 and document["key"] == "learning_rate" and len(document["rules"]) == 1
    assert document["here"]["low"] <= document["here"]["value"] <= document["here"]["high"]
    every = json.loads(welltuned("why", "learning_rate", "--json").out)
    assert len(every["rules"]) == len(entries()["learning_rate"]) and every["here"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["lerning_rate"], "did you mean 'learning_rate'"),
        (["beta", "--method", "sft"], "it belongs to dpo"),
        (["learning_rate", "--set", "r=4"], "add --model and --data"),
        (["learning_rate", "--model", "/nowhere"], "data"),
    ],
)
def test_wrong_input(welltuned, options, words):
    said = welltuned("why", *options)
    assert said.code == 2 and len(said.complaints) == 1 and words in said.complaints[0] and said.out == ""
