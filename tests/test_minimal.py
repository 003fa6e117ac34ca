"""examples/minimal.py and the engine are two programs for one computation: the same ids, masks, losses and adapter."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import welltuned
from welltuned.data.formats import to_conversations
from welltuned.data.render import render_all
from welltuned.data.source import read_rows
from welltuned.data.stream import update_indices
from welltuned.models.adapter_file import load_adapter
from welltuned.training.events import Updated

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, BATCH, ROWS = 6, 5, 12  # 5 does not divide 12: the third update, the last of its epoch, has two rows
RATE = 1e-2


@pytest.fixture(scope="module")
def minimal():
    path = Path(__file__).parents[1] / "examples" / "minimal.py"
    spec = importlib.util.spec_from_file_location("minimal", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def chats(rows, write_rows, tmp_path_factory):
    """Short and long answers, and some rows with two of them."""
    chosen = [dict(row) for row in rows[:ROWS]]
    for index in (3, 8):
        chosen[index] = {"messages": [*chosen[index]["messages"], *rows[-index]["messages"]]}
    return write_rows(tmp_path_factory.mktemp("minimal") / "chats.jsonl", chosen)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_ids_and_masks(minimal, chats, tiny_tokenizer):
    """But for the newline that a template writes after the last turn, which nothing is learned from."""
    ours = render_all(to_conversations(read_rows(chats)).items, tiny_tokenizer).examples
    for row, example in zip(read(chats), ours, strict=True):
        ids, mask = minimal.encode(tiny_tokenizer, row)
        assert ids == example.ids.tolist()[: len(ids)]
        assert mask == example.mask.tolist()[: len(ids)]
        assert not example.mask[len(ids) :].any()


def test_prompt_and_completion(minimal, tiny_tokenizer):
    messages = [{"role": "user", "content": "two red hats"}, {"role": "assistant", "content": "hat hat"}]
    pair = {"prompt": "two red hats", "completion": "hat hat"}
    assert minimal.encode(tiny_tokenizer, pair) == minimal.encode(tiny_tokenizer, {"messages": messages})


@pytest.mark.parametrize("clip", [0.1, 1e3])
def test_losses_and_adapter(minimal, chats, data_file, make_model_dir, tmp_path, clip):
    folder = str(make_model_dir())
    updates = []
    result = welltuned.train(
        model=folder, data=chats, eval_data=data_file, out=tmp_path / "run", observer=updates.append,
        max_steps=STEPS, effective_batch_size=BATCH, learning_rate=RATE, warmup_steps=2, weight_decay=0.01,
        lr_scheduler_type="linear", lora_dropout=0.0, max_grad_norm=clip, r=4, lora_alpha=8, dtype="float32", seed=11,
    )  # fmt: skip
    updates = [event for event in updates if isinstance(event, Updated)]
    engine = [event.loss for event in updates]

    model, tokenizer = minimal.load(folder)
    adapters = minimal.add_lora(model, r=4, alpha=8, seed=11)
    examples = [minimal.encode(tokenizer, row) for row in read(chats)]
    settings = dict(steps=STEPS, rate=RATE, warmup=2, clip=clip)
    plain = list(minimal.train(model, examples, lambda step: update_indices(ROWS, 11, BATCH, step), **settings))
    assert [e.supervised_tokens for e in updates] == [
        sum(sum(examples[i][1]) for i in update_indices(ROWS, 11, BATCH, step)) for step in range(STEPS)
    ]
    rates = [minimal.rate_of(step, STEPS, RATE, 2) for step in range(STEPS)]
    assert [e.learning_rate for e in updates] == pytest.approx(rates, rel=1e-12)
    assert {e.grad_norm > clip for e in updates} == {clip < 1}  # every update is clipped, or none
    assert len(engine) == len(plain) == STEPS
    assert plain[-1] < plain[0] - 0.05  # it learns, so the losses have something to differ in
    np.testing.assert_allclose(engine, plain, rtol=1e-5)

    tensors = result.engine.trained.tensors()
    for name, adapter in adapters.items():
        for part, tensor in (("lora_A", adapter.A), ("lora_B", adapter.B)):
            torch.testing.assert_close(tensors[f"{name}.{part}"], tensor.detach(), rtol=1e-3, atol=1e-5)


def test_saved_adapter(minimal, make_model_dir, tmp_path):
    """What it saves, welltuned loads: the same logits."""
    folder = str(make_model_dir())
    model, _ = minimal.load(folder)
    adapters = minimal.add_lora(model, r=4, alpha=8)
    for adapter in adapters.values():
        torch.nn.init.normal_(adapter.B, std=0.3, generator=torch.Generator().manual_seed(5))
    minimal.save(adapters, tmp_path / "adapter", r=4, alpha=8)
    again, _ = minimal.load(folder)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = again(input_ids=ids).logits
        load_adapter(again, tmp_path / "adapter")
        assert not torch.allclose(again(input_ids=ids).logits, before, rtol=1e-2)
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_order(minimal):
    """Every row once a pass, and passes in different orders."""
    rows_of = minimal.shuffled(7, 3, seed=0)
    first, second = ([rows_of(step) for step in range(start, start + 3)] for start in (0, 3))
    assert [len(update) for update in first] == [3, 3, 1]
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(7))
    assert first != second
