"""Adapters on experts against PEFT's `target_parameters`: loss, every gradient, and files both ways."""

import json

import pytest
import torch
from safetensors.torch import load_file

from welltuned.errors import InputError
from welltuned.models.adapter_file import load_adapter, save_adapter
from welltuned.models.experts import NF4Experts, expert_stacks, quantize_experts
from welltuned.models.frozen import NF4Linear, quantize_linears
from welltuned.models.lora import Bias, Init, LoraSettings, attach

peft = pytest.importorskip("peft")

EVERYTHING = ("all-linear", "experts")
MORE = {
    "olmoe": ("olmoe", dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2)),
    "granite moe": ("granitemoe", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen2 moe": ("qwen2_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                                    shared_expert_intermediate_size=16)),
}  # fmt: skip
FAMILIES = ("mixtral", "qwen3 moe", "gpt-oss", "deepseek v3", *MORE)
IDS = torch.arange(1, 24)[None]


@pytest.fixture(autouse=True)
def more_families(tools, monkeypatch):
    for name, family in MORE.items():
        monkeypatch.setitem(tools.model.__globals__["FAMILIES"], name, family)


def pytest_generate_tests(metafunc):
    if "moe" in metafunc.fixturenames:
        metafunc.parametrize("moe", FAMILIES)


def settings(r=3, alpha=6, targets=EVERYTHING, **more):
    return LoraSettings(r=r, lora_alpha=alpha, target_modules=targets, **more)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def same(a, b, limit=1e-5):
    return float((a - b).abs().max() / b.abs().max()) <= limit


def in_pefts_shape(name, tensor):
    """[experts, r, in] and [experts, out, r] as PEFT's matrices: in B's second dimension experts run fastest."""
    if tensor.dim() == 2:
        return tensor
    if name.endswith("lora_A"):
        return torch.cat(list(tensor))
    columns = [tensor[e, :, r] for r in range(tensor.shape[2]) for e in range(tensor.shape[0])]
    return torch.stack(columns, 1)


def wrapped(twin, bank):
    """PEFT's module for each of our targets."""
    found = {}
    for name in bank.targets:
        if name not in bank.stacks:
            module = twin.base_model.model.get_submodule(name)
        else:
            owner, _, leaf = name.rpartition(".")
            module = twin.base_model.model.get_submodule(owner)
            while module.parameter_name != leaf:
                module = module.base_layer
        found[name] = module
    return found


def peft_twin(model, bank):
    s = bank.settings[0]
    config = peft.LoraConfig(
        r=s.r, lora_alpha=s.lora_alpha, use_rslora=s.use_rslora,
        target_modules=[n for n in bank.targets if n not in bank.stacks and "mlp" not in n],
        target_parameters=[*bank.stacks, *(f"{n}.weight" for n in bank.targets if "mlp" in n and n not in bank.stacks)],
        rank_pattern=dict.fromkeys(bank.stacks, s.expert_rank),
    )  # fmt: skip
    twin = peft.get_peft_model(model, config)
    tensors = bank.tensors()
    for name, module in wrapped(twin, bank).items():
        for leaf, matrices in (("lora_A", module.lora_A), ("lora_B", module.lora_B)):
            matrices["default"].weight.data = in_pefts_shape(leaf, tensors[f"{name}.{leaf}"]).clone()
    return twin.eval()


def peft_gradients(twin, bank):
    return {
        f"{name}.{leaf}": matrices["default"].weight.grad
        for name, module in wrapped(twin, bank).items()
        for leaf, matrices in (("lora_A", module.lora_A), ("lora_B", module.lora_B))
    }


def check_parity(tools, model, how, limit):
    twin, examples = tools.copy(model), tools.examples()
    engine = tools.engine(model, how)
    assert engine.bank.stacks
    value, _, (grads,) = engine.step(examples)
    theirs = peft_twin(twin, engine.bank)
    plain = tools.plain_loss(theirs, examples)
    plain.backward()
    assert value.dtype == plain.dtype
    assert abs(value - plain.detach()) <= limit * abs(plain.detach())
    mine = {name: in_pefts_shape(name, gradient) for name, gradient in grads.items()}
    assert tools.error(mine, peft_gradients(theirs, engine.bank)) < limit
    return engine


