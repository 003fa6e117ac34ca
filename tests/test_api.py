"""The commands as Python functions, and that they leave everything else in the process alone."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import welltuned
from welltuned.errors import InputError
from welltuned.training.events import Updated

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(5, 29)[None]


@torch.no_grad()
def logits(model, ids=IDS, **options):
    return model(input_ids=ids, use_cache=False, **options).logits


def plain(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.fixture(scope="module")
def usual(tiny_model_dir, data_file):
    return dict(model=str(tiny_model_dir), data=data_file, max_steps=20, learning_rate=2e-2, effective_batch_size=8)


@pytest.fixture(scope="module")
def finished(usual, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return welltuned.train(out=out, **usual)


# ── the functions ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_plan(usual):
    plan = welltuned.plan(**usual)
    assert plan.value("learning_rate") == 2e-2 and plan.updates == 20
    json.dumps(plan.to_json(), allow_nan=False)


def test_train_returns_what_it_found(finished):
    assert finished.after.loss < finished.before.loss and finished.updates == 20
    assert all(check.moved and check.finite for check in finished.checks)
    assert finished.tokens_per_second > 0 and finished.peak_memory > 1e7


def test_load_and_reply(finished, rows):
    tuned = welltuned.load(finished.path, device="cpu")
    asked = rows[0]["messages"][0]["content"]
    reply = tuned.reply(asked)
    assert isinstance(reply, str) and reply == tuned.reply(asked)  # greedy
    assert torch.equal(logits(tuned.model), logits(welltuned.load(str(finished.path), device="cpu").model))


def test_the_prompt_is_the_one_that_was_trained(finished, rows, data_file):
    """Token for token: what the model was trained to answer is what it is asked."""
    from welltuned.data.conversation import Message
    from welltuned.recipe import load_recipe
    from welltuned.training.prepare import prepare

    tuned = welltuned.load(finished.path, device="cpu")
    prepared = prepare(load_recipe(str(finished.path / "recipe.yaml")))
    for example in prepared.train[:5]:
        row = rows[int(example.origin.rpartition(":")[2]) - 1]
        prompt = tuned.prompt([Message("user", row["messages"][0]["content"])])
        first = int(example.mask.argmax())
        assert prompt == example.ids[:first].tolist()


def test_the_loaded_model_has_the_loss_of_the_run(finished):
    """Held-out loss once more, from the files, by the model's own forward."""
    from welltuned.recipe import load_recipe
    from welltuned.training.prepare import prepare

    tuned = welltuned.load(finished.path, device="cpu")
    total = count = 0
    for example in prepare(load_recipe(str(finished.path / "recipe.yaml"))).held_out:
        ids, mask = torch.from_numpy(example.ids).long(), torch.from_numpy(example.mask)[1:]
        nll = torch.nn.functional.cross_entropy(logits(tuned.model, ids[None])[0, :-1], ids[1:], reduction="none")
        total, count = total + float(nll[mask].sum()), count + int(mask.sum())
    assert total / count == pytest.approx(finished.after.loss, rel=1e-5)


def test_a_prompt_that_fills_the_context(make_model_dir, data_file, tmp_path):
    """GPT-2 has no positions beyond its context: a prompt that long is an error, and a reply ends where they do."""
    from welltuned.models.generate import Decoding, stream

    folder = make_model_dir(
        "gpt2",
        n_embd=32,
        n_layer=1,
        n_head=4,
        max_position_embeddings=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    welltuned.train(model=str(folder), data=data_file, out=tmp_path / "out", max_steps=2, learning_rate=1e-4)
    tuned = welltuned.load(tmp_path / "out", device="cpu")
    assert isinstance(tuned.reply("hat " * 20), str)
    with pytest.raises(InputError, match="the model's context only 64"):
        tuned.reply("hat " * 100)
    with pytest.raises(InputError, match="the prompt has 70 tokens"):
        list(stream(tuned.model, tuned.tokenizer, [5] * 70, Decoding()))


def test_a_failure_while_generating_is_raised(finished, monkeypatch):
    """And not waited for: generation runs in a thread of its own."""
    from welltuned.models.generate import Decoding, stream

    tuned = welltuned.load(finished.path, device="cpu")

    def failing(**_):
        raise RuntimeError("no more memory")

    monkeypatch.setattr(tuned.model, "generate", failing)
    with pytest.raises(RuntimeError, match="no more memory"):
        list(stream(tuned.model, tuned.tokenizer, [5, 6], Decoding()))


def test_bad_input_from_python(usual, tmp_path):
    with pytest.raises(InputError, match="'lerning_rate'"):
        welltuned.train(out=tmp_path / "out", lerning_rate=1, **usual)
    with pytest.raises(InputError, match="names no data"):
        welltuned.plan(model=usual["model"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(InputError, match="not empty"):
        welltuned.train(out=tmp_path / "full", **usual)
    assert not (tmp_path / "out").exists()


# ── untouched neighbours ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_second_model_never_notices(usual, tiny_model_dir, tmp_path, tune, attention):
    """Bit for bit the same logits before, during and after, of a model of the same class in the same process."""
    other = plain(tiny_model_dir, attn_implementation=attention)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0  # a padded batch: packed attention would ignore the mask
    before = logits(other), logits(other, attention_mask=mask)
    during = []

    def watch(event):
        if isinstance(event, Updated) and event.step in (1, 3):
            during.append((logits(other), logits(other, attention_mask=mask)))

    result = welltuned.train(out=tmp_path / "out", observer=watch, tune=tune, **{**usual, "max_steps": 3})
    after = logits(other), logits(other, attention_mask=mask)
    assert len(during) == 2
    for found in (*during, after):
        assert torch.equal(found[0], before[0]) and torch.equal(found[1], before[1])
    assert other.config._attn_implementation == attention
    assert all(p.requires_grad for p in other.parameters())
    assert not torch.equal(logits(result.engine.model), before[0])
    fresh = plain(tiny_model_dir, attn_implementation=attention)
    assert torch.equal(logits(fresh), before[0])


def test_a_second_model_trains_as_before(usual, tiny_model_dir, tmp_path):
    """Its gradients too, and by the library's own loss."""

    def gradients():
        model = plain(tiny_model_dir)
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    before = gradients()
    welltuned.train(out=tmp_path / "out", **{**usual, "max_steps": 2})
    after = gradients()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_global_state_is_left_alone(usual, tmp_path):
    """Random state, threads, default type, gradient mode, log levels: as the caller had them."""
    import random

    import numpy as np
    from transformers.utils import logging

    def state():
        return (
            torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(),
            torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
            logging.get_verbosity(),
        )  # fmt: skip

    torch.manual_seed(123)
    before = state()
    welltuned.train(out=tmp_path / "out", **{**usual, "max_steps": 2, "lora_dropout": 0.1})
    after = state()
    assert [a == b for a, b in zip(before, after, strict=True)] == [True] * len(before)


def test_the_callers_random_state_changes_nothing(usual, tmp_path):
    from safetensors.torch import load_file

    for seed in (1, 2):
        torch.manual_seed(seed)
        welltuned.train(out=tmp_path / str(seed), **{**usual, "max_steps": 3, "lora_dropout": 0.1})
    one, two = (load_file(tmp_path / s / "adapter" / "adapter_model.safetensors") for s in ("1", "2"))
    assert all(torch.equal(one[name], two[name]) for name in one)
