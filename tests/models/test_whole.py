"""What is known without building a model is what building it finds."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from welltuned.models import foresee as front
from welltuned.models.foresee import foresee
from welltuned.models.skeleton import left_plain
from welltuned.models.whole import is_whole

PLAIN = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
CHANGES = {
    "hidden_act": ["silu", "gelu"], "mlp_bias": [False, True], "attention_bias": [False, True], "head_dim": [8, 16, 7],
    "num_key_value_heads": [4, 3, 1], "hidden_size": [32, 33], "rms_norm_eps": [1e-6, 0, "x"],
    "rope_parameters": [None, {"rope_theta": 1e4}, LLAMA3, {"rope_type": "no"}, {"rope_type": "llama3"}, 5],
    "attention_dropout": [0.0, 0.1], "sliding_window": [None, 5], "dtype": ["bfloat16", "float64", 3],
    "layer_types": [["full_attention"] * 2, ["full_attention"], ["sliding_attention"] * 2], "odd": [1],
    "pad_token_id": [None, 0, 200], "eos_token_id": [1, [1, 2], "x"], "quantization_config": [{}, 1],
    "tie_word_embeddings": [False, "x"], "initializer_range": [0.02, "x"], "max_position_embeddings": [64, "x"],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "granite"])
def test_plain_families_are_whole(kind, tmp_path):
    config = {"model_type": kind, **PLAIN}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert is_whole(config, "all-linear") and is_whole(config, None)
    assert left_plain(str(tmp_path), "all-linear", nf4=False) == left_plain(str(tmp_path), None, nf4=False) == ()


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["llama", "qwen2", "qwen3", "mistral", "granite", "smollm3", "gemma2", "phi3"]),
    keys=st.sets(st.sampled_from(sorted(CHANGES)), max_size=3),
    draw=st.data(),
)
def test_whole_is_never_said_of_what_building_would_find(tmp_path_factory, kind, keys, draw):
    config = {"model_type": kind, **PLAIN, **{key: draw.draw(st.sampled_from(CHANGES[key])) for key in sorted(keys)}}
    if not is_whole(config, "all-linear"):
        return
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(config))
    assert left_plain(str(folder), "all-linear", nf4=False) == (), config


def test_what_was_found_is_kept(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **PLAIN, "mlp_bias": True}))
    found = foresee(str(tmp_path))
    assert found and foresee(str(tmp_path), None) != found
    monkeypatch.setattr("welltuned.models.skeleton.left_plain", None)
    assert foresee(str(tmp_path)) == found  # from the disk
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **PLAIN, "mlp_bias": True, "odd": 1}))
    with pytest.raises(TypeError):
        front.foresee(str(tmp_path))
