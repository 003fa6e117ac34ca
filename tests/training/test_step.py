"""One update and one evaluation, on models with hand-made examples: who is named, and what is divided by what."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from welltuned.data.render import Example
from welltuned.errors import RunError
from welltuned.models.fuse import find_head, fuse
from welltuned.models.lora import LoraSettings, attach
from welltuned.models.packed import packed_model
from welltuned.training.step import Engine, accumulate_gradient, evaluate

V = 61


def example(length, trained, seed, origin="rows.jsonl:1"):
    ids = np.random.default_rng(seed).integers(1, V, length, dtype=np.int32)
    mask = np.zeros(length, bool)
    mask[length - trained :] = True
    return Example(ids, mask, origin)


@pytest.fixture(scope="module")
def engine(one_thread):
    torch.manual_seed(0)
    shape = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.2)).eval()
    bank = attach(model, LoraSettings(r=4, lora_alpha=8))
    bank.flat_KP.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    fuse(model, bank)
    ready = Engine(model, bank, find_head(model), token_budget=64)
    with packed_model(model):
        yield ready


@pytest.fixture
def rows():
    shapes = [(12, 1), (30, 20), (9, 4), (25, 2), (40, 13), (8, 7), (18, 18)]
    return [example(n, k, i, f"rows.jsonl:{i + 1}") for i, (n, k) in enumerate(shapes)]


def by_hand(model, row):
    """Summed loss of one row by the model's own forward, run as transformers runs it."""
    model.set_attn_implementation("sdpa")
    try:
        ids = torch.from_numpy(row.ids.astype(np.int64))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
    finally:
        model.set_attn_implementation("welltuned_packed")
    wanted = torch.from_numpy(row.mask[1:])
    nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    return nll[wanted].sum(), int(wanted.sum())


# ── one place that divides ───────────────────────────────────────────────────────────────────────────────────────────


def test_loss_is_the_mean_over_all_supervised_tokens(engine, rows):
    engine.trained.no_dropout()
    with torch.no_grad():
        sums, counts = zip(*(by_hand(engine.model, row) for row in rows), strict=True)
    assert counts == (1, 20, 4, 2, 13, 7, 17)  # of (18, 18) the first token is no target
    made = accumulate_gradient(engine, rows, list(range(len(rows))))
    assert made.loss == pytest.approx(float(sum(sums)) / sum(counts), rel=1e-6)
    assert (made.tokens, made.supervised_tokens) == (sum(len(r.ids) for r in rows), sum(counts))


def test_gradient_is_that_of_the_mean(engine, rows):
    engine.trained.no_dropout()
    engine.trained.grad_KP.zero_()
    total = sum(by_hand(engine.model, row)[0] for row in rows) / sum(int(r.mask[1:].sum()) for r in rows)
    total.backward()
    expected = engine.trained.grad_KP.clone()
    for budget in (1, 40, 64, 10_000):
        engine.trained.grad_KP.zero_()
        accumulate_gradient(replace(engine, token_budget=budget), rows, list(range(len(rows))))
        assert (engine.trained.grad_KP - expected).norm() < 2e-6 * expected.norm()


def test_a_masked_row_adds_nothing(engine, rows):
    masked = example(20, 0, 99, "rows.jsonl:99")
    engine.trained.grad_KP.zero_()
    without = accumulate_gradient(engine, rows, list(range(len(rows))))
    expected = engine.trained.grad_KP.clone()
    for budget in (1, 64):
        engine.trained.grad_KP.zero_()
        found = accumulate_gradient(replace(engine, token_budget=budget), [*rows, masked], list(range(len(rows) + 1)))
        assert found.loss == pytest.approx(without.loss, rel=1e-6)
        assert found.supervised_tokens == without.supervised_tokens and found.tokens == without.tokens + 20
        assert (engine.trained.grad_KP - expected).norm() < 2e-6 * expected.norm()


# ── named, not turned into 0 or NaN ──────────────────────────────────────────────────────────────────────────────────


