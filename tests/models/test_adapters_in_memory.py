"""Banks of adapters: K at once, scales, biases, target names, dropout, 4-bit and bf16 bases, unknown heads."""

import pytest
import torch

from welltuned.errors import InputError, RunError
from welltuned.models.frozen import NF4Linear, quantize_linears
from welltuned.models.full import FullParameters
from welltuned.models.fuse import find_head, fuse
from welltuned.models.lora import ALL_LINEAR, Bias, Init, LoraSettings, attach


def parity(tools, model, settings, limit=1e-5):
    twin = tools.copy(model)
    engine, examples = tools.engine(model, settings), tools.examples()
    value, _, (grads,) = engine.step(examples)
    plain, plain_grads = tools.peft_step(tools.twin(twin, engine.bank), engine.bank, examples)
    assert abs(value - plain) <= limit * abs(plain)
    assert tools.error(grads, plain_grads) < limit
    return engine


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("r", "alpha"), [(1, 1), (3, 5), (16, 32), (40, 2.5)])
@pytest.mark.parametrize("rslora", [False, True])
def test_rank_alpha_and_rslora(tools, r, alpha, rslora):
    settings = LoraSettings(r=r, lora_alpha=alpha, use_rslora=rslora)
    assert settings.scale == pytest.approx(alpha / (r**0.5 if rslora else r))
    parity(tools, tools.model("llama"), settings)


@pytest.mark.parametrize("names", [("q_proj", "v_proj"), ("down_proj",), ("self_attn.o_proj", "gate_proj"),
                                   ("model.layers.1.mlp.up_proj",), "q_proj"], ids=str)  # fmt: skip
def test_some_targets(tools, names):
    engine = parity(tools, tools.model("llama"), LoraSettings(r=3, target_modules=names))
    if "down_proj" in names:
        assert engine.fused.plain["gated MLPs with biases or unadapted projections"] == 2


def test_a_name_that_matches_nothing_is_an_error(tools):
    model = tools.model("llama")
    with pytest.raises(InputError, match=r"target_modules: 'q_prj' matches no linear layer.*did you mean 'q_proj'"):
        attach(model, LoraSettings(target_modules=("v_proj", "q_prj")))
    with pytest.raises(InputError, match="this model has down_proj, gate_proj"):
        attach(model, LoraSettings(target_modules=("zzz",)))
    for name in ("proj", "lm_head", "embed_tokens", "input_layernorm"):
        with pytest.raises(InputError, match="matches no linear layer"):
            attach(model, LoraSettings(target_modules=(name,)))
    assert all(p.requires_grad for p in model.parameters())  # refused before anything was changed


def test_all_linear_is_every_projection_but_head_and_routers(tools):
    def leaves(family):
        return {name.rsplit(".", 1)[-1] for name in attach(tools.model(family), LoraSettings()).targets}

    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert leaves("llama") == leaves("llama tied") == attention | {"gate_proj", "up_proj", "down_proj"}
    assert leaves("phi3") == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert leaves("gpt2") == {"c_attn", "c_proj", "c_fc"}
    assert leaves("gpt-neox") == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert leaves("mixtral") == attention


@pytest.mark.parametrize("init", [Init.KAIMING, Init.GAUSSIAN])
def test_start_depends_on_seed_and_module_only(tools, init):
    """Not on rank beyond its own rows, nor on what else is adapted: runs of a sweep start alike."""

    def start(**settings):
        return attach(tools.model("llama"), LoraSettings(init=init, **settings)).tensors()

    small, large = start(r=4), start(r=8)
    few, other = start(r=4, target_modules=("v_proj", "down_proj")), start(r=4, seed=1)
    for name, tensor in small.items():
        if name.endswith("lora_B"):
            assert not tensor.any()
        else:
            scale = 2.0 if init is Init.GAUSSIAN else 1.0  # its spread is 1/r
            assert torch.equal(large[name][:4] * scale, tensor)
            assert not torch.equal(other[name], tensor)
    assert all(torch.equal(few[name], small[name]) for name in few)
    a = [t for name, t in small.items() if name.endswith("lora_A")]
    assert len({float(t[0, 0]) for t in a}) == len(a)  # each module its own draw