# In memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", ["float64", "float32"])
def test_parity(tools, moe, width):
    """In float64 to 1e-9 (measured: under 1e-13); in float32 to 1e-5."""
    wide = width == "float64"
    with tools.wide() if wide else tools.narrow():
        model = tools.model(moe, torch.float64 if wide else torch.float32)
        check_parity(tools, model, settings(), 1e-9 if wide else 1e-5)


@pytest.mark.parametrize("how", [settings(expert_r=2), settings(expert_r=1, use_rslora=True), settings(r=1, expert_r=4),
                                 settings(targets=("experts",)), settings(targets=("experts.down_proj",)),
                                 settings(targets=("model.layers.1.mlp.experts.gate_up_proj", "q_proj")),
                                 settings(targets=("mlp.experts.gate_up_proj", "experts"))], ids=str)  # fmt: skip
def test_ranks_and_targets(tools, how):
    with tools.wide():
        check_parity(tools, tools.model("qwen2 moe" if "mlp" in how.target_modules[0] else "mixtral", torch.float64),
                     how, 1e-9)  # fmt: skip


def test_packed_is_one_at_a_time(tools, moe):
    engine, examples = tools.engine(tools.model(moe), settings()), tools.examples()
    assert tools.packs(engine.model)
    labels = [int(e.mask.sum()) for e in examples]
    together, nll, (grads,) = engine.step(examples)
    parts = [
        engine.step([e], keys=[key], weights=torch.full((n,), 1 / sum(labels)))
        for key, (e, n) in enumerate(zip(examples, labels, strict=True))
    ]
    torch.testing.assert_close(sum(p[0] for p in parts), together, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), nll, rtol=2e-6, atol=2e-6)
    assert tools.error(grads, {name: sum(p[2][0][name] for p in parts) for name in grads}) < 5e-6


