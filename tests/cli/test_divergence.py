"""`welltuned train` and `resume` of a run that diverges, as they are typed: exit codes and last words."""

import json

import pytest

SET = {
    "effective_batch_size": 16, "r": 8, "learning_rate": 0.6, "warmup_steps": 20, "max_steps": 30, "eval_steps": 1,
    "save_steps": 1, "eval_fraction": 0.2, "early_stopping_patience": 3,
}  # fmt: skip


@pytest.fixture
def train(welltuned, tiny_model_dir, data_file, tmp_path):
    def train(**changes):
        options = [part for k, v in {**SET, **changes}.items() for part in ("--set", f"{k}={json.dumps(v)}")]
        given = ("--model", tiny_model_dir, "--data", data_file, "--out", tmp_path / "run", *options)
        return welltuned("train", *given, "--json"), tmp_path / "run"

    return train


def test_with_a_result_from_before(welltuned, train):
    said, run = train(load_best_model_at_end=True)
    assert said.code == 1
    document = json.loads(said.out)
    assert document["diverged"] == document["stop_reason"] and document["diverged"].startswith("stopped after ")
    assert f"This run diverged; its result is the best weights from before. It {document['diverged']}." in said.err
    assert "Verified: all" in said.err and "--set learning_rate=" in said.err and not said.complaints
    again = welltuned("resume", run, "--json")
    assert again.code == 1 and json.loads(again.out) == document
    assert "is finished" in again.err and "This run diverged" in again.err


def test_without_one(welltuned, train):
    said, run = train(load_best_model_at_end=False)
    assert said.code == 1 and said.out == ""
    [complaint] = said.complaints
    assert complaint.startswith("welltuned: stopped after ") and complaint.endswith(f"resume {run} --accept-changes")
    again = welltuned("resume", run)
    assert again.code == 1 and "no better weights were kept" in again.complaints[-1]
    (run / "recipe.yaml").write_text(
        (run / "recipe.yaml").read_text().replace("learning_rate: 0.6", "learning_rate: 0.02")
    )
    assert welltuned("resume", run).code == 2
    mended = welltuned("resume", run, "--accept-changes", "--json")
    assert mended.code == 0 and json.loads(mended.out)["diverged"] is None
    assert "the run had diverged; it goes on from update" in mended.err
