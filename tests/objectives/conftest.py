"""Tiny models and hand-made pairs, for what lies between examples and losses."""

import numpy as np
import pytest
import torch

V = 61


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def sequence(draw, prompt, length, origin="rows.jsonl:1"):
    """A prompt with an answer of `length` tokens, all of them trained."""
    from welltuned.data.render import Example

    ids = np.concatenate([prompt, draw.integers(1, V, length)]).astype(np.int32)
    return Example(ids, np.arange(len(ids)) >= len(prompt), origin)


@pytest.fixture
def pairs():
    """Six ragged pairs."""
    from welltuned.data.pairs import joined

    draw, out = np.random.default_rng(0), []
    for i, (prompt, chosen, rejected) in enumerate([(7, 4, 9), (3, 6, 2), (12, 5, 5), (1, 8, 3), (9, 1, 7), (5, 3, 3)]):
        ids, origin = draw.integers(1, V, prompt), f"rows.jsonl:{i + 1}"
        out.append(joined(*(sequence(draw, ids, n, origin) for n in (chosen, rejected))))
    return out


@pytest.fixture
def judged():
    """Six ragged answers, judged."""
    from dataclasses import replace

    draw = np.random.default_rng(1)
    shapes = [(7, 4), (3, 6), (12, 5), (1, 8), (9, 2), (5, 3)]
    rows = [sequence(draw, draw.integers(1, V, p), n, f"rows.jsonl:{i + 1}") for i, (p, n) in enumerate(shapes)]
    return [replace(row, desirable=i % 3 != 1) for i, row in enumerate(rows)]


@pytest.fixture(scope="session")
def make_engine():
    """A function that makes an engine on a tiny random model whose adapter has already moved."""

    def make(tune="lora", kind="llama", score=False, dropout=0.0, moved=0.1):
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        from welltuned.models.full import FullParameters
        from welltuned.models.fuse import find_head, fuse
        from welltuned.models.lora import LoraSettings, attach
        from welltuned.models.reward import SCORE, add_score
        from welltuned.training.step import Engine

        torch.manual_seed(0)
        shape = dict(
            vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2, pad_token_id=0,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape)).eval()
        if score:
            add_score(model, seed=3)
        if tune == "full":
            trained = FullParameters(model, frozen=("lm_head",) if score else ())
        else:
            settings = LoraSettings(r=4, lora_alpha=8, lora_dropout=dropout)
            trained = attach(model, settings, (SCORE,) if score else ())
            draw = torch.randn(trained.flat_KP.shape, generator=torch.Generator().manual_seed(1))
            trained.flat_KP.add_(draw, alpha=moved)
        fuse(model, trained if tune == "lora" else None)
        return Engine(model, trained, find_head(model), token_budget=10_000)

    return make
