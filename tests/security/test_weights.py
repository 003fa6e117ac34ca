"""Hostile weight files: headers that lie about lengths, places, shapes and names."""

import json
import struct

import pytest
from safetensors.torch import load_file, save_file

from welltuned.errors import InputError
from welltuned.models.adapter_file import load_adapter
from welltuned.models.load import load_model
from welltuned.models.safetensors_header import read_header

FINE = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
EIGHT = b"\0" * 8
HOSTILE = {
    "overlapping": ({"a": FINE, "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, b"\0" * 16),
    "a gap": ({"a": FINE, "b": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]}}, b"\0" * 32),
    "out of range": ({"a": {"dtype": "F32", "shape": [2**20], "data_offsets": [0, 2**22]}}, b"\0" * 16),
    "backwards": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, EIGHT),
    "negative": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, EIGHT),
    "overflowing": ({"a": {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 16]}}, b"\0" * 16),
    "a huge size": ({"a": {"dtype": "F32", "shape": [2**80], "data_offsets": [0, 2**82]}}, b"\0" * 16),
    "a negative shape": ({"a": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}, b"\0" * 16),
    "a shape of text": ({"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}, EIGHT),
    "a shape of booleans": ({"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}, EIGHT),
    "an unknown type": ({"a": {"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 8]}}, EIGHT),
    "too little": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}, EIGHT),
    "unclaimed bytes": ({"a": FINE}, b"\0" * 99),
    "another field": ({"a": FINE | {"reduce": "os.system"}}, b"\0" * 16),
    "an entry that is none": ({"a": None}, b""),
    "a list": (b"[]", b""),
    "twice the same name": (b'{"a": %b, "a": %b}' % ((json.dumps(FINE).encode(),) * 2), b"\0" * 16),
    "NaN": (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 16]}}', b"\0" * 16),
    "infinity": (b'{"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, Infinity]}}', b"\0" * 16),
    "nested without end": (b'{"a":' + b"[" * 100_000, b""),
    "no text": (b"\xff\xfe\x00", b""),
    "digits without end": (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 10_000 + b"]}}", b""),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header(tmp_path, safetensors_bytes, kind):
    header, data = HOSTILE[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(header, data))
    with pytest.raises(InputError, match=r"model\.safetensors: (not a safetensors file|the weight file is cut short)"):
        read_header(path)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 10**8 + 1, 0])
def test_a_header_that_lies_about_its_length(tmp_path, safetensors_bytes, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes({"a": FINE}, b"\0" * 16, length=length))
    with pytest.raises(InputError):
        read_header(path)


def test_a_header_beyond_the_limit_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 10**8 + 1))
        file.truncate(2 * 10**8)  # sparse: takes no room
    with pytest.raises(InputError, match="claims 100,000,001 bytes"):
        read_header(path)


def test_sound_headers_are_read(tiny_model_dir, tmp_path, safetensors_bytes):
    path = tiny_model_dir / "model.safetensors"
    expected = {name: tuple(tensor.shape) for name, tensor in load_file(path).items()}
    assert {name: shape for name, (_, shape) in read_header(path).items()} == expected
    other = tmp_path / "empty.safetensors"
    other.write_bytes(safetensors_bytes({"__metadata__": {"format": "pt"}}))
    assert read_header(other) == {}
    other.write_bytes(safetensors_bytes({"b": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, b"\0\0"))
    assert read_header(other) == {"b": ("f4", (4,))}


@pytest.mark.parametrize("kind", ["overlapping", "overflowing", "twice the same name", "nested without end"])
def test_planning_and_loading_refuse_it(refused, model_copy, data_file, safetensors_bytes, kind):
    (model_copy / "model.safetensors").write_bytes(safetensors_bytes(*HOSTILE[kind]))
    assert "model.safetensors" in refused("plan", "--model", model_copy, "--data", data_file)
    with pytest.raises(InputError):
        load_model(str(model_copy), dtype="float32")


# ── adapters ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tuned(tiny_model_dir, data_file, tmp_path_factory):
    import welltuned

    out = tmp_path_factory.mktemp("run") / "out"
    welltuned.train(model=str(tiny_model_dir), data=data_file, out=out, max_steps=2, r=4)
    return out


@pytest.fixture
def adapter(tuned, tmp_path):
    import shutil

    return shutil.copytree(tuned / "adapter", tmp_path / "adapter")


@pytest.fixture
def loaded(tiny_model_dir):
    """A function that puts an adapter on a model."""
    import torch

    return lambda folder: load_adapter(load_model(str(tiny_model_dir), dtype=torch.float32), folder)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_adapter(adapter, loaded, safetensors_bytes, kind):
    (adapter / "adapter_model.safetensors").write_bytes(safetensors_bytes(*HOSTILE[kind]))
    with pytest.raises(InputError):
        loaded(adapter)


@pytest.mark.parametrize("size", [0, 8, 40, 888])
def test_a_cut_adapter(adapter, loaded, size):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError):
        loaded(adapter)


def test_a_pickled_adapter(adapter, loaded, canary):
    import pickle

    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(canary))
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        loaded(adapter)
    assert not canary.sang


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 10**9},
        {"r": True},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"rank_pattern": {"(a+)+b": 4}},
        {"rank_pattern": {"q_proj": 10**9}},
        {"rank_pattern": {"q_proj": "4"}},
        {"rank_pattern": [1]},
        {"target_parameters": 7},
        {"target_parameters": [None]},
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}, "peft_type": "EVIL"},
    ],
    ids=str,
)
def test_a_hostile_adapter_config(adapter, loaded, change_json, changes):
    change_json(adapter / "adapter_config.json", **changes)
    with pytest.raises(InputError):
        loaded(adapter)


@pytest.mark.parametrize("text", ["[]", "7", "[" * 100_000, "\x00", '{"peft_type": "LORA"'])
def test_an_adapter_config_that_is_none(adapter, loaded, text):
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(InputError):
        loaded(adapter)


def test_an_adapter_that_is_sound(adapter, loaded):
    assert loaded(adapter).settings[0].r == 4


def test_names_of_other_tensors(adapter, loaded):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "../../evil": tensors[next(iter(tensors))].clone()}, path)
    with pytest.raises(InputError, match="has no place"):
        loaded(adapter)


# ── GGUF ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _gguf(*parts):
    return b"GGUF" + b"".join(parts)


@pytest.mark.parametrize(
    "content",
    [
        _gguf(struct.pack("<IQQ", 3, 2**63, 0)),
        _gguf(struct.pack("<IQQ", 3, 0, 1), struct.pack("<Q", 2**60)),  # a key of 2^60 bytes
        _gguf(struct.pack("<IQQ", 3, 0, 1), struct.pack("<Q", 1), b"k", struct.pack("<IIQ", 9, 0, 2**62)),
        _gguf(  # arrays of arrays of arrays …
            struct.pack("<IQQ", 3, 0, 1), struct.pack("<Q", 1), b"k", struct.pack("<I", 9),
            struct.pack("<IQ", 9, 1) * 5000,
        ),
        _gguf(struct.pack("<IQQ", 3, 1, 0), struct.pack("<Q", 1), b"t", struct.pack("<I", 2**32 - 1)),  # dimensions
    ],
    ids=["tensors", "key", "array", "nested", "dimensions"],
)  # fmt: skip
def test_a_hostile_gguf(refused, tmp_path, data_file, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert "m.gguf" in refused("plan", "--model", path, "--data", data_file)
