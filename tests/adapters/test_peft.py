"""Adapters between us and PEFT, both ways, by the logits that they give."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from welltuned.errors import InputError
from welltuned.models.adapter_file import load_adapter
from welltuned.models.load import load_model

peft = pytest.importorskip("peft")

KINDS = {
    "wide llama": dict(hidden_size=64, intermediate_size=128),  # rows of whole blocks of 4-bit codes
    "llama": {},
    "qwen2": {},  # biases in q, k and v
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
IDS = torch.arange(5, 29)[None]


@pytest.fixture(scope="module")
def folders(make_model_dir):
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = make_model_dir(kind.removeprefix("wide "), **KINDS[kind])
        return str(made[kind])

    return folder


def plain(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def same(a, b):
    return float((a - b).abs().max() / b.abs().max()) < 1e-5


# ── from PEFT to us ──────────────────────────────────────────────────────────────────────────────────────────────────


def made_by_peft(folder, to, **options):
    """An adapter with random weights, saved by PEFT; its logits."""
    model = peft.get_peft_model(plain(folder), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    draw = torch.Generator().manual_seed(0)
    for _, p in model.named_parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn(p.shape, generator=draw)
    model.save_pretrained(to)
    return logits(model)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", dict(use_rslora=True, lora_alpha=3)),
        ("llama", dict(lora_dropout=0.3)),
        ("llama", dict(target_modules=["q_proj", "layers.1.mlp.up_proj"])),
        ("llama", dict(target_modules=r".*layers\.1.*\.(k|v)_proj")),
        ("llama", dict(target_modules="all-linear")),
        ("llama", dict(layers_to_transform=[1])),
        ("llama", dict(init_lora_weights="gaussian")),
        ("llama", dict(use_dora=True)),
        ("llama", dict(rank_pattern={"v_proj": 8, "layers.0.mlp.up_proj": 2}, alpha_pattern={"q_proj": 3})),
        ("llama", dict(modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True)),
        ("llama", dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
        ("qwen2", dict(use_dora=True, bias="all")),
        ("qwen2", dict(bias="lora_only")),
        ("qwen2", dict(bias="all")),
        ("qwen2", dict(bias="all", target_modules=["o_proj"])),
        ("gpt2", dict(fan_in_fan_out=True)),
        ("gpt2", dict(fan_in_fan_out=True, bias="lora_only")),
        ("gpt2", dict(fan_in_fan_out=True, bias="all", use_rslora=True)),
    ],
)
def test_an_adapter_of_pefts_loads_here(folders, tmp_path, kind, options):
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind], **options}
    expected = made_by_peft(folders(kind), tmp_path, **options)
    model = load_model(folders(kind), dtype=torch.float32)
    base = logits(model)
    assert same(base, logits(plain(folders(kind)))) and not same(base, expected)
    bank = load_adapter(model, tmp_path)
    assert same(logits(model), expected)
    bank.detach()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize(
    "options",
    [
        dict(lora_bias=True),
        dict(trainable_token_indices=[1, 2]),
        dict(alora_invocation_tokens=[7]),
    ],
)
def test_what_is_more_than_lora_is_refused(folders, tmp_path, options):
    made_by_peft(folders("llama"), tmp_path, target_modules=["q_proj", "v_proj"], **{"r": 4, **options})
    model = load_model(folders("llama"), dtype=torch.float32)
    before = logits(model)
    with pytest.raises(InputError, match=next(iter(options))) as error:
        load_adapter(model, tmp_path)
    assert "PEFT" in str(error.value) and torch.equal(logits(model), before)


def test_a_copy_of_a_shared_weight_is_refused(folders, tmp_path):
    """PEFT trains a copy of the head and leaves the embedding; here they are one."""
    made_by_peft(folders("llama"), tmp_path, target_modules=["q_proj"], r=4, modules_to_save=["lm_head"])
    with pytest.raises(InputError, match="lm_head was trained without model.embed_tokens, which shares"):
        load_adapter(load_model(folders("llama"), dtype=torch.float32), tmp_path)


def test_starts_that_change_the_base_are_refused(folders, tmp_path):
    """A PiSSA adapter stands on what is left of the base weights, so that on the base itself its output is wrong."""
    made_by_peft(folders("llama"), tmp_path, r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    with pytest.raises(InputError, match=r"begun with pissa .* path_initial_model_for_weight_conversion"):
        load_adapter(load_model(folders("llama"), dtype=torch.float32), tmp_path)


def spoil(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(NAME), "the adapter has no tensor"),
        (lambda t: t.update({NAME.replace("lora_B", "lora_C"): torch.ones(1)}), "the model has no place for"),
        (lambda t: t.update({NAME.replace("layers.1", "layers.9"): torch.ones(1)}), "layers.9"),
        (lambda t: t.update({NAME: torch.ones(32, 5)}), r"\(32, 5\) in the adapter and \(32, 4\) in the model"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(folders, tmp_path, change, match):
    made_by_peft(folders("llama"), tmp_path, r=4, target_modules=["q_proj"])
    spoil(tmp_path, change)
    with pytest.raises(InputError, match=match):
        load_adapter(load_model(folders("llama"), dtype=torch.float32), tmp_path)


def test_a_damaged_adapter_is_refused(folders, tmp_path):
    made_by_peft(folders("llama"), tmp_path, r=4, target_modules=["q_proj"])
    model = load_model(folders("llama"), dtype=torch.float32)
    before = logits(model)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-50])
    with pytest.raises(InputError, match="damaged"):
        load_adapter(model, tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        load_adapter(model, tmp_path)
    weights.write_bytes(whole)
    settings = json.loads(config.read_text())
    for text, match in (("{", "not JSON"), (json.dumps({**settings, "peft_type": "IA3"}), "IA3"),
                        (json.dumps({k: v for k, v in settings.items() if k != "r"}), "r")):  # fmt: skip
        config.write_text(text)
        with pytest.raises(InputError, match=match):
            load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


# ── from us to PEFT ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def trained(folders, data_file, tmp_path_factory):
    """A function that trains an adapter on a tiny model and returns the run's folder."""
    import welltuned

    def train(kind, **options):
        out = tmp_path_factory.mktemp("run") / "out"
        welltuned.train(
            out=out, model=folders(kind), data=data_file, max_steps=6, effective_batch_size=16,
            **{"learning_rate": 2e-2, **options},
        )  # fmt: skip
        return out

    return train


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", dict(use_rslora=True, r=8, lora_alpha=4)),
        ("llama", dict(target_modules=["q_proj", "v_proj"], lora_alpha=2.5)),
        ("llama", dict(target_modules=["layers.1.mlp.down_proj", "k_proj"])),
        ("llama", dict(use_dora=True)),
        ("llama", dict(init_lora_weights="pissa", use_rslora=True)),
        ("llama", dict(init_lora_weights="olora", learning_rate=2e-3)),
        ("llama", dict(rank_pattern={"down_proj": 5}, alpha_pattern={"q_proj": 3}, layers_to_transform=[1])),
        ("llama", dict(modules_to_save=["embed_tokens"], loraplus_lr_ratio=4.0)),
        ("qwen2", dict(bias="lora_only", target_modules=["q_proj", "o_proj"])),
        ("qwen2", dict(bias="all")),
        ("gpt2", {}),
        ("gpt2", dict(bias="lora_only")),
    ],
)
def test_our_adapter_loads_in_peft_and_here(folders, trained, kind, options):
    from welltuned.api import load

    out = trained(kind, **options)
    ours = load(out, device="cpu").model
    base = plain(folders(kind))
    without = logits(base)
    theirs = peft.PeftModel.from_pretrained(base, out / "adapter").eval()
    assert same(logits(ours), logits(theirs))
    assert not same(without, logits(theirs))
    assert theirs.peft_config["default"].base_model_name_or_path == folders(kind)


