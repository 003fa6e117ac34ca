"""Runs whose decoder layers are compiled: the numbers of a run without, the warm-up told, and what goes wrong said.

torch traces, and what it traced is run as it is; the compiler behind it is tried in tests/models/test_compiled.py.
"""

import pytest
import torch

from welltuned.models import compiled
from welltuned.training import warming

SHORT = dict(max_steps=4, lora_dropout=0.1)


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def plain(run):
    return run(**SHORT)


def near(one, other, rel=2e-5):
    assert one.losses == pytest.approx(other.losses, rel=rel)
    for name, tensor in one.adapter.items():
        torch.testing.assert_close(tensor, other.adapter[name], rtol=1e-2, atol=2e-4)


def told(found):
    return [line for line in found.metrics if line.get("event") == "compiled"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"checkpointed_layers": 1, "token_budget": 400}],
    ids=["kept", "recomputed"],
)
def test_a_run_is_that_without(run, plain, monkeypatch, options):
    """With static lengths, however much they pad here."""
    monkeypatch.setattr(warming, "most_padding", lambda: 0.3)
    found = run(torch_compile=True, **SHORT, **options)
    near(found, plain)
    (event,) = told(found)
    summary = found.summary["torch_compile"]
    assert event["problem"] is None and event["graphs"] == len(event["lengths"]) == summary["graphs"] >= 1
    assert event["seconds"] > 0 and event["error"] < 1e-5 and "compiled for packed rows of" in event["sentence"]
    assert summary["micro_batches_uncompiled"] == 0 and 0 <= summary["padded_share"] < 0.3
    assert summary["padded_share"] == pytest.approx(event["padding"], abs=1e-3)
    assert told(plain) == [] and "torch_compile" not in plain.summary
    assert f'<li class="note">{event["sentence"]}</li>' in (found.path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_graphs_are_those_of_all_updates(run, plain):
    """Twelve ragged updates compile nothing after the warm-up."""
    found = run(torch_compile=True)
    assert found.summary["torch_compile"]["graphs"] == told(found)[0]["graphs"]
    assert found.summary["torch_compile"]["micro_batches_uncompiled"] == 0


def test_compiling_that_fails_is_told_and_changes_nothing(run, plain, monkeypatch):
    def fail(graph, inputs):
        raise OSError("g++ is not found")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: fail)
    found = run(torch_compile=True, **SHORT)
    assert "g++ is not found" in told(found)[0]["problem"] and "g++" in found.summary["torch_compile"]["problem"]
    assert found.losses == plain.losses
    assert all(torch.equal(tensor, plain.adapter[name]) for name, tensor in found.adapter.items())


def test_where_padding_costs_more_than_it_brings_any_length_has_one_code(run, plain):
    """At these lengths of a few hundred tokens six static ones pad a tenth."""
    found = run(torch_compile=True, token_budget=400, **SHORT)
    near(found, plain)
    (event,) = told(found)
    assert event["problem"] is None and event["lengths"] == [] and event["padding"] == 0
    assert event["graphs"] == found.summary["torch_compile"]["graphs"] == 1
    assert found.summary["torch_compile"]["padded_share"] == 0 and "any length" in event["sentence"]


@pytest.mark.slow
def test_pairs(run, tmp_path, rows, write_rows):
    """Branches of shared prompts; KTO's rows stand alone."""
    pairs = [
        {"prompt": row["messages"][0]["content"], "chosen": row["messages"][1]["content"], "rejected": f"no {i % 7}"}
        for i, row in enumerate(rows)
    ]
    data = write_rows(tmp_path / "pairs.jsonl", pairs)
    options = dict(data=data, method="dpo", max_steps=3, learning_rate=5e-3)
    plain, found = run(**options), run(torch_compile=True, **options)
    near(found, plain, rel=1e-4)
    assert told(found)[0]["problem"] is None and found.summary["torch_compile"]["micro_batches_uncompiled"] == 0


@pytest.mark.slow
def test_a_run_that_goes_on_is_that_without_an_end(run, tmp_path):
    """Lengths and codes follow from plan and data, so a resumed run has the same bits."""
    import shutil

    import welltuned

    whole = run(torch_compile=True, save_steps=2, **SHORT)
    left = tmp_path / "left"
    shutil.copytree(whole.path, left)
    for name in ("run.json", "adapter"):
        path = left / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(left / "checkpoints" / "step-000004")
    welltuned.resume(left)
    from safetensors.torch import load_file

    again = load_file(left / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.adapter.items())