def test_kaiming_start_is_pefts(tools):
    """Uniform within 1/sqrt(in), as torch.nn.init.kaiming_uniform_(a=sqrt(5)) has it."""
    a = attach(tools.model("llama"), LoraSettings(r=64)).tensors()["model.layers.0.self_attn.q_proj.lora_A"]
    bound = 32**-0.5
    assert 0.99 * bound < a.abs().max() <= bound
    assert abs(a.std() / bound - 3**-0.5) < 0.02


@pytest.mark.parametrize("bias", [Bias.LORA_ONLY, Bias.ALL])
@pytest.mark.parametrize("family", ["qwen2", "llama with biases", "gpt2", "gpt-neox"])
def test_trained_biases(tools, family, bias):
    """The right ones are trained, with PEFT's gradients; detaching gives the old ones back."""
    names = {"gpt2": ("c_attn",), "gpt-neox": ("query_key_value",)}.get(family, ("q_proj", "down_proj"))
    model = tools.model(family)
    every = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = parity(tools, model, LoraSettings(r=3, target_modules=names, bias=bias))
    trained = {slot.name for slot in engine.bank.slots if slot.name.endswith("bias")}
    adapted = {name for name in every if name.rpartition(".")[0] in engine.bank.targets}
    assert trained == (every if bias is Bias.ALL else adapted)
    assert trained
    engine.bank.flat_KP.add_(1.0)
    engine.bank.detach()
    engine.fused.undo()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_biases_of_a_four_bit_base_are_trained(tools):
    model = tools.model("qwen2")
    quantize_linears(model)
    engine = tools.engine(model, LoraSettings(r=3, target_modules=("q_proj",), bias=Bias.ALL))
    _, _, (grads,) = engine.step(tools.examples())
    assert grads["model.layers.0.self_attn.v_proj.bias"].any()  # a layer of its own, without adapter
    assert grads["model.layers.0.self_attn.q_proj.bias"].any()


def test_what_a_bank_refuses(tools):
    model = tools.model("qwen2")
    with pytest.raises(InputError, match="share target_modules"):
        attach(model, [LoraSettings(target_modules=("q_proj",)), LoraSettings()])
    with pytest.raises(InputError, match="biases belong to the shared base"):
        attach(model, [LoraSettings(bias=Bias.ALL)] * 2)
    attach(model, LoraSettings())
    with pytest.raises(InputError, match="already carries adapters"):
        attach(model, LoraSettings())


# The flat buffer -----------------------------------------------------------------------------------------------------


def test_gradients_accumulate_in_the_flat_buffer(tools):
    engine = tools.engine(tools.model("llama"))
    examples = tools.examples()
    pointers = [p.grad.data_ptr() for p in engine.model.parameters() if p.requires_grad]
    engine.step(examples)
    once = engine.bank.grad_KP.clone()
    assert [p.grad.data_ptr() for p in engine.model.parameters() if p.requires_grad] == pointers
    engine.bank.grad_KP.copy_(once)
    for slot in engine.bank.slots:
        module = engine.bank.modules[slot.name.rpartition(".")[0]]
        tensor = module.lora_A if slot.name.endswith("A") else module.lora_B
        assert torch.equal(tensor.grad.flatten(), once[0, slot.start : slot.start + slot.size])
        assert torch.equal(tensor.data[0], engine.bank.tensors()[slot.name])
    assert {p.data_ptr() for p in engine.model.parameters() if p.requires_grad} == {
        engine.bank.flat_KP[:, slot.start :].data_ptr() for slot in engine.bank.slots
    }


