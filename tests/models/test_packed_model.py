"""What surrounds the packed forward pass: hooks that touch one model only, and models that cannot be packed."""

import pytest
import torch
from torch import nn

from welltuned.models import packed as module
from welltuned.models.fuse import fuse
from welltuned.models.packed import (
    ATTENTION,
    NotPackable,
    Packed,
    hidden_states,
    logits,
    packed_model,
    packs,
    shares,
)


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


# ── branches of one trunk ────────────────────────────────────────────────────────────────────────────────────────────

FORKED = [(4, 7), (), (3, 5, 2)]
FORKED_LENGTHS = [17, 5, 13]  # trunks of 6, 5 and 3 tokens


def unfolded(ids_N):
    """The same with a trunk for each branch, and where each token of the folded row lies in it."""
    parts, lengths, places, start, at = [], [], [], 0, 0
    for n, branches in zip(FORKED_LENGTHS, FORKED, strict=True):
        ids, shared = ids_N[start : start + n], n - sum(branches)
        if not branches:
            parts, lengths, places = [*parts, ids], [*lengths, n], [*places, *range(at, at + n)]
            at += n
        for index, own in enumerate(ids[shared:].split(list(branches)) if branches else ()):
            parts, lengths = [*parts, ids[:shared], own], [*lengths, shared + len(own)]
            places += range(at if index == 0 else at + shared, at + lengths[-1])
            at += lengths[-1]
        start += n
    return Packed(torch.cat(parts), lengths), places


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2", "gpt2", "gpt-oss", "deepseek v3"])
def test_branches_equal_their_own_sequences(tools, family):
    """Also where windows are shorter than the examples (Gemma 3's)."""
    model = tools.model(family)
    ids_N = torch.randint(1, 97, (35,), generator=torch.Generator().manual_seed(0))
    assert shares(model)
    with packed_model(model):
        whole, places = unfolded(ids_N)
        folded_NV = logits(model, Packed(ids_N, FORKED_LENGTHS, FORKED))
        torch.testing.assert_close(folded_NV, logits(model, whole)[places], rtol=1e-4, atol=1e-4)


def test_positions_go_on_from_the_trunk():
    packed = Packed(torch.zeros(35, dtype=torch.long), FORKED_LENGTHS, FORKED)
    expected = [*range(6), *range(6, 10), *range(6, 13), *range(5), *range(3), *range(3, 6), *range(3, 8), 3, 4]
    assert packed.position_ids_N.tolist() == expected


def test_a_model_that_cannot_be_packed_shares_nothing(tools):
    model = tools.model("falcon")
    assert not shares(model)
    with packed_model(model), pytest.raises(NotPackable, match="branches"):
        logits(model, Packed(torch.arange(1, 18), [17], [(4, 7)]))


def test_a_model_whose_positions_are_its_own_is_found_out(tools, monkeypatch):
    """The trial shows it: positions that count on through the branches are not those of the sequences."""
    model = tools.model("qwen3", seed=5)
    wrong = property(lambda self: torch.cat([torch.arange(n) for n in self.lengths]))
    monkeypatch.setattr(Packed, "position_ids_N", wrong)
    assert not shares(model)