def test_what_trained_is_what_loads(trained):
    """The model as it stands after training, the reloaded one, and no dropout left in either."""
    import welltuned
    from welltuned.api import load

    out = trained("llama", lora_dropout=0.2)
    assert torch.equal(logits(load(out, device="cpu").model), logits(load(out, device="cpu").model))
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.2 and config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert welltuned.load(out, device="cpu").bank.settings[0].lora_dropout == 0.2


def test_merged_by_peft(folders, trained):
    from welltuned.api import load

    out = trained("llama")
    merged = peft.PeftModel.from_pretrained(plain(folders("llama")), out / "adapter").merge_and_unload()
    assert float((logits(merged) - logits(load(out, device="cpu").model)).abs().max()) < 1e-4


def test_a_qlora_adapter_in_peft(folders, trained):
    """On bitsandbytes' own 4-bit layers, which hold the same codes, and on the dense weights that they stand for."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from welltuned.api import load
    from welltuned.models.frozen import NF4Linear

    out = trained("wide llama", tune="qlora")
    ours = load(out, device="cpu").model
    dense = plain(folders("wide llama"))
    quantised = load_model(folders("wide llama"), dtype=torch.float32, nf4=True)
    replaced = 0
    for name, module in quantised.named_modules():
        if isinstance(module, NF4Linear):
            weight = dense.get_submodule(name).weight
            exact = weight.data.clone()
            weight.data.copy_(module.frozen.dense(torch.float32))
            assert not torch.equal(weight, exact)
            replaced += 1
    assert replaced == 14
    theirs = peft.PeftModel.from_pretrained(dense, out / "adapter").eval()
    assert same(logits(ours), logits(theirs))
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(folders("wide llama"), dtype=torch.float32, quantization_config=config)
    # Not eval(): there bitsandbytes' CPU path packs the codes anew.
    theirs = peft.PeftModel.from_pretrained(base, out / "adapter").train()
    assert same(logits(ours), logits(theirs))


def test_a_fully_tuned_model_in_plain_transformers(folders, trained):
    from transformers import AutoTokenizer

    from welltuned.api import load

    out = trained("llama", tune="full")
    ours, theirs = load(out, device="cpu"), plain(out / "model")
    assert torch.equal(logits(ours.model), logits(theirs))
    assert not same(logits(plain(folders("llama"))), logits(theirs))
    assert AutoTokenizer.from_pretrained(out / "model").chat_template == ours.tokenizer.chat_template
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert theirs.dtype == torch.float32