def test_the_flat_buffer_is_the_model(tools):
    """What an optimizer writes into it is what the next forward pass uses."""
    engine, examples = tools.engine(tools.model("llama")), tools.examples()
    before, *_ = engine.step(examples)
    engine.bank.flat_KP.add_(engine.bank.grad_KP, alpha=-0.05)
    after, *_ = engine.step(examples)
    assert after < before


def test_a_new_adapter_changes_no_number(tools):
    """B starts at zero: the first loss is the base model's."""
    model = tools.model("llama")
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        fuse(model, attach(model, LoraSettings()))
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)


# Several adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("width", ["float64", "float32"])
@pytest.mark.parametrize("family", ["llama", "falcon"])  # packed, and one example at a time
def test_two_adapters_are_two_banks_of_one(tools, family, width, dropout):
    wide = width == "float64"
    with tools.wide() if wide else tools.narrow():
        dtype = torch.float64 if wide else torch.float32
        settings = [LoraSettings(r=3, lora_alpha=a, lora_dropout=dropout, seed=a) for a in (4, 7)]
        model, examples = tools.model(family, dtype), tools.examples()
        single_models = [tools.copy(model) for _ in settings]
        bank = tools.engine(model, settings)
        ones = torch.ones(labels(examples), dtype=dtype)
        value, nll, grads = bank.step(examples, per_adapter=(15, 17), weights=ones)
        values, nlls = 0.0, []
        for k, (mine, keys) in enumerate(((examples[:2], (0, 1)), (examples[2:], (2,)))):
            single = tools.engine(single_models[k], settings[k])
            for name, tensor in single.bank.tensors().items():
                tensor.copy_(bank.bank.tensors(k)[name])
            part, part_nll, (part_grads,) = single.step(mine, keys=keys, weights=ones[: labels(mine)])
            assert tools.error(grads[k], part_grads) < (1e-12 if wide else 1e-5)
            values, nlls = values + part, [*nlls, part_nll]
    torch.testing.assert_close(value, values, rtol=1e-12 if wide else 1e-6, atol=0)
    torch.testing.assert_close(nll, torch.cat(nlls), rtol=1e-5, atol=1e-6)


def labels(examples):
    return sum(int(e.mask.sum()) for e in examples)


@pytest.mark.parametrize("start", [
    {}, {"init": Init.GAUSSIAN}, {"init": Init.PISSA}, {"init": Init.OLORA}, {"use_dora": True}], ids=str)  # fmt: skip
def test_an_adapter_that_begins_later_begins_as_any(tools, start):
    """In a row of a bank that others trained in: its numbers, its start, and what it computes."""
    model = tools.model("llama")
    first, other = LoraSettings(r=4, **start), LoraSettings(r=3, lora_alpha=7, seed=5, **start)
    bank = attach(tools.copy(model), [LoraSettings(r=2, **start), first])
    bank.flat_KP.add_(0.1)
    bank.renew(0, other)
    alone = attach(tools.copy(model), other)
    for name, tensor in alone.tensors().items():
        assert torch.equal(bank.tensors(0)[name], tensor)
        assert torch.equal(bank.tensors_at_start(0)[name], tensor)
    ids = torch.arange(12)[None]
    bank.no_dropout((12, 0))
    alone.no_dropout()
    assert torch.allclose(bank.model(ids).logits, alone.model(ids).logits, atol=1e-5)
    bank.keep([1, 0])
    bank.no_dropout((0, 12))
    assert torch.allclose(bank.model(ids).logits, alone.model(ids).logits, atol=1e-5)


def test_adapters_on_experts_that_begin_later(tools):
    model = tools.model("mixtral")
    where = dict(target_modules=("experts", "q_proj"), r=3)
    bank = attach(tools.copy(model), [LoraSettings(**where), LoraSettings(**where)])
    bank.flat_KP.add_(0.1)
    bank.renew(1, LoraSettings(**where, seed=5, lora_alpha=7))
    alone = attach(tools.copy(model), LoraSettings(**where, seed=5, lora_alpha=7)).tensors()
    assert all(torch.equal(bank.tensors(1)[name], tensor) for name, tensor in alone.items())
    assert any("experts" in name for name in alone)
    stack = next(module for name, module in bank.modules.items() if "experts" in name)
    assert list(stack.scale_K) == [32 / 3, 7 / 3]


