"""Loading in 4 bits: the same codes as from the dense model, and never the dense model in memory."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from welltuned.errors import InputError
from welltuned.models.experts import NF4Experts, quantize_experts
from welltuned.models.frozen import NF4Linear, quantize_linears
from welltuned.models.load import load_model

pytest.importorskip("bitsandbytes")

GPT2 = dict(n_embd=32, n_layer=2, n_head=4)
GPT_OSS = dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=2, head_dim=8)


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(5, 29)[None], use_cache=False).logits


def plain(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("gpt2", GPT2), ("qwen3_moe", MOE), ("gpt_oss", GPT_OSS)])
def test_read_in_four_bits_is_quantised_after_reading(make_model_dir, kind, changes, dtype):
    """Bit for bit, wherever the conversion to the wanted dtype happens; the head stays dense."""
    folder = make_model_dir(kind, **changes)
    after = plain(folder, dtype)
    quantize_linears(after)
    quantize_experts(after)
    read = load_model(str(folder), dtype=dtype, nf4=True)
    layers = {name: module for name, module in read.named_modules() if isinstance(module, NF4Linear)}
    assert layers.keys() == {name for name, module in after.named_modules() if isinstance(module, NF4Linear)}
    for name, module in layers.items():
        assert torch.equal(module.frozen.packed, after.get_submodule(name).frozen.packed)
    stacks = {name: module for name, module in read.named_modules() if isinstance(module, NF4Experts)}
    assert len(stacks) == {"qwen3_moe": 1, "gpt_oss": 2}.get(kind, 0)
    for name, module in stacks.items():
        for leaf, codes in module.frozen.items():
            others = after.get_submodule(name).frozen[leaf].weights
            assert all(torch.equal(a.packed, b.packed) for a, b in zip(codes.weights, others, strict=True))
    assert torch.equal(logits(read), logits(after))
    assert not any(tensor.is_meta for tensor in (*read.parameters(), *read.buffers()))
    assert isinstance(read.get_output_embeddings(), torch.nn.Linear)


def test_attention_is_sdpa_where_it_can_be(make_model_dir):
    for kind, changes, wanted in (("llama", {}, "sdpa"), ("gpt_oss", GPT_OSS, "eager")):
        model = load_model(str(make_model_dir(kind, **changes)), dtype=torch.float32)
        assert model.config._attn_implementation == wanted


def test_shards(make_model_dir, tmp_path):
    whole = plain(make_model_dir(tie_word_embeddings=False), torch.float32)
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    quantize_linears(whole)
    assert torch.equal(logits(load_model(str(tmp_path), dtype=torch.float32, nf4=True)), logits(whole))


def test_the_model_is_not_marked_as_quantised(tiny_model_dir, tmp_path):
    """transformers would refuse to save it, and a config.json with a quantiser of ours could not be read by others."""
    model = load_model(str(tiny_model_dir), dtype=torch.float32, nf4=True)
    assert not model.is_quantized and model.hf_quantizer is None
    model.config.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("nf4", [False, True])
def test_a_weight_that_is_missing_or_of_another_shape_is_refused(make_model_dir, nf4):
    folder = make_model_dir()
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    whole = tensors.pop(name)
    for changed, match in (({}, f"the weights lack {name}"), ({name: whole[:, :20].clone()}, r"is \(48, 20\) in")):
        save_file({**tensors, **changed}, path, metadata={"format": "pt"})
        with pytest.raises(InputError, match=match):
            load_model(str(folder), dtype=torch.float32, nf4=nf4)


MEASURE = """
import re, sys, torch
from pathlib import Path
from welltuned.kernels.nf4 import NF4Weight
from welltuned.models.load import load_model
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
NF4Weight.quantize(torch.randn(64, 64)).dense(torch.float32)  # what the libraries themselves take
before = peak()
model = load_model(sys.argv[1], dtype=torch.float32, nf4=sys.argv[2] == "nf4")
print(peak() - before)
"""  # not ru_maxrss, which a process inherits from the one that started it


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc and glibc's allocator are Linux's")
def test_peak_memory(tmp_path):
    """A model of 200 MB in float32, stored in bfloat16: dense it takes those 200 MB and the mapped file's 100.

    In 4 bits the codes take 28, and the file's pages (which the kernel may drop) 100; the rest is what bitsandbytes
    needs to quantise one weight of 16 MB on a CPU.
    """
    config = LlamaConfig(
        vocab_size=500, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=8,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    size = sum(p.numel() for p in model.parameters())
    assert 190e6 < 4 * size < 220e6
    model.save_pretrained(tmp_path)
    taken = {}
    for how in ("dense", "nf4"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path), how],
            env={"PYTHONPATH": ":".join(sys.path), "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        taken[how] = int(done.stdout.split()[-1])
    assert taken["dense"] > 5.5 * size
    assert taken["nf4"] < 4 * size
    assert taken["nf4"] - 2 * size < 0.5 * (taken["dense"] - 2 * size)  # beyond the file's pages
