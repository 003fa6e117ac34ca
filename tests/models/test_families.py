"""Every family against plain transformers with PEFT, an example at a time: loss, and the gradient of every adapter."""

import pytest
import torch

ONE_AT_A_TIME = ("falcon", "bloom", "nemotron", "jamba", "qwen3 next", "llama4")
# Products of experts have other shapes when a token changes its expert: equal up to rounding only.
MOE = ("mixtral", "qwen3 moe", "gpt-oss", "deepseek v3")

# (gated MLPs fused, RMS norms fused, what stays on the model's own code)
GATED, NORMS = "gated MLPs with biases or unadapted projections", "norms that are not RMS norms"
MLPS, EXPERTS = "MLPs without gate_proj, up_proj and down_proj", "stacks of experts, which carry no adapters"
REPORT = {
    "llama": (2, 5, {}),
    "llama tied": (2, 5, {}),
    "llama with biases": (0, 5, {GATED: 2}),
    "mistral": (2, 5, {}),
    "qwen2": (2, 5, {}),
    "qwen2 tied, window in one layer": (2, 5, {}),
    "qwen3": (2, 9, {}),  # two norms a layer, two of query and key, one at the end
    "gemma2": (2, 9, {}),
    "gemma3": (3, 19, {}),
    "phi3": (0, 5, {MLPS: 1}),
    "olmo2": (2, 9, {}),
    "olmo3": (2, 9, {}),
    "granite": (2, 5, {}),
    "mixtral": (0, 5, {EXPERTS: 2}),
    "qwen3 moe": (1, 9, {EXPERTS: 1}),  # every second layer is dense
    "cohere": (2, 0, {NORMS: 3}),
    "cohere2": (2, 0, {NORMS: 3}),
    "gpt-oss": (0, 5, {EXPERTS: 2}),
    "smollm3": (2, 5, {}),
    "starcoder2": (0, 0, {MLPS: 1}),
    "gpt2": (0, 0, {MLPS: 1}),
    "gpt-neox": (0, 0, {MLPS: 1}),
    "deepseek v3": (2, 9, {EXPERTS: 1}),
    "falcon": (0, 0, {MLPS: 1}),
    "bloom": (0, 0, {MLPS: 1}),
    "nemotron": (0, 0, {MLPS: 1}),
    "jamba": (1, 8, {EXPERTS: 1}),
    "qwen3 next": (2, 7, {EXPERTS: 2, NORMS: 1}),
    "llama4": (2, 5, {EXPERTS: 1}),
}


@pytest.mark.parametrize("width", ["float64", "float32"])
def test_parity(tools, family, width):
    """In float64 to 1e-12 (measured: under 1e-14); in float32 to 1e-5 (measured: under 4e-6)."""
    wide = width == "float64"
    limit = 1e-12 if wide else 1e-5
    with tools.wide() if wide else tools.narrow():
        model = tools.model(family, torch.float64 if wide else torch.float32)
        twin = tools.copy(model)
        engine, examples = tools.engine(model), tools.examples()
        assert (engine.head is None) == (family == "llama4")  # its backbone cannot be reached by itself
        assert tools.packs(model) == (family not in ONE_AT_A_TIME)
        value, _, (grads,) = engine.step(examples)
        plain, plain_grads = tools.peft_step(tools.twin(twin, engine.bank), engine.bank, examples)
    assert value.dtype == plain.dtype
    assert abs(value - plain) <= limit * abs(plain)
    assert tools.error(grads, plain_grads) < limit


def test_report(tools, family):
    fused = tools.engine(tools.model(family)).fused
    gated, norms, plain = REPORT[family]
    assert (fused.done["gated MLP"], fused.done["RMS norm"], dict(fused.plain)) == (gated, norms, plain)
    assert len(fused.sentences()) == len(plain)


def test_undo_and_a_second_model(tools, family):
    """The other model never notices; undone, this one gives its first logits again, bit for bit."""
    model, other = tools.model(family), tools.model(family, seed=1)
    ids = torch.arange(1, 12)[None]

    @torch.no_grad()
    def logits(m):
        return m(input_ids=ids).logits

    before, before_other = logits(model), logits(other)
    flags = [p.requires_grad for p in model.parameters()]
    engine = tools.engine(model)
    engine.step(tools.examples())
    changed = logits(model)
    assert not torch.allclose(changed, before, rtol=1e-3)
    with tools.packed(model):
        assert torch.equal(logits(other), before_other)
    with engine.bank.disabled():
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    engine.bank.detach()
    engine.fused.undo()
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(other), before_other)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_checkpointing_changes_nothing(tools, family):
    examples = tools.examples()
    plain, checkpointed = tools.engine(tools.model(family)), tools.engine(tools.model(family), checkpointed=True)
    value, nll, (grads,) = plain.step(examples)
    again, nll_again, (grads_again,) = checkpointed.step(examples)
    assert checkpointed.fused.done["checkpointed layer"] == checkpointed.model.config.num_hidden_layers
    assert torch.equal(value, again)
    assert torch.equal(nll, nll_again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


def test_one_pack_is_three_packs(tools, family):
    """Sums of losses and gradients do not depend on how examples are packed."""
    engine, examples = tools.engine(tools.model(family)), tools.examples()
    labels = [int(e.mask.sum()) for e in examples]
    together, nll, (grads,) = engine.step(examples)
    parts = [
        engine.step([e], keys=[key], weights=torch.full((n,), 1 / sum(labels)))
        for key, (e, n) in enumerate(zip(examples, labels, strict=True))
    ]
    torch.testing.assert_close(sum(p[0] for p in parts), together, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), nll, rtol=2e-6, atol=2e-6)
    summed = {name: sum(p[2][0][name] for p in parts) for name in grads}
    assert tools.error(grads, summed) < 5e-6


def test_another_example_changes_nothing(tools, family):
    """Other tokens in the middle example: bit for bit the same losses in the others."""
    engine, examples, others = tools.engine(tools.model(family)), tools.examples(), tools.examples(seed=1)
    changed = [examples[0], tools.replace(examples[1], ids=others[1].ids), examples[2]]
    one, two = (engine.step(e)[1].split([int(x.mask.sum()) for x in examples]) for e in (examples, changed))
    assert not torch.equal(one[1], two[1])
    for a, b in ((one[0], two[0]), (one[2], two[2])):
        if family in MOE:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(a, b)