def test_a_row_has_room_for_no_larger_rank(tools):
    bank = attach(tools.model("llama"), [LoraSettings(r=2), LoraSettings(r=4)])
    bank.renew(0, LoraSettings(r=4))
    for wrong in (LoraSettings(r=5), LoraSettings(r=2, target_modules=("q_proj",)), LoraSettings(r=2, use_dora=True)):
        with pytest.raises(InputError, match="adapters of one bank share"):
            bank.renew(0, wrong)


def test_an_adapter_without_rows_gets_no_gradient(tools):
    engine = tools.engine(tools.model("llama"), [LoraSettings(r=3), LoraSettings(r=3, seed=2)])
    _, _, (first, second) = engine.step(tools.examples(), per_adapter=(0, 32))
    assert not any(t.any() for t in first.values())
    assert all(t.any() for t in second.values())


# Dropout -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "falcon"])
def test_dropout_does_not_depend_on_the_cut(tools, family):
    """One pack, three packs, another order, checkpointed: the same masks, so the same loss and gradients."""
    settings, examples = LoraSettings(r=3, lora_dropout=0.3), tools.examples()
    engine = tools.engine(tools.model(family), settings)
    value, nll, (grads,) = engine.step(examples, keys=(7, 8, 9))
    none, *_ = tools.engine(tools.model(family), LoraSettings(r=3)).step(examples)
    assert abs(none - value) > 1e-3 * value
    other_keys, *_ = engine.step(examples, keys=(7, 8, 10))
    assert other_keys != value
    turned, _, (turned_grads,) = engine.step(examples[::-1], keys=(9, 8, 7))
    torch.testing.assert_close(turned, value, rtol=1e-6, atol=0)
    assert tools.error(turned_grads, grads) < 1e-5
    parts = [engine.step([e], keys=[key], weights=torch.full((labels([e]),), 1 / labels(examples)))
             for e, key in zip(examples, (7, 8, 9), strict=True)]  # fmt: skip
    torch.testing.assert_close(sum(p[0] for p in parts), value, rtol=1e-6, atol=0)
    assert tools.error({name: sum(p[2][0][name] for p in parts) for name in grads}, grads) < 1e-5
    checkpointed = tools.engine(tools.model(family), settings, checkpointed=True)
    again, _, (grads_again,) = checkpointed.step(examples, keys=(7, 8, 9))
    assert torch.equal(again, value)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


def test_checkpointed_layers_remember_their_rows(tools):
    """Two forward passes before their backward passes: each layer runs again with the rows of its own pass."""
    settings, examples = [LoraSettings(r=3, lora_dropout=0.3, seed=s) for s in (1, 2)], tools.examples()
    results = []
    for checkpointed in (False, True):
        engine = tools.engine(tools.model("llama"), settings, checkpointed=checkpointed)
        with tools.packed(engine.model):
            first = engine.forward(examples, per_adapter=(15, 17), keys=(1, 2, 3))
            second = engine.forward(examples, per_adapter=(11, 21), keys=(4, 5, 6))
            engine.bank.grad_KP.zero_()
            (first + 2 * second).backward()
        results.append(engine.bank.grad_KP.clone())
        assert engine.bank.rows.per_adapter == (11, 21)
    assert torch.equal(*results)


def test_no_dropout_when_told_so(tools):
    examples = tools.examples()
    engine = tools.engine(tools.model("llama"), LoraSettings(r=3, lora_dropout=0.3))
    expected, *_ = tools.engine(tools.model("llama"), LoraSettings(r=3)).step(examples)
    engine.bank.no_dropout()
    with tools.packed(engine.model), torch.no_grad():
        assert torch.equal(engine.forward(examples, rows=False), expected)


