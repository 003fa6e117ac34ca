"""GGUF files: read back with transformers' own reader, which must find the model that was written."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from welltuned.adapters.files import read_adapter
from welltuned.adapters.gguf.families import FAMILIES, interleaved, rope_factors
from welltuned.adapters.gguf.read_back import read_back
from welltuned.adapters.gguf.vocabulary import Kind, splitting_of, vocabulary_of
from welltuned.adapters.gguf.write import Quantization, write_lora, write_model
from welltuned.errors import InputError
from welltuned.models.load import load_config, load_model, load_tokenizer

gguf = pytest.importorskip("gguf")

CHANGES = {
    "llama": {},
    "mistral": dict(sliding_window=None, head_dim=8),
    "qwen2": {},
    "qwen3": dict(head_dim=16),
    "gemma2": dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=16, num_hidden_layers=4),
    "gemma3_text": dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=16, num_hidden_layers=7),
    "phi3": dict(original_max_position_embeddings=256),
}


@pytest.fixture(scope="module")
def folders(make_model_dir):
    made = {}

    def folder(kind, **more):
        key = (kind, *sorted(map(str, more.items())))
        if key not in made:
            made[key] = make_model_dir(kind, **{**CHANGES[kind], **more})
        return made[key]

    return folder


def written(folder, path, kind=Quantization.F32, **more):
    config, tokenizer = load_config(str(folder)), load_tokenizer(str(folder))
    options = dict(config=config, tokenizer=tokenizer, template=tokenizer.chat_template, kind=kind, name="tiny")
    return write_model(folder, path, **{**options, **more})


def test_all_families_are_tried():
    assert CHANGES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("kind", CHANGES)
def test_read_back_by_transformers(folders, tmp_path, kind, logits, plain):
    folder, path = folders(kind), tmp_path / "model.gguf"
    written(folder, path)
    ours, theirs = logits(plain(folder)), logits(read_back(path, load_config(str(folder))))
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(ours.abs().max())


@pytest.mark.parametrize(("kind", "most"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 3e-2)])
def test_number_formats(folders, tmp_path, logits, plain, kind, most):
    folder, path = folders("llama"), tmp_path / "model.gguf"
    found = written(folder, path, Quantization(kind))
    ours, theirs = logits(plain(folder)), logits(load_model(str(path), dtype=torch.float32))
    error = float((ours - theirs).norm() / ours.norm())
    assert 0 < error < most
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["blk.0.attn_q.weight"] == kind.upper() and types["blk.0.attn_norm.weight"] == "F32"
    if kind == "q8_0":  # rows of 48 are no blocks of 32: kept wider, and said
        assert types["blk.0.ffn_down.weight"] == "F16" and len(found.wider) == 2


def test_the_tokenizer_is_written_whole(folders, tmp_path, tiny_tokenizer):
    path = tmp_path / "model.gguf"
    assert written(folders("llama"), path).splitting == "gpt-2"
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = "3 times the red hat<|im_end|>\n  éß 12345"
    assert theirs(text).input_ids == tiny_tokenizer(text).input_ids
    assert theirs.chat_template == tiny_tokenizer.chat_template
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tiny_tokenizer.eos_token_id
    assert fields["tokenizer.ggml.eot_token_id"].contents() == tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_rotary_halves_are_interleaved():
    """Row i of the first half, row i of the second, and so on; for each head by itself."""
    rows = torch.arange(8)[:, None]
    assert interleaved(rows, 1).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert interleaved(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_llama_3s_rotary_scaling(folders, tmp_path):
    """By the formula of the model's paper, which transformers computes too: long waves slowed, short ones left."""
    rope = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=64)  # fmt: skip
    folder = folders("llama", rope_parameters=rope, head_dim=16)
    factors = rope_factors(load_config(str(folder)))
    waves = 2 * np.pi * 10000.0 ** (np.arange(0, 16, 2) / 16)
    smooth = (64 / waves - 1.0) / (4.0 - 1.0)
    expected = np.where(waves < 16, 1.0, np.where(waves > 64, 8.0, 1 / ((1 - smooth) / 8 + smooth)))
    assert np.allclose(factors.numpy(), expected, rtol=1e-5) and len(set(expected.round(3))) > 2
    assert rope_factors(load_config(str(folders("llama")))) is None
    written(folder, tmp_path / "model.gguf")
    found = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert np.allclose(found["rope_freqs.weight"], expected, rtol=1e-5)