def test_checkpointing_changes_nothing(tools, moe):
    examples = tools.examples()
    one = tools.engine(tools.model(moe), settings())
    two = tools.engine(tools.model(moe), settings(), checkpointed=True)
    (value, nll, (grads,)), (again, nll_again, (grads_again,)) = one.step(examples), two.step(examples)
    assert torch.equal(value, again) and torch.equal(nll, nll_again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


def test_three_adapters_are_three_single_ones(tools, moe):
    examples, lengths = tools.examples(), [len(e.ids) for e in tools.examples()]
    many = [settings(seed=seed, alpha=alpha) for seed, alpha in ((1, 6), (2, 3), (3, 12))]
    engine = tools.engine(tools.model(moe), many)
    _, nll, grads = engine.step(examples, per_adapter=tuple(lengths))
    n = len(nll)
    start = 0
    for k, example in enumerate(examples):
        one = tools.engine(tools.model(moe), many[k])
        one.bank.flat_KP.copy_(engine.bank.flat_KP[k : k + 1])
        count = int(example.mask.sum())
        _, alone, (alone_grads,) = one.step([example], weights=torch.full((count,), 1 / n))
        torch.testing.assert_close(alone, nll[start : start + count], rtol=2e-6, atol=2e-6)
        assert tools.error(grads[k], alone_grads) < 5e-6
        start += count


def test_detached_and_disabled(tools, moe):
    model = tools.model(moe)
    before, flags = logits(model), [p.requires_grad for p in model.parameters()]
    bank = attach(model, settings())
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)  # B is zero
    tools.randomise(bank)
    assert not same(logits(model), before, 1e-2)
    with bank.disabled():
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    bank.detach()
    assert torch.equal(logits(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("init", [Init.KAIMING, Init.GAUSSIAN])  # the others start from the weights, not from a seed
def test_start_depends_on_seed_stack_and_expert_only(tools, init):
    def start(**how):
        return attach(tools.model("mixtral"), settings(init=init, **how)).tensors()

    small, large, few, other = start(), start(r=5, expert_r=6), start(targets=("experts.down_proj",)), start(seed=1)
    experts = [name for name in small if ".experts." in name and name.endswith("lora_A")]
    assert len(experts) == 4
    scale = 2.0 if init is Init.GAUSSIAN else 1.0  # its spread is 1/r
    for name in experts:
        assert torch.equal(large[name][:, :3] * scale, small[name])
        assert not torch.equal(other[name], small[name])
    assert all(torch.equal(few[name], small[name]) for name in few)
    assert len({float(small[name][e, 0, 0]) for name in experts for e in range(4)}) == 16
    plain = attach(tools.model("mixtral"), LoraSettings(r=3, init=init)).tensors()
    assert all(torch.equal(plain[name], small[name]) for name in plain)  # linear layers start as without experts


def test_bfloat16(tools, moe):
    """bf16 base, fp32 adapters: near fp32 arithmetic on the same numbers."""
    model, examples = tools.model(moe, torch.bfloat16), tools.examples()
    wide = tools.engine(tools.copy(model).float(), settings())
    half = tools.engine(model, settings())
    value, _, (grads,) = half.step(examples)
    exact, _, (exact_grads,) = wide.step(examples)
    assert value.dtype == half.bank.grad_KP.dtype == torch.float32
    assert abs(value - exact) < 0.02 * exact


def test_what_is_refused(tools):
    model = tools.model("mixtral")
    for how, match in ((settings(lora_dropout=0.1), "lora_dropout: dropout cannot act on experts"),
                       (settings(bias=Bias.ALL), "bias: biases are not trained where experts"),
                       (settings(targets=("down_proj",)), "'down_proj' matches no .*did you mean 'experts.down_proj'"),
                       (settings(targets=("expert",)), "'expert' matches no linear layer")):  # fmt: skip
        with pytest.raises(InputError, match=match):
            attach(model, how)
    with pytest.raises(InputError, match=r"feed_forward\.experts keeps its experts in a way"):
        attach(tools.model("llama4"), settings())
    assert all(p.requires_grad for p in model.parameters())  # refused before anything was changed
    assert not expert_stacks(tools.model("llama"))


def test_experts_that_compute_something_else_are_left_alone(tools):
    """Proven, not believed: the same structure with another forward is no target."""
    model = tools.model("mixtral")
    experts = model.model.layers[0].mlp.experts
    other = type("Other", (type(experts),), {"forward": lambda self, x, *_: 2 * x})
    experts.__class__ = other
    assert {name.split(".")[2] for name in expert_stacks(model)} == {"1"}


# On disk -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        settings(),
        settings(expert_r=1, use_rslora=True),
        settings(targets=("experts",)),
        settings(targets=("experts.down_proj", "o_proj")),
        LoraSettings(r=3),
    ],
    ids=str,
)
def test_our_adapter_in_peft_and_here(tools, tmp_path, moe, how):
    """Dense layers and shared experts among them, which PEFT would take for the experts' own by their names."""
    model = tools.model(moe)
    base = logits(model)
    bank = attach(model, how)
    tools.randomise(bank)
    ours = logits(model)
    assert not same(ours, base, 1e-2)
    save_adapter(bank, tmp_path, base="x")
    theirs = peft.PeftModel.from_pretrained(tools.model(moe), tmp_path).eval()
    assert same(logits(theirs), ours)
    assert same(logits(theirs.merge_and_unload()), ours, 1e-4)
    again = tools.model(moe)
    loaded = load_adapter(again, tmp_path)
    assert torch.equal(loaded.flat_KP, bank.flat_KP) and torch.equal(logits(again), ours)
    assert loaded.settings[0].expert_rank == how.expert_rank


