"""Bad input of preference methods and of grpo: one sentence that says what and where, exit code 2, no folder."""

import re

import pytest

PAIRS = [{"prompt": f"say {i}", "chosen": f"red {i}", "rejected": f"blue {i + 1}"} for i in range(24)]
LABELS = [{"prompt": f"say {i}", "completion": f"red {i}", "label": True} for i in range(24)]
PROMPTS = [{"prompt": f"say {i}", "answer": str(i)} for i in range(24)]
LONG = "the red hat " * 200

CASES = {
    "equal answers": ("dpo", [*PAIRS, {**PAIRS[0], "rejected": PAIRS[0]["chosen"]}], (), "are the same", 25),
    "an empty chosen answer": ("orpo", [*PAIRS, {**PAIRS[0], "chosen": " "}], (), "no answer", 25),
    "an empty rejected answer": ("reward", [*PAIRS, {**PAIRS[0], "rejected": ""}], (), "no answer", 25),
    "an empty completion": ("kto", [*LABELS, {**LABELS[0], "completion": "", "label": False}], (), "no answer", 25),
    "labels of one kind": ("kto", LABELS, (), "rows are labelled desirable", None),
    "a prompt longer than the context": ("dpo", [*PAIRS, {**PAIRS[0], "prompt": LONG}], (), "loses an answer", 25),
    "a prompt to sample from that is": ("grpo", [*PROMPTS, {**PROMPTS[0], "prompt": LONG}], ("rewards=numeric",),
                                        "the prompt has .* tokens", 25),
    "no reward file": ("grpo", PROMPTS, ("rewards=nowhere.py:score",), "no such reward file", None),
    "no rewards": ("grpo", PROMPTS, (), "rewards", None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_sentence(welltuned, tiny_model_dir, write_rows, tmp_path, case):
    method, rows, sets, said, line = CASES[case]
    data, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    options = [word for item in (*sets, "eval_fraction=0.1") for word in ("--set", item)]
    found = welltuned("train", "--model", tiny_model_dir, "--data", data, "--method", method, *options, "--out", out)
    assert found.code == 2 and "Traceback" not in found.err and found.out == ""
    [sentence] = found.complaints
    assert found.err.splitlines()[-1] == sentence
    assert re.search(said, sentence), sentence
    assert line is None or f"rows.jsonl:{line}" in sentence
    assert not out.exists() or not any(out.iterdir())
