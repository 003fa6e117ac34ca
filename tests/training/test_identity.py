"""What a run is of: a digest that sees another base model, in full and in pieces, and differences as sentences."""

import shutil

import pytest

from welltuned.training import identity
from welltuned.training.identity import base_digest, differences


@pytest.fixture
def model(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


@pytest.mark.parametrize("whole", [True, False])
def test_another_base_model(model, make_model_dir, monkeypatch, whole):
    if not whole:
        monkeypatch.setattr(identity, "WHOLE", 0)
        monkeypatch.setattr(identity, "PIECE", 64)
        monkeypatch.setattr(identity, "PIECES", 16)
    before = base_digest(str(model))
    assert base_digest(str(model)) == before
    weights = (model / "model.safetensors").read_bytes()
    shutil.copy(make_model_dir(seed=1) / "model.safetensors", model / "model.safetensors")  # of the same size
    assert len(weights) == (model / "model.safetensors").stat().st_size and base_digest(str(model)) != before
    (model / "model.safetensors").write_bytes(weights)
    assert base_digest(str(model)) == before
    (model / "config.json").write_text((model / "config.json").read_text().replace("256", "255"))
    assert base_digest(str(model)) != before


def test_one_bit_is_seen_where_all_is_read(model):
    before = base_digest(str(model))
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (model / "model.safetensors").write_bytes(data)
    assert base_digest(str(model)) != before


def test_pieces_reach_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "PIECE", 4)
    monkeypatch.setattr(identity, "PIECES", 3)
    path = tmp_path / "file"
    path.write_bytes(b"abcd----efgh----ijkl")
    assert list(identity._pieces(path, whole=False)) == [b"abcd", b"efgh", b"ijkl"]


def test_differences():
    then = {
        "recipe": {"r": 4, "seed": 1},
        "plan": {"updates": 10},
        "data": {"a.jsonl": "1", "b.jsonl": "2"},
        "base": "x",
        "tokenizer": "y",
        "chat_template": None,
    }
    assert differences(then, then) == []
    now = {**then, "recipe": {"r": 8}, "data": {"a.jsonl": "3", "b.jsonl": "2"}, "base": "z", "chat_template": "t"}
    assert differences(then, now) == [
        "recipe: r was 4 and is 8",
        "recipe: seed was 1 and is not set",
        "data: a.jsonl changed",
        "the base model changed",
        "the chat template changed",
    ]