def test_an_adapter_as_a_file(trained_run, tmp_path):
    adapter = read_adapter(trained_run(use_rslora=True, r=8) / "adapter")
    base = adapter.config["base_model_name_or_path"]
    found = write_lora(adapter, tmp_path / "lora.gguf", config=load_config(base), name="x")
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    assert found.tensors == len(tensors) == 28
    alpha = reader.fields["adapter.lora.alpha"].contents()
    assert reader.fields["general.type"].contents() == "adapter"
    from welltuned.adapters.files import pair

    for module, target in (("self_attn.q_proj", "attn_q"), ("mlp.down_proj", "ffn_down")):
        p = pair(adapter, f"base_model.model.model.layers.1.{module}")
        a, b = (tensors[f"blk.1.{target}.weight.lora_{x}"] for x in "ab")
        expected = p.scale * (p.b_EOR @ p.a_ERI)[0]  # llama.cpp scales by alpha / rank, rsLoRA or not
        if target == "attn_q":
            expected = interleaved(expected, 4)
        assert np.allclose(alpha / a.shape[0] * b @ a, expected.numpy(), atol=1e-5)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("olmo2", {}, "models of type olmo2 are not exported to GGUF"),
        ("qwen3", dict(use_sliding_window=True, max_window_layers=1), "sliding windows"),
        ("gemma2", dict(head_dim=8, query_pre_attn_scalar=5), "queries scaled by 5"),
        (
            "gemma3_text",
            dict(head_dim=8, query_pre_attn_scalar=8, layer_types=["full_attention", "sliding_attention"]),
            "order of layers",
        ),
        ("llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), "of type dynamic"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise(make_model_dir, tmp_path, kind, changes, match):
    folder = make_model_dir(kind, **changes)
    with pytest.raises(InputError, match=match) as error:
        written(folder, tmp_path / "model.gguf")
    assert "export --to merged" in str(error.value) and not (tmp_path / "model.gguf").exists()


def test_a_tensor_without_a_place(folders, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.0.surprise.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="surprise.weight has no place"):
        written(folder, tmp_path / "model.gguf")


def test_numbers_beyond_float16(folders, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="beyond float16's range; use bf16"):
        written(folder, tmp_path / "model.gguf", Quantization.F16)
    written(folder, tmp_path / "bf16.gguf", Quantization.BF16)


def test_ways_of_splitting_text():
    """As the tokenizer.json files of these models write them."""

    def byte_level(*steps, use_regex=False, **model):
        last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}
        return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, last]}, "model": model}

    def split(pattern):
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

    llama3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
    digits = {"type": "Digits", "individual_digits": True}
    assert splitting_of(byte_level(use_regex=True)) == "gpt-2"
    assert splitting_of(byte_level(digits, use_regex=True)) == "smollm"
    assert splitting_of(byte_level(split(llama3), ignore_merges=True)) == "llama-bpe"
    assert splitting_of(byte_level(split(llama3.replace("{1,3}", "")))) == "qwen2"
    for unknown in (byte_level(split(r"\w+")), byte_level(digits), {"pre_tokenizer": None, "model": {}}):
        if unknown == byte_level(digits):
            continue
        with pytest.raises(InputError, match="way of splitting text"):
            splitting_of(unknown)


def sentencepiece_like():
    """What SentencePiece's pairs become as tokenizer.json: a space is ▁, unknown bytes are <0x..>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefgh", "▁a", "bc", "▁abc", "de"]
    merges = [("▁", "a"), ("b", "c"), ("▁a", "bc"), ("d", "e")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    raw = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_sentencepiece():
    found = vocabulary_of(sentencepiece_like(), 300)
    assert (found.model, found.pre, found.merges, found.space_prefix) == ("llama", "default", (), True)
    kind, score = (dict(zip(found.tokens, of, strict=True)) for of in (found.kinds, found.scores))
    assert kind["<unk>"] is Kind.UNKNOWN and kind["</s>"] is Kind.CONTROL and kind["<0x41>"] is Kind.BYTE
    assert kind["▁abc"] is Kind.NORMAL and kind["[UNUSED299]"] is Kind.UNUSED
    assert score["▁a"] > score["bc"] > score["▁abc"] > score["de"] > score["h"]


def test_a_tokenizer_larger_than_the_embedding(tiny_tokenizer):
    with pytest.raises(InputError, match="the embedding ends with 99"):
        vocabulary_of(tiny_tokenizer, 100)


# ── the real client ──────────────────────────────────────────────────────────────────────────────────────────────────

CLIENT = """
import json, sys
import numpy as np
from llama_cpp import Llama
job = json.load(sys.stdin)
model = Llama(job["model"], lora_path=job.get("lora"), n_ctx=256, logits_all=True, verbose=False, seed=1)
model.eval(job["ids"])
print(json.dumps({
    "logits": np.array(model.scores[: len(job["ids"])]).tolist(),
    "tokens": [model.tokenize(t.encode(), add_bos=False, special=False) for t in job["texts"]],
}))
"""


def llama_cpp(job):
    """What llama.cpp says, in whatever environment it is installed in."""
    python = os.environ.get("WELLTUNED_LLAMA_PYTHON")
    if python is None:
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; or set WELLTUNED_LLAMA_PYTHON")
        import sys

        python = sys.executable
    done = subprocess.run([python, "-c", CLIENT], input=json.dumps(job), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


TEXTS = ["3 times the red hat", "  two  spaces\nand\n\nlines", "12345 éß 漢字 🙂", "it's I'll DON'T"]


@pytest.mark.parametrize("kind", CHANGES)
def test_llama_cpp_computes_the_same(folders, tmp_path, kind, logits, plain, tiny_tokenizer):
    folder, path = folders(kind), tmp_path / "model.gguf"
    written(folder, path)
    ids = torch.arange(5, 29).tolist()
    said = llama_cpp({"model": str(path), "ids": ids, "texts": TEXTS})
    theirs, ours = torch.tensor(said["logits"]), logits(plain(folder))[0]
    assert float((ours - theirs).norm() / ours.norm()) < 5e-3  # its key-value cache is in 16 bits
    assert said["tokens"] == [tiny_tokenizer(t, add_special_tokens=False).input_ids for t in TEXTS]


def test_llama_cpp_applies_the_adapter(trained_run, tmp_path, logits):
    from welltuned.api import load

    run = trained_run()
    adapter = read_adapter(run / "adapter")
    base = Path(adapter.config["base_model_name_or_path"])
    written(base, tmp_path / "base.gguf")
    write_lora(adapter, tmp_path / "lora.gguf", config=load_config(str(base)), name="x")
    ids = torch.arange(5, 29).tolist()
    job = {"model": str(tmp_path / "base.gguf"), "ids": ids, "texts": []}
    ours = logits(load(run, device="cpu").model)[0]
    tuned, plain_ = (torch.tensor(llama_cpp(j)["logits"]) for j in ({**job, "lora": str(tmp_path / "lora.gguf")}, job))
    assert float((ours - tuned).norm() / ours.norm()) < 1e-2 < float((ours - plain_).norm() / ours.norm())