# Heads ---------------------------------------------------------------------------------------------------------------


def test_a_head_that_is_not_understood_uses_the_models_logits(tools):
    model = tools.model("llama")
    original = model.forward

    def forward(*args, **kwargs):
        out = original(*args, **kwargs)
        out.logits = torch.sin(out.logits)  # no known model does this
        return out

    model.forward = forward
    engine, examples = tools.engine(model), tools.examples()
    assert engine.head is None
    value, nll, (grads,) = engine.step(examples)
    twin = tools.model("llama")
    twin_original = twin.forward
    twin.forward = lambda *a, **k: sine(twin_original(*a, **k))
    plain, plain_grads = tools.peft_step(tools.twin(twin, engine.bank), engine.bank, examples)
    torch.testing.assert_close(value, plain, rtol=1e-6, atol=0)
    assert tools.error(grads, plain_grads) < 1e-5


def sine(out):
    out.logits = torch.sin(out.logits)
    return out


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere"])
def test_the_plain_path_gives_the_same_loss(tools, family):
    engine, examples = tools.engine(tools.model(family)), tools.examples()
    value, nll, (grads,) = engine.step(examples)
    engine.head = None
    plain, plain_nll, (plain_grads,) = engine.step(examples)
    torch.testing.assert_close(value, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(nll, plain_nll, rtol=1e-5, atol=1e-6)
    assert tools.error(grads, plain_grads) < 1e-5


def test_find_head_leaves_the_model_in_its_mode_and_ignores_its_dropout(tools):
    model = tools.model("gpt2", resid_pdrop=0.5).train()
    head = find_head(model)
    assert head is not None
    assert model.training
    assert head.w_VH is model.transformer.wte.weight


@pytest.mark.parametrize("training", [True, False])
def test_attaching_and_fusing_keep_the_mode(tools, training):
    model = tools.model("llama").train(training)
    fused = fuse(model, attach(model, LoraSettings(lora_dropout=0.5)))
    assert fused.done["gated MLP"] == 2
    assert {module.training for module in model.modules()} == {training}


def test_dropout_in_a_loop_that_names_no_examples_is_refused(tools):
    model = tools.model("llama").train()
    fuse(model, attach(model, LoraSettings(lora_dropout=0.5)))
    with pytest.raises(RunError, match="lora_dropout works in welltuned's own training loop only"):
        model(input_ids=torch.arange(1, 9)[None])
    model.eval()(input_ids=torch.arange(1, 9)[None])


# 4-bit bases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt-neox"])
def test_four_bit_parity_with_bitsandbytes(tools, family):
    """Same codes, and PEFT on bitsandbytes' own layers gives the same loss and gradients."""
    import bitsandbytes as bnb

    whole_blocks = dict(hidden_size=64, intermediate_size=128)  # others its CPU layers expand wrongly
    model, examples = tools.model(family, **whole_blocks), tools.examples()
    twin = tools.copy(model)
    done = quantize_linears(model)
    engine = tools.engine(model)
    assert done == len(engine.bank.targets) == sum(isinstance(m, NF4Linear) for m in model.modules())
    for name in engine.bank.targets:
        dense = twin.get_submodule(name)
        linear = bnb.nn.Linear4bit(
            dense.in_features, dense.out_features, dense.bias is not None, torch.float32, quant_type="nf4"
        )
        linear.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4")
        linear.bias = dense.bias
        twin.set_submodule(name, linear.to("cpu"))
    twin.is_loaded_in_4bit = True
    peft_twin = tools.twin(twin, engine.bank).train()  # in eval mode its CPU layer would repack its weights
    value, _, (grads,) = engine.step(examples)
    plain, plain_grads = tools.peft_step(peft_twin, engine.bank, examples)
    torch.testing.assert_close(value, plain, rtol=1e-5, atol=0)
    assert tools.error(grads, plain_grads) < 1e-5


def test_four_bit_is_coarse_but_near(tools):
    """The quantised model is another model: near, and by no means equal."""
    model = tools.model("llama")
    quantised = tools.copy(model)
    quantize_linears(quantised)
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        coarse, exact = quantised(input_ids=ids).logits, model(input_ids=ids).logits
    assert 0.01 < (coarse - exact).norm() / exact.norm() < 0.8


def test_four_bit_gpt2_by_its_dequantised_weights(tools):
    """Conv1D has no bitsandbytes layer: compare with the dense model of the same numbers."""
    model = tools.model("gpt2")
    dense = tools.copy(model)
    quantize_linears(model)
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            dense.get_submodule(name).weight.data = module.frozen.dense(torch.float32).t().contiguous()
    examples = tools.examples()
    value, _, (grads,) = tools.engine(model).step(examples)
    plain, _, (plain_grads,) = tools.engine(dense).step(examples)
    torch.testing.assert_close(value, plain, rtol=1e-6, atol=0)
    assert tools.error(grads, plain_grads) < 1e-5


def test_four_bit_weights_follow_the_module(tools):
    """`.to(device)` moves them, though they are no parameters; `.to(dtype)` leaves the codes."""
    model = tools.model("llama")
    quantize_linears(model)
    layer = model.model.layers[0].mlp.up_proj
    codes = layer.frozen.packed.clone()
    model.to(torch.bfloat16)
    assert torch.equal(layer.frozen.packed, codes)
    model.to("meta")
    assert layer.frozen.packed.device.type == "meta"


# Half precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [Bias.NONE, Bias.LORA_ONLY])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "gpt2", "falcon"])
def test_bfloat16_is_as_near_to_float32_as_pefts(tools, family, bias):
    """Same bf16 numbers in the base, fp32 adapters: about as far from fp32 arithmetic as PEFT under autocast."""
    model, settings, examples = tools.model(family, torch.bfloat16), LoraSettings(r=3, bias=bias), tools.examples()
    wide, twin = tools.engine(tools.copy(model).float(), settings), tools.copy(model)
    half = tools.engine(model, settings)
    assert tools.packs(model) == (family != "falcon")
    assert half.head is not None
    value, _, (grads,) = half.step(examples)
    exact, _, (exact_grads,) = wide.step(examples)
    with torch.autocast("cpu", torch.bfloat16):
        _, peft_grads = tools.peft_step(tools.twin(twin, half.bank), half.bank, examples)
    assert value.dtype == half.bank.grad_KP.dtype == torch.float32
    assert abs(value - exact) < 0.01 * exact
    mine, plain, truth = (torch.cat([g[n].float().flatten() for n in grads]) for g in (grads, peft_grads, exact_grads))
    assert (mine - truth).norm() < 2 * (plain - truth).norm()


def test_bfloat16_biases_outside_adapters_are_refused(tools):
    model = tools.model("gpt2", torch.bfloat16)
    with pytest.raises(InputError, match="bias: transformer.h.0.ln_1.bias is bfloat16: too coarse to be trained"):
        attach(model, LoraSettings(bias=Bias.ALL))
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())


# Full fine-tuning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama tied", "gemma2", "qwen2", "gpt2", "mixtral"])
def test_full_parity(tools, family):
    """Every parameter's gradient, the head's and the norms' among them."""
    model, examples = tools.model(family), tools.examples()
    twin = tools.copy(model)
    trained = FullParameters(model)
    fused = fuse(model, None)
    assert not fused.done["RMS norm"]  # their gains are trained
    engine = tools.Engine(model, trained, fused, find_head(model))
    value, _, (grads,) = engine.step(examples)
    plain = tools.plain_loss(twin, examples)
    plain.backward()
    torch.testing.assert_close(value, plain.detach(), rtol=1e-6, atol=0)
    assert tools.error(grads, {name: p.grad for name, p in twin.named_parameters()}) < 1e-5


def test_all_linear_is_the_default():
    assert LoraSettings().target_modules == ALL_LINEAR
