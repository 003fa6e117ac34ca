"""Whole runs that make room for themselves end as runs that did not, in every bit."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch

from welltuned.models import recompute
from welltuned.training import run as run_module
from welltuned.training.settings import Room

SHORT = dict(max_steps=3, lora_dropout=0.1)


@pytest.fixture(scope="module")
def plain(run):
    return run(**SHORT)


def same(one, other):
    assert one.losses == other.losses and one.evaluations[-1]["eval_loss"] == other.evaluations[-1]["eval_loss"]
    assert one.adapter.keys() == other.adapter.keys()
    assert all(torch.equal(tensor, other.adapter[name]) for name, tensor in one.adapter.items())


def test_one_recomputed_layer(run, plain):
    found = run(checkpointed_layers=1, **SHORT)
    same(plain, found)
    assert found.result.engine.model.config.num_hidden_layers > 1
    assert "gradient_checkpointing:\n    value: true" in (found.path / "plan.yaml").read_text(encoding="utf-8")


def test_inputs_on_the_host(run, plain, monkeypatch):
    made = []

    def host(device):
        made.append(recompute.HostCheckpoints(device))
        return made[-1]

    monkeypatch.setattr(run_module, "HostCheckpoints", host)
    monkeypatch.setattr(run_module, "room_of", lambda plan: Room(True, None, True, False))
    same(plain, run(**SHORT))
    assert made[0].moved >= 3 and made[0].peak_bytes > 0


def test_an_input_that_comes_back_changed_would_be_seen(run, plain, monkeypatch):
    """The planted fault: half precision on the way, which others do in silence."""
    real = recompute.HostCheckpoints.put
    monkeypatch.setattr(recompute.HostCheckpoints, "put", lambda self, t: real(self, t.bfloat16().to(t.dtype)))
    monkeypatch.setattr(run_module, "room_of", lambda plan: Room(True, None, True, False))
    found = run(**SHORT)
    assert found.losses[0] == plain.losses[0] and found.losses[1:] != plain.losses[1:]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="4-bit weights need bitsandbytes")
def test_a_base_that_is_expanded_once(run):
    from welltuned.models.four_bit import four_bit_weights

    train = partial(run, tune="qlora", **SHORT)
    cached, rebuilt = train(dense_base="cached"), train(dense_base="rebuilt")
    same(cached, rebuilt)
    kept, expanded = ([w.kept for w in four_bit_weights(f.result.engine.model)] for f in (cached, rebuilt))
    assert kept and all(w is not None for w in kept) and all(w is None for w in expanded)
