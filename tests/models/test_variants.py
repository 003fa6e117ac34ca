"""Variants of LoRA beside PEFT's own, in float64: loss, every gradient, and what is written and read again."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from welltuned.errors import InputError
from welltuned.models.adapter_file import load_adapter, save_adapter
from welltuned.models.fuse import find_head, fuse
from welltuned.models.lora import MAGNITUDE, Bias, Init, LoraSettings, attach, start_loftq
from welltuned.models.lora_settings import FROM_WEIGHTS
from welltuned.models.saved import named_modules

peft = pytest.importorskip("peft")

PATTERNS = dict(rank_pattern=(("down_proj", 5), ("layers.1.self_attn.q_proj", 1)), alpha_pattern=(("up_proj", 3.0),))


def options(s, targets):
    start = {"true": True}.get(str(s.init), str(s.init))
    if s.svd_iterations is not None:
        start = f"pissa_niter_{s.svd_iterations}"
    return peft.LoraConfig(
        r=s.r, lora_alpha=s.lora_alpha, use_rslora=s.use_rslora, bias=s.bias.value, lora_dropout=0.0,
        use_dora=s.use_dora, rank_pattern=dict(s.rank_pattern), alpha_pattern=dict(s.alpha_pattern),
        init_lora_weights=start, target_modules=list(targets),
    )  # fmt: skip


def twin_of(model, bank):
    """PEFT around a copy of the untouched model, with the bank's numbers.

    PEFT takes starts off the base in float32 only, so that is done here in its place; the test below has PEFT do it.
    """
    settings = bank.settings[0]
    plain = replace(settings, init=Init.KAIMING)
    twin = peft.get_peft_model(model, options(plain, bank.targets))
    start = bank.tensors_at_start()
    for name in bank.targets if settings.init in FROM_WEIGHTS else ():
        weight = twin.base_model.model.get_submodule(name).base_layer.weight
        taken = settings.scale_of(name) * start[f"{name}.lora_B"] @ start[f"{name}.lora_A"]
        weight.data -= taken.t() if isinstance(bank.modules[name].base, Conv1D) else taken
    for name, tensor in bank.tensors().items():
        module, _, leaf = name.rpartition(".")
        if leaf.startswith("lora_"):
            twin.base_model.model.get_submodule(module)._modules[leaf]["default"].weight.data = tensor.clone()
    return twin.eval()


def gradients(twin, bank):
    found = {}
    for slot in bank.slots:
        module, _, leaf = slot.name.rpartition(".")
        found[slot.name] = twin.base_model.model.get_submodule(module)._modules[leaf]["default"].weight.grad
    return found


SETTINGS = {
    "patterns": LoraSettings(r=3, **PATTERNS),
    "patterns, rsLoRA": LoraSettings(r=3, use_rslora=True, **PATTERNS),
    "DoRA": LoraSettings(r=3, use_dora=True),
    "DoRA, rsLoRA, patterns": LoraSettings(r=3, use_dora=True, use_rslora=True, **PATTERNS),
    "PiSSA": LoraSettings(r=3, lora_alpha=3, init=Init.PISSA),
    "PiSSA, scaled": LoraSettings(r=4, lora_alpha=12, init=Init.PISSA, use_rslora=True),
    "OLoRA": LoraSettings(r=3, lora_alpha=6, init=Init.OLORA),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_as_peft_computes_it(tools, name, family):
    """qwen2 has biases, gpt2 a transposed weight and an MLP that is not fused."""
    settings = SETTINGS[name]
    if family == "gpt2" and (settings.rank_pattern or settings.use_dora):
        pytest.skip("patterns name llama's layers" if settings.rank_pattern else "PEFT has no float64 for it")
    with tools.wide():
        model = tools.model(family).double()
        untouched = tools.copy(model)
        bank = attach(model, settings)
        engine = tools.Engine(model, bank, fuse(model, bank), find_head(model))  # as in training: before B has moved
        tools.randomise(bank)
        examples = tools.examples()
        value, _, (grads,) = engine.step(examples)
        twin = twin_of(untouched, engine.bank)
        plain = tools.plain_loss(twin, examples)
        plain.backward()
        assert abs(value - float(plain)) <= 1e-10 * abs(float(plain))
        assert tools.error(grads, gradients(twin, engine.bank)) < 1e-8


@pytest.mark.parametrize("init", [Init.PISSA, Init.OLORA])
def test_starts_are_pefts_and_leave_the_model_what_it_was(tools, init):
    model = tools.model("llama")
    settings = LoraSettings(r=3, lora_alpha=6, init=init)
    before = logits(model)
    twin = peft.get_peft_model(copy.deepcopy(model), options(settings, ["q_proj", "down_proj"]))
    bank = attach(model, tools.replace(settings, target_modules=("q_proj", "down_proj")))
    for name, tensor in bank.tensors().items():
        module, _, leaf = name.rpartition(".")
        theirs = twin.base_model.model.get_submodule(module)._modules[leaf]["default"].weight
        assert torch.allclose(tensor, theirs, rtol=1e-4, atol=1e-5), name
    assert torch.allclose(logits(model), before, atol=1e-4) and torch.allclose(logits(twin), before, atol=1e-3)


def test_pissa_by_iterations_is_near_the_exact_one(tools):
    exact, quick = (
        attach(tools.model("llama"), LoraSettings(r=4, init=Init.PISSA, svd_iterations=n)) for n in (None, 16)
    )
    for name, a in exact.modules.items():
        b = quick.modules[name]
        one, two = ((m.lora_B[0] @ m.lora_A[0]).detach() for m in (a, b))
        assert 0.9 < float(two.norm() / one.norm()) < 1.001  # of a random matrix, whose directions are all alike
    again = attach(tools.model("llama"), LoraSettings(r=4, init=Init.PISSA, svd_iterations=16))
    assert torch.equal(quick.flat_KP, again.flat_KP)  # by the seed, whatever else is drawn


@pytest.mark.parametrize("name", [*SETTINGS, "layers", "DoRA and biases", "embedding", "head", "both"])
@pytest.mark.parametrize("family", ["llama", "llama tied"])
def test_what_is_written_is_what_peft_and_we_read(tools, tmp_path, name, family):
    model = tools.model(family)
    untouched, again = tools.copy(model), tools.copy(model)
    more = {
        "layers": LoraSettings(r=3, layers_to_transform=(1,)),
        "DoRA and biases": LoraSettings(r=3, use_dora=True, bias=Bias.ALL),
    }
    wanted = {"embedding": ("embed_tokens",), "head": ("lm_head",), "both": ("embed_tokens", "lm_head")}
    saved = named_modules(model, wanted.get(name, ()))
    bank = attach(model, SETTINGS.get(name) or more.get(name) or LoraSettings(r=3), saved)
    if name == "layers":
        assert len(bank.targets) == 7 and all(".1." in target for target in bank.targets)
    draw = torch.Generator().manual_seed(0)
    bank.flat_KP += 0.1 * torch.randn(bank.flat_KP.shape, generator=draw)
    expected, base = logits(model), logits(untouched)
    assert float((expected - base).abs().max()) > 1e-2
    save_adapter(bank, tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(untouched, tmp_path).eval()
    assert torch.allclose(logits(theirs), expected, rtol=1e-4, atol=2e-5)
    ours = load_adapter(again, tmp_path)
    assert torch.allclose(logits(again), expected, rtol=1e-4, atol=2e-5)
    ours.detach()
    assert torch.equal(logits(again), base)
    if name in ("PiSSA", "OLoRA"):
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["r"] == 6 and config["init_lora_weights"] is True


def test_disabled_is_the_base(tools):
    """Also where the adapter stands on what is left of the weights, and where rows are scaled."""
    for settings in (SETTINGS["PiSSA"], SETTINGS["DoRA"]):
        model = tools.model("llama")
        base = logits(model)
        bank = attach(model, settings)
        bank.flat_KP += 0.1
        with bank.disabled():
            assert torch.equal(logits(model), base)
        assert not torch.allclose(logits(model), base, atol=1e-2)


def test_several_adapters_of_one_bank(tools):
    """Each with its own start, strength and magnitudes, by rows."""
    for name in ("PiSSA", "DoRA"):
        first = SETTINGS[name]
        model = tools.model("llama")
        bank = attach(model, [first, tools.replace(first, lora_alpha=8.0, seed=1)])
        bank.flat_KP += 0.1 * torch.randn(bank.flat_KP.shape, generator=torch.Generator().manual_seed(1))
        module = bank.modules["model.layers.0.self_attn.q_proj"]
        x = torch.randn(7, module.projection.weight.shape[1])
        bank.use_rows((3, 4), ())
        both = module(x)
        bank.use_rows((7, 0), ())
        one = module(x)
        bank.use_rows((0, 7), ())
        two = module(x)
        assert torch.allclose(both, torch.cat([one[:3], two[3:]]), atol=1e-6)
        assert not torch.allclose(one, two, atol=1e-2)


def test_loftq_is_pefts_and_nearer_to_the_original(tools):
    pytest.importorskip("bitsandbytes")
    from peft.utils.loftq_utils import _low_rank_decomposition

    from welltuned.models.frozen import quantize_linears

    model = tools.model("llama")
    original = tools.copy(model)
    quantize_linears(model)
    bank = attach(model, LoraSettings(r=4, lora_alpha=4, init=Init.LOFTQ))
    lost = start_loftq(bank, original)
    assert 0 < lost.after < 0.9 * lost.before < 0.3 and "LoftQ" in lost.sentence()
    name = "model.layers.1.mlp.up_proj"
    module = bank.modules[name]
    left = original.get_submodule(name).weight - module.projection.weight.dense(torch.float32)
    parts = _low_rank_decomposition(left.detach(), reduced_rank=4)
    ours, theirs = (module.lora_B[0] @ module.lora_A[0]).detach(), parts["L"] @ parts["R"]
    assert torch.allclose(ours, theirs, atol=1e-5) and ours.abs().max() > 1e-3
    assert torch.equal(bank.start_KP, bank.flat_KP.cpu())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(rank_pattern=(("nothing", 3),)), "rank_pattern: 'nothing' names no adapted linear layer"),
        (dict(alpha_pattern=(("nothing", 3.0),)), "alpha_pattern: 'nothing' names"),
        (dict(layers_to_transform=(7,)), "layers_to_transform: there is nothing to adapt in layer 7"),
        (dict(use_dora=True, lora_dropout=0.1), "use_dora: DoRA starts at B = 0"),
        (dict(use_dora=True, init=Init.PISSA), "use_dora: DoRA starts at B = 0"),
    ],
)
def test_what_cannot_be(tools, settings, match):
    model = tools.model("llama")
    with pytest.raises(InputError, match=match):
        attach(model, LoraSettings(**settings))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("names", "match"),
    [(("q_proj",), "names 2 modules"), (("head",), "names 0 modules"), (("layers.0.mlp.up_proj",), "takes adapters")],
)
def test_modules_that_cannot_be_trained_whole(tools, names, match):
    with pytest.raises(InputError, match=match):
        named_modules(tools.model("llama"), names)
    with pytest.raises(InputError, match="half precision"):
        named_modules(tools.model("llama").to(torch.bfloat16), ("lm_head",))


def test_dora_is_no_fused_mlp(tools):
    """While B is 0 the fused one gives the same numbers, but its magnitudes would never learn."""
    model = tools.model("llama")
    fused = fuse(model, attach(model, LoraSettings(r=3, use_dora=True)))
    assert fused.plain["gated MLPs whose rows DoRA scales"] == 2 and not fused.done["gated MLP"]


def test_magnitudes_do_not_decay(tools):
    bank = attach(tools.model("llama"), LoraSettings(r=3, use_dora=True))
    assert all(slot.start >= bank.decayed for slot in bank.slots if slot.name.endswith(MAGNITUDE))


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(5, 29)[None], use_cache=False).logits.float()


def test_disabled_has_the_bases_biases(tools):
    model = tools.model("qwen2")
    base = logits(model)
    bank = attach(model, LoraSettings(r=3, bias=Bias.ALL))
    bank.flat_KP += 0.1
    tuned = logits(model)
    with bank.disabled():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), tuned) and not torch.equal(tuned, base)
