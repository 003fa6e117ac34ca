"""What surrounds the packed forward pass: hooks that touch one model only, and models that cannot be packed."""

import pytest
import torch
from torch import nn

from welltuned.models import packed as module
from welltuned.models.fuse import fuse
from welltuned.models.packed import ATTENTION, NotPackable, Packed, hidden_states, logits, packed_model, packs


def alone(model, batch):
    parts = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in batch.ids_N.split(batch.lengths)]
    return torch.cat(parts)


@pytest.fixture
def batch():
    return Packed(torch.randint(1, 97, (20,), generator=torch.Generator().manual_seed(0)), [6, 1, 13])


def test_positions_start_anew(batch):
    assert batch.position_ids_N.tolist() == [*range(6), 0, *range(13)]


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits_and_mode(tools, batch, implementation):
    """The model's attention and mode come back as they were, after an error too."""
    model = tools.model("qwen3")
    model.set_attn_implementation(implementation)
    model.train()
    with packed_model(model):
        assert model.config._attn_implementation == ATTENTION
        assert not model.training
        out = logits(model, batch)
        torch.testing.assert_close(model.lm_head(hidden_states(model, batch)), out, rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation == implementation
    assert model.training
    torch.testing.assert_close(out, alone(model.eval(), batch), rtol=1e-5, atol=1e-5)
    with pytest.raises(KeyError), packed_model(model):
        raise KeyError
    assert model.config._attn_implementation == implementation


def test_packed_attention_refuses_what_it_does_not_know(tools):
    q = torch.zeros(1, 2, 5, 8)
    with pytest.raises(NotPackable, match="packed rows only"):
        module._attention(nn.Identity(), q, q, q, None)
    with pytest.raises(NotPackable, match="packed rows only"):
        module._attention(nn.Identity(), *[q.expand(2, -1, -1, -1)] * 3, None, packed_lengths=[5])
    for extra in ({"is_causal": False}, {"indices": q}, {"position_bias": q}):
        with pytest.raises(NotPackable, match="more than causal attention"):
            module._attention(nn.Identity(), q, q, q, None, packed_lengths=[5], **extra)
    out, _ = module._attention(nn.Identity(), q, q, q, None, packed_lengths=[5], is_causal=True, indices=None)
    assert out.shape == (1, 5, 2, 8)


@torch.no_grad()
def test_a_model_that_mixes_packed_examples_is_found_out(tools, batch):
    """Layers that look along the whole row: tried, told apart, and run one example at a time."""
    model = tools.model("llama")

    def leak(layer, args, output):
        return output + output.cumsum(1)

    model.model.layers[0].register_forward_hook(leak)
    assert not packs(model)
    with packed_model(model):
        assert model.config._attn_implementation == "eager"
        torch.testing.assert_close(logits(model, batch), alone(model, batch), rtol=0, atol=0)


def test_the_trial_is_made_once_and_leaves_rows_alone(tools, monkeypatch):
    engine = tools.engine(tools.model("llama"))
    engine.bank.use_rows((32,), ((11, 5), (4, 6), (17, 7)))
    runs = []
    monkeypatch.setattr(module, "_try_packing", lambda model: runs.append(model) or True)
    for _ in range(3):
        with packed_model(engine.model):
            pass
    assert runs == [engine.model] or runs == []  # find_head may have asked before
    assert engine.bank.rows.per_adapter == (32,)


def test_norms_and_mlps_that_only_look_familiar_are_left_alone(tools):
    """A norm with another formula, a gate, or an MLP that does more than its projections."""
    model = tools.model("llama").requires_grad_(False)
    layers = model.model.layers

    class Odd(type(layers[0].input_layernorm)):
        def forward(self, x):
            return super().forward(x) * 1.001

    class Gated(type(layers[0].input_layernorm)):
        def forward(self, x, gate=None):
            return super().forward(x) if gate is None else super().forward(x) * gate

    class More(type(layers[0].mlp)):
        def forward(self, x):
            return super().forward(x) + 0.01 * x

    layers[0].input_layernorm.__class__ = Odd
    layers[1].input_layernorm.__class__ = Gated
    layers[1].mlp.__class__ = More
    fused = tools.engine(model).fused
    assert dict(fused.done) == {"gated MLP": 1, "RMS norm": 3}
    assert dict(fused.plain) == {
        "norms that are not RMS norms": 2,
        "gated MLPs that compute something else": 1,
    }
    assert all("left on the model's own code" in sentence for sentence in fused.sentences())


def test_trained_norms_are_not_fused(tools):
    """The fused norm has no gradient for its gain."""
    model = tools.model("llama")
    assert not fuse(model, None).modules
