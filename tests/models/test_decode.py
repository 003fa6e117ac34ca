"""Decoding from a cache, a token at a time, gives the logits of one whole pass: for every family."""

import numpy as np
import pytest
import torch

from welltuned.models import decode
from welltuned.models.decode import PackedDecoder, decoding, new_decoder
from welltuned.models.packed import packs

from .conftest import FAMILIES, VOCABULARY, make_engine, make_model

STEPS = 9


@torch.no_grad()
def whole_logits(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def ready(family):
    engine = make_engine(make_model(family))
    engine.bank.no_dropout()
    return engine.model, engine.head


@torch.no_grad()
def differences(model, head, prompts, counts, dropped):
    """The largest difference between the logits of decoding and of a whole pass, at every step, relative."""
    draw = np.random.default_rng(1)
    with decoding(model):
        decoder = new_decoder(model, head, prompts, counts, STEPS)
        sequences = [prompt.tolist() for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
        logits = [decoder.begin()]
        kept = [list(map(tuple, sequences))]
        for t in range(STEPS):
            if decoder.thins and t in dropped:
                rows = [i for i in range(len(sequences)) if i not in dropped[t]]
                decoder.keep(torch.tensor(rows))
                sequences = [sequences[i] for i in rows]
            token = draw.integers(3, VOCABULARY, len(sequences))
            for sequence, new in zip(sequences, token.tolist(), strict=True):
                sequence.append(new)
            logits.append(decoder.step(torch.from_numpy(token)))
            kept.append(list(map(tuple, sequences)))
    found = []
    for step, rows in zip(logits, kept, strict=True):
        wanted = torch.stack([whole_logits(model, list(ids)) for ids in rows])
        found.append(float((step - wanted).abs().max() / wanted.abs().max()))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_one_whole_pass(family, monkeypatch):
    """Prompts of unlike length, sequences that go in between, one prompt's last one too, and a cache that grows."""
    monkeypatch.setattr(decode, "FIRST_ROOM", 2)
    model, head = ready(family)
    draw = np.random.default_rng(0)
    lengths = (7, 2, 4) if packs(model) else (7, 7)
    prompts = [draw.integers(3, VOCABULARY, n).astype(np.int32) for n in lengths]
    found = differences(model, head, prompts, [3, 1, 2][: len(lengths)], {2: {1}, 5: {2}})
    assert max(found) < 2e-5


def test_a_wrong_position_would_be_seen(monkeypatch):
    model, head = ready("llama")
    prompts = [np.arange(3, 3 + n, dtype=np.int32) for n in (7, 2)]
    run = PackedDecoder._run
    monkeypatch.setattr(
        PackedDecoder, "_run", lambda self, ids, places, rows: run(self, ids, places + (self.t > 3), rows)
    )
    found = differences(model, head, prompts, [2, 2], {})
    assert max(found[:5]) < 2e-5 < 1e-3 < max(found[5:])
