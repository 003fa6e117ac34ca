"""Two and four processes give the run of one: losses and adapters to fp32 rounding, whatever the last batch."""

import json

import pytest
import torch
from ranked import in_ranks, trained
from safetensors.torch import load_file

UPDATES = 7  # of 16 rows: 72 training rows make four updates and one of 8


@pytest.fixture(scope="module")
def options(tiny_model_dir, data_file):
    return dict(
        model=str(tiny_model_dir), data=data_file, effective_batch_size=16, max_steps=UPDATES, r=4, lora_dropout=0.1,
        learning_rate=2e-2, eval_steps=3, save_steps=3, load_best_model_at_end=False, dtype="float32",
    )  # fmt: skip


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], [x["eval_loss"] for x in lines if "eval_loss" in x]


def assert_same_run(one, other):
    for mine, theirs in zip(losses(one), losses(other), strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=2e-5, atol=2e-5)
    a, b = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5)


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory):
    import welltuned

    out = tmp_path_factory.mktemp("straight") / "out"
    welltuned.train(out=out, **options)
    return out


def finished(ended):
    assert [e.code for e in ended] == [0] * len(ended), "\n".join(e.said for e in ended)
    return ended


@pytest.mark.parametrize("world", [2, 4])
def test_the_run_of_one_process(options, straight, tmp_path, world):
    ended = finished(in_ranks(trained(tmp_path / "run", **options), world, tmp_path / "said"))
    assert_same_run(tmp_path / "run", straight)
    told, evaluated = ended[0].value
    assert len(told) == UPDATES and evaluated is not None
    assert all(e.value == ([], evaluated) for e in ended[1:])  # the first speaks for all; all know the same
