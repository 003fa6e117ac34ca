"""4-bit bases: expanded once, in one place in turns or anew each time, a run learns the same bits."""

import pytest
import torch
from torch import nn

from welltuned.errors import RunError
from welltuned.kernels import nf4
from welltuned.models.four_bit import four_bit_weights, keep_dense, make_room, require_exact, share_workspace
from welltuned.models.frozen import quantize_linears
from welltuned.models.fuse import Fused, fuse
from welltuned.models.lora import LoraSettings, attach
from welltuned.models.recompute import HostCheckpoints, checkpoint_layers

pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")


def llama(quantised=True):
    """Two layers of widths that are no whole blocks of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    if quantised:
        quantize_linears(model)
    return model


def gradient(model, prepare=lambda model, fused: None, passes=2):
    """The loss and the adapters' gradient, summed over two passes of different lengths; their bits."""
    bank = attach(model, LoraSettings(r=4, lora_alpha=8))
    draw = torch.Generator().manual_seed(1)
    bank.flat_KP.copy_(torch.randn(bank.flat_KP.shape, generator=draw) * 0.1)
    fused = fuse(model, bank)
    prepare(model, fused)
    losses = []
    for k in range(passes):
        ids = torch.randint(64, (1, 20 + 7 * k), generator=draw)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    found = torch.stack(losses), bank.grad_KP.clone()
    fused.undo()
    bank.detach()
    return found


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_every_way_to_expand_gives_the_same_bits():
    plain = gradient(llama())
    assert plain[1].abs().sum() > 0
    shared, kept = llama(), llama()
    workspace = share_workspace(shared)
    assert equal(plain, gradient(shared))
    assert workspace.flat.numel() == 160 * 96, "one place, as large as the largest weight"
    took = keep_dense(kept)
    assert took == sum(4 * w.shape[0] * w.shape[1] for w in four_bit_weights(kept))
    assert equal(plain, gradient(kept))


def test_a_product_that_keeps_a_lent_weight_would_be_seen(monkeypatch):
    """The fault that one workspace for all brings, planted: a weight that is lent too early."""
    plain, model = gradient(llama()), llama()
    share_workspace(model)
    weights = four_bit_weights(model)
    first = weights[0].lent(torch.float32)
    monkeypatch.setattr(nf4.NF4Weight, "lent", lambda self, dtype: first if self is weights[0] else _lent(self, dtype))
    assert not equal(plain, gradient(model))


_lent = nf4.NF4Weight.lent


def test_experts_are_found_too(monkeypatch):
    model = nn.ModuleList([llama(), llama()])
    assert len(four_bit_weights(model)) == 2 * 4 * 7


def test_wrong_numbers_are_refused(monkeypatch):
    model = llama()
    require_exact(model)
    real = nf4._in_blocks
    monkeypatch.setattr(nf4, "_in_blocks", lambda state: state)  # bitsandbytes' CPU kernel as it is
    if torch.equal(model.model.layers[0].mlp.up_proj.frozen.dense(torch.float32), _by_blocks(model, real)):
        pytest.skip("this bitsandbytes expands rows that are no whole blocks to the right numbers")
    with pytest.raises(RunError, match="wrong numbers"):
        make_room(model, dense=False)


def _by_blocks(model, real):
    weight = model.model.layers[0].mlp.up_proj.frozen
    return nf4.nf4_reference(weight)


def again(layers=None, host=None):
    return lambda model, fused: checkpoint_layers(model, fused, layers, host)


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "4 bits"])
def test_recomputed_and_offloaded_layers_give_the_same_bits(quantised):
    kept = gradient(llama(quantised))
    for layers in (1, 3, None):
        assert equal(kept, gradient(llama(quantised), again(layers)))
    host = HostCheckpoints(torch.device("cpu"))
    assert equal(kept, gradient(llama(quantised), again(host=host)))
    assert host.moved == 2 * 4, "each layer's input, in each of two passes"
    assert host.peak_bytes == 4 * 27 * 96 * 4, "the second pass has the first one's buffers"


def test_so_many_layers_run_twice():
    calls = []

    def prepare(count):
        def run(model, fused: Fused):
            for i, layer in enumerate(model.model.layers):
                layer.mlp.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
            assert checkpoint_layers(model, fused, count) == count

        return run

    gradient(llama(), prepare(2), passes=1)
    assert sorted(calls) == [0, 0, 1, 1, 2, 3], "the first two, whose turn comes last in the backward pass"


def test_half_precision_stays_what_it_was():
    """What waits on the host comes back in the type that it left in, negative zeros and subnormals too."""
    host = HostCheckpoints(torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        t = torch.tensor([-0.0, 1e-7, 3.14159, float("inf"), -1e-38]).to(dtype).view(1, 5)
        ticket = host.put(t)
        back = host.take(ticket)
        assert back.dtype == dtype and back.view(torch.uint8).equal(t.view(torch.uint8))
        del ticket, back


def test_evaluation_is_not_offloaded():
    model, host = llama(False), HostCheckpoints(torch.device("cpu"))
    fused = Fused()
    checkpoint_layers(model, fused, None, host)
    with torch.no_grad():
        model(input_ids=torch.arange(5)[None], use_cache=False)
    assert host.moved == 0
    fused.undo()
