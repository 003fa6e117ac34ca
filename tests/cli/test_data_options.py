"""The options about data: several datasets, columns by other names, policies; and what the plan says of them."""

import io
import json
import sys
from types import SimpleNamespace

import pytest


@pytest.fixture
def files(rows, write_rows, tmp_path):
    return [write_rows(tmp_path / "a.jsonl", rows[:50]), write_rows(tmp_path / "b.jsonl", rows[50:])]


def test_data_several_times(welltuned, tiny_model_dir, files):
    given = ("plan", "--model", tiny_model_dir, "--data", files[0], "--data", files[1], "--set", "data_weights=3,1")
    said = welltuned(*given, "--json")
    assert said.code == 0 and said.err == ""
    [first, second] = json.loads(said.out)["facts"]["dataset"]["mixture"]
    assert (first["rows"], first["rows_of_epoch"], second["rows_of_epoch"]) == (45, 45, 15)
    assert first["share"] + second["share"] == pytest.approx(1, abs=1e-3) and first["name"] == files[0]
    said = welltuned(*given)
    text = " ".join(said.err.split())
    assert "an epoch: 45 of 45 rows, " in text and "an epoch: 15 of 27 rows, " in text


def test_columns_by_other_names(welltuned, tiny_model_dir, write_rows, tmp_path):
    rows = [{"Frage": f"{i} hats", "Antwort": "hat:red"} for i in range(30)]
    path = write_rows(tmp_path / "x.jsonl", rows)
    said = welltuned("plan", "--model", tiny_model_dir, "--data", path)
    assert said.code == 2 and "no format is known" in said.err and "--map" in said.err
    said = welltuned("plan", "--model", tiny_model_dir, "--data", path, "--map", "prompt=Frage", "--map",
                     "completion=Antwort")  # fmt: skip
    assert said.code == 0 and "prompt from `Frage`" in " ".join(said.err.split())


def test_stdin(welltuned, tiny_model_dir, rows, monkeypatch):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text), isatty=lambda: False))
    said = welltuned("plan", "--model", tiny_model_dir, "--data", "-", "--json")
    assert said.code == 0 and json.loads(said.out)["facts"]["dataset"]["rows"] == 72


def test_warnings_of_the_audit_are_in_the_json_and_said_once(welltuned, tiny_model_dir, rows, write_rows, tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [*rows, *rows[:9]])
    given = ("--model", tiny_model_dir, "--data", path)
    plan = json.loads(welltuned("plan", *given, "--json").out)
    assert any("repeat an earlier training row exactly" in warning for warning in plan["warnings"])
    for command in (("plan",), ("train", "--out", tmp_path / "out", "--set", "max_steps=2")):
        said = welltuned(*command, *given)
        assert said.code == 0 and " ".join(said.err.split()).count("repeat an earlier training row exactly") == 1


def test_a_policy_in_words(welltuned, tiny_model_dir, rows, write_rows, tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [*rows, {"messages": []}])
    given = ("plan", "--model", tiny_model_dir, "--data", path)
    said = welltuned(*given)
    assert said.code == 2 and "x.jsonl:81: `messages` is empty" in said.err
    said = welltuned(*given, "--set", "on_bad_row=drop")
    text = " ".join(said.err.split())
    assert said.code == 0 and "! 1 of 81 rows cannot be read as conversations; left out (on_bad_row): " in text
    said = welltuned(*given, "--set", "on_bad_row=keep")
    assert said.code == 2 and "it must be one of error, drop" in said.err