@pytest.mark.parametrize("options", [dict(target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
                                     dict(target_parameters=["experts.down_proj"], use_rslora=True),
                                     dict(target_parameters=["layers.1.mlp.experts.gate_up_proj"], target_modules=[]),
                                     dict(target_parameters=["experts.gate_up_proj", "experts.down_proj"],
                                          rank_pattern={r".*experts\..*_proj": 2})], ids=str)  # fmt: skip
def test_an_adapter_of_pefts_loads_here(tools, tmp_path, moe, options):
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"], **options}
    if moe == "granite moe":
        names = options["target_parameters"]
        options["target_parameters"] = [name.replace("mlp", "block_sparse_moe") for name in names]
    if moe == "deepseek v3":
        options["target_modules"] = options["target_modules"] and ["o_proj"]
    theirs = peft.get_peft_model(tools.model(moe), peft.LoraConfig(**options)).eval()
    draw = torch.Generator().manual_seed(0)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn(p.shape, generator=draw)
    theirs.save_pretrained(tmp_path)
    expected, model = logits(theirs), tools.model(moe)
    assert not same(logits(model), expected, 1e-2)
    load_adapter(model, tmp_path)
    assert same(logits(model), expected)


def test_what_the_file_says(tools, tmp_path):
    model = tools.model("qwen3 moe")  # layer 0 is dense, layer 1 has experts
    save_adapter(attach(model, settings(expert_r=1)), tmp_path, base="x")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    dense = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj", *dense]
    assert config["r"] == 3 and set(config["rank_pattern"].values()) == {1}
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    experts = "base_model.model.model.layers.1.mlp.experts"
    assert shapes[f"{experts}.base_layer.lora_A.weight"] == (4, 32) and shapes[f"{experts}.lora_A.weight"] == (4, 24)
    assert shapes[f"{experts}.base_layer.lora_B.weight"] == (48, 4) and shapes[f"{experts}.lora_B.weight"] == (32, 4)


def test_ranks_that_differ_among_experts_are_refused(tools, tmp_path):
    options = dict(r=3, target_parameters=["experts.gate_up_proj", "experts.down_proj"], target_modules=["q_proj"])
    made = peft.get_peft_model(tools.model("mixtral"), peft.LoraConfig(**options, rank_pattern={"q_proj": 2}))
    made.save_pretrained(tmp_path)
    assert load_adapter(tools.model("mixtral"), tmp_path).settings[0].rank_of("model.layers.0.self_attn.q_proj") == 2
    options |= dict(rank_pattern={"experts.down_proj": 2})
    peft.get_peft_model(tools.model("mixtral"), peft.LoraConfig(**options)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="rank_pattern gives experts several ranks"):
        load_adapter(tools.model("mixtral"), tmp_path)


# In 4 bits -----------------------------------------------------------------------------------------------------------


def dequantised(model, quantised):
    """The dense model of the same numbers."""
    for name, module in quantised.named_modules():
        if isinstance(module, NF4Experts):
            for leaf in module.layout.stacks:
                dense = torch.stack([w.dense(torch.float32) for w in module.frozen[leaf].weights])
                own = model.get_parameter(f"{name}.{leaf}")
                own.data = (dense.transpose(1, 2) if module.layout.transposed else dense).contiguous()
        elif isinstance(module, NF4Linear):
            model.get_submodule(name).weight.data = module.frozen.dense(torch.float32)
    return model


def test_four_bit_parity_by_dequantised_weights(tools, moe):
    pytest.importorskip("bitsandbytes")
    model, examples = tools.model(moe), tools.examples()
    quantised = tools.copy(model)
    quantize_linears(quantised)
    assert quantize_experts(quantised) == (1 if moe in ("qwen3 moe", "deepseek v3") else 2)
    assert not any(p.dim() == 3 for p in quantised.parameters())
    dense = dequantised(tools.copy(model), quantised)
    assert not same(logits(dense), logits(model), 1e-3)
    assert same(logits(quantised), logits(dense))
    value, _, (grads,) = tools.engine(quantised, settings()).step(examples)
    plain, _, (plain_grads,) = tools.engine(dense, settings()).step(examples)
    torch.testing.assert_close(value, plain, rtol=1e-5, atol=0)
    assert tools.error(grads, plain_grads) < 1e-5


def test_four_bit_stacks_follow_the_module(tools):
    pytest.importorskip("bitsandbytes")
    model = tools.model("mixtral")
    quantize_experts(model)
    experts = model.model.layers[0].mlp.experts
    codes = experts.frozen["down_proj"].weights[0].packed.clone()
    model.to(torch.bfloat16)
    assert torch.equal(experts.frozen["down_proj"].weights[0].packed, codes)
    bank = attach(model, settings())
    bank.detach()
    assert model.model.layers[0].mlp.experts is experts
    model.to("meta")
    assert experts.frozen["down_proj"].weights[3].packed.device.type == "meta"