def test_an_update_without_trained_tokens_is_named(engine):
    masked = [example(10, 0, i, f"rows.jsonl:{i}") for i in range(8)]
    with pytest.raises(RunError, match=r"no token of this update is trained on \(rows.jsonl:0, .*:4 and 3 more\)"):
        accumulate_gradient(engine, masked, list(range(8)))


def test_a_row_whose_only_trained_token_is_its_first_is_not_supervised(engine):
    first = Example(np.array([5, 6], np.int32), np.array([True, False]), "rows.jsonl:7")
    with pytest.raises(RunError, match="rows.jsonl:7"):
        accumulate_gradient(engine, [first], [0])


def test_a_loss_that_is_not_finite_names_its_rows(engine, rows):
    embedding = engine.model.get_input_embeddings().weight
    spoilt = int(rows[1].ids[0])
    assert all(spoilt not in r.ids for r in (rows[0], rows[2]))
    saved = embedding.data[spoilt].clone()
    embedding.data[spoilt] = math.nan
    try:
        with pytest.raises(RunError, match=r"not finite in rows.jsonl:2;"):
            accumulate_gradient(replace(engine, token_budget=1), rows[:3], [0, 1, 2])
        with pytest.raises(RunError, match=r"held-out loss is not finite in rows.jsonl:2;"):
            evaluate(engine, rows[:3])
    finally:
        embedding.data[spoilt] = saved


# ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_evaluation_is_the_mean_over_supervised_tokens(engine, rows):
    engine.trained.no_dropout()
    with torch.no_grad():
        sums, counts = zip(*(by_hand(engine.model, row) for row in rows), strict=True)
        found = evaluate(engine, rows)
    assert found.loss == pytest.approx(float(sum(sums)) / sum(counts), rel=1e-6)
    assert found.supervised_tokens == sum(counts)
    for got, total, count in zip(found.loss_of_example, sums, counts, strict=True):
        assert got == pytest.approx(float(total) / count, rel=1e-5)


def test_standard_error_by_brute_force(engine, rows):
    """That of a ratio of sums over examples, and near what the jackknife gives, which knows no formula for ratios."""
    found = evaluate(engine, rows)
    counts = [int(r.mask[1:].sum()) for r in rows]
    sums = [mean * count for mean, count in zip(found.loss_of_example, counts, strict=True)]
    n, ratio = len(rows), sum(sums) / sum(counts)
    residual = [s - ratio * c for s, c in zip(sums, counts, strict=True)]
    formula = math.sqrt(sum(r * r for r in residual) / (n - 1) / n) / (sum(counts) / n)
    assert found.standard_error == pytest.approx(formula, rel=1e-5)
    many = rows * 30
    found = evaluate(engine, many)
    sums, counts = sums * 30, counts * 30
    left_out = [(sum(sums) - s) / (sum(counts) - c) for s, c in zip(sums, counts, strict=True)]
    mean = sum(left_out) / len(left_out)
    jackknife = math.sqrt((len(many) - 1) / len(many) * sum((x - mean) ** 2 for x in left_out))
    assert found.standard_error == pytest.approx(jackknife, rel=0.02)


def test_standard_error_of_one_example_is_not_known(engine, rows):
    assert math.isnan(evaluate(engine, rows[:1]).standard_error)


def test_evaluation_does_not_depend_on_the_cut_or_order(engine, rows):
    found = [evaluate(replace(engine, token_budget=b), rows) for b in (1, 64, 10_000)]
    backwards = evaluate(engine, rows[::-1])
    assert all(f.loss == pytest.approx(found[0].loss, rel=1e-6) for f in [*found, backwards])
    assert backwards.loss_of_example[::-1] == pytest.approx(found[1].loss_of_example, rel=1e-5)


def test_evaluation_leaves_gradients_and_weights_alone(engine, rows):
    engine.trained.grad_KP.fill_(0.5)
    weights = engine.trained.flat_KP.clone()
    evaluate(engine, rows)
    assert bool((engine.trained.grad_KP == 0.5).all()) and torch.equal(weights, engine.trained.flat_KP)
