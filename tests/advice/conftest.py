import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from welltuned.facts.data import DatasetFacts, dataset_facts
from welltuned.facts.machine import Device, MachineFacts
from welltuned.facts.model import ModelFacts, read_model_facts

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                    num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "llama-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                     num_key_value_heads=8, vocab_size=128256),
    "llama-70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                      num_key_value_heads=8, vocab_size=128256),
}  # fmt: skip


@pytest.fixture
def write_config(tmp_path: Path):
    """Write a config.json without weights; returns its folder."""

    def write(**config: Any) -> str:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return write


@pytest.fixture
def model_of(write_config):
    def build(shape: str, model_type: str = "llama", **more: Any) -> ModelFacts:
        config = {"model_type": model_type, "max_position_embeddings": 8192, **SHAPES[shape], **more}
        return read_model_facts(write_config(**config), weights_needed=False)

    return build


@pytest.fixture(scope="session")
def data_of():
    return _data_of


@pytest.fixture(scope="session")
def machine_of():
    return _machine_of


@pytest.fixture(scope="session")
def shapes():
    return SHAPES


def _data_of(rows: int = 340, low: int = 80, high: int = 220, heldout: int = 60) -> DatasetFacts:
    lengths = np.linspace(low, high, rows).astype(int)
    return dataset_facts(lengths, lengths // 4, lengths[:heldout], lengths[:heldout] // 4, "messages")


def _machine_of(gigabytes: float = 16, device: Device = Device.CPU, amx: bool = False) -> MachineFacts:
    memory = int(gigabytes * 1e9)
    gpu = device is Device.CUDA
    return MachineFacts(
        device=device,
        cores=2,
        memory_total=memory,
        memory_available=memory,
        native_bf16=gpu or amx,
        amx_bf16=amx,
        gpu_name="a GPU" if gpu else None,
        gpu_memory_total=memory if gpu else None,
        gpu_memory_available=memory if gpu else None,
    )
