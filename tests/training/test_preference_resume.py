"""A preference run that was cut off goes on bit for bit, with the reference that it began with."""

import json
import shutil

import pytest

import welltuned
from welltuned.training.checkpoint import checkpoints
from welltuned.training.resume import resume

TIMES = ("tokens_per_second", "memory_bytes")
UPDATES = 6


@pytest.fixture(scope="module")
def files(rows, write_rows, tmp_path_factory):
    pairs, labels = [], []
    for i, row in enumerate(rows):
        asked, answer = (message["content"] for message in row["messages"])
        other = rows[(3 * i + 1) % len(rows)]["messages"][1]["content"] + " no"
        pairs.append({"prompt": asked, "chosen": answer, "rejected": other})
        labels.append({"prompt": asked, "completion": answer if i % 3 else other, "label": bool(i % 3)})
    folder = tmp_path_factory.mktemp("rows")
    return {"pairs": write_rows(folder / "pairs.jsonl", pairs), "labels": write_rows(folder / "labels.jsonl", labels)}


def lines(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found if line.get("event") != "note"]


SLOW = pytest.mark.slow
CASES = (
    pytest.param("dpo", "lora", False, id="dpo, reference gone"),
    pytest.param("kto", "lora", True, id="kto"),
    pytest.param("dpo", "full", False, id="dpo in full, reference gone", marks=SLOW),
    pytest.param("dpo", "lora", True, id="dpo", marks=SLOW),
    pytest.param("kto", "lora", False, id="kto, reference gone", marks=SLOW),
    pytest.param("orpo", "lora", True, id="orpo", marks=SLOW),
    pytest.param("reward", "lora", True, id="reward", marks=SLOW),
)


@pytest.mark.parametrize(("method", "tune", "kept"), CASES)
def test_it_goes_on(files, tiny_model_dir, tmp_path, monkeypatch, method, tune, kept):
    """Also where the kept values are gone: the model as it started is asked again, not the model as it is now."""
    monkeypatch.setenv("WELLTUNED_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    welltuned.train(
        model=str(tiny_model_dir), method=method, tune=tune, data=files["labels" if method == "kto" else "pairs"],
        out=out, effective_batch_size=16, max_steps=UPDATES, learning_rate=1e-2 if tune == "lora" else 1e-3,
        token_budget=200, eval_steps=3, save_steps=2, save_total_limit=20, load_best_model_at_end=False,
        early_stopping_patience=0,
    )  # fmt: skip
    straight = tmp_path / "straight"
    shutil.copytree(out, straight)
    (out / "run.json").unlink()
    for number, folder in checkpoints(out):
        if number > 2:
            shutil.rmtree(folder)
    if not kept:
        shutil.rmtree(tmp_path / "cache")
    resume(out)
    assert lines(out) == lines(straight)
    name = "adapter/adapter_model.safetensors" if tune == "lora" else "model/model.safetensors"
    assert (out / name).read_bytes() == (straight / name).read_bytes()
    a, b = (json.loads((r / "run.json").read_text()) for r in (out, straight))
    assert a["trained_tensors"] == b["trained_tensors"] and a["held_out"] == b["held_out"]
