"""NF4 weights: the same numbers as bitsandbytes, and exact gradients through them."""

import pytest
import torch

from welltuned.kernels.lora import Projection, Rows, lora
from welltuned.kernels.nf4 import DenseWeight, NF4Weight, Workspace, nf4_reference
from welltuned.models.frozen import NF4Linear

bnb = pytest.importorskip("bitsandbytes")

# The sixteen levels of NormalFloat 4 (Dettmers et al. 2023, appendix E), rounded.
LEVELS = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
LEVELS += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 64), (20, 128), (7, 33)], ids=str)  # bitsandbytes' own CPU kernel errs at 96
def test_equals_bitsandbytes(shape, dtype):
    w = torch.randn(shape, dtype=dtype)
    mine = NF4Weight.quantize(w)
    linear = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type="nf4", compress_statistics=True)
    linear.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    linear = linear.to("cpu")
    state = linear.weight.quant_state
    assert torch.equal(mine.packed.flatten(), linear.weight.data.flatten())
    assert torch.equal(mine.dense(dtype), bnb.functional.dequantize_4bit(linear.weight.data, state).to(dtype))
    assert mine.dense(dtype).dtype == dtype
    assert mine.shape == shape


def test_each_value_is_the_nearest_level_of_its_block():
    w = torch.randn(16, 128)
    dense = NF4Weight.quantize(w).dense(torch.float32)
    blocks, got = w.view(-1, 64), dense.view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(LEVELS)
    nearest = levels[(blocks / largest).unsqueeze(-1).sub(levels).abs().argmin(-1)] * largest
    assert ((got - nearest).abs() / largest).max() < 0.02  # the blocks' scales are 8-bit numbers themselves
    assert (got - nearest).abs().mean() < 0.005


def test_storage_is_about_half_a_byte_a_weight():
    weight = NF4Weight.quantize(torch.randn(256, 256))
    assert weight.packed.numel() * weight.packed.element_size() == 256 * 256 // 2
    assert weight.state.nested  # double quantisation


def test_linear_gradient_is_that_of_the_dequantised_weight():
    weight, bias = NF4Weight.quantize(torch.randn(24, 64)), torch.nn.Parameter(torch.randn(24), requires_grad=False)
    layer, dense = NF4Linear(weight, bias), torch.nn.Linear(64, 24)
    dense.weight.data, dense.bias.data = weight.dense(torch.float32), bias.data
    x, direction = torch.randn(2, 5, 64).requires_grad_(), torch.randn(2, 5, 24)
    for mode in (True, False):  # bitsandbytes' own CPU layer repacks its weight in eval mode
        layer.train(mode)
        mine, plain = layer(x), dense(x)
        torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            torch.autograd.grad(mine, x, direction), torch.autograd.grad(plain, x, direction), rtol=1e-6, atol=1e-6
        )


def test_trained_bias_of_a_frozen_layer():
    layer = NF4Linear(NF4Weight.quantize(torch.randn(24, 64)), torch.nn.Parameter(torch.randn(24)))
    direction = torch.randn(2, 5, 24)
    (gradient,) = torch.autograd.grad(layer(torch.randn(2, 5, 64)), layer.bias, direction)
    torch.testing.assert_close(gradient, direction.sum((0, 1)))


def test_lora_on_a_quantised_weight_is_lora_on_the_dequantised_one():
    weight = NF4Weight.quantize(torch.randn(24, 64))
    x, a, b = (torch.randn(s).requires_grad_() for s in ((7, 64), (1, 4, 64), (1, 24, 4)))
    mine, plain = (
        lora(x, Projection(w, [0.5]), a, b, None, Rows()) for w in (weight, DenseWeight(weight.dense(torch.float32)))
    )
    assert torch.equal(mine, plain)
    direction = torch.randn(7, 24)
    for one, other in zip(
        torch.autograd.grad(mine, (x, a, b), direction), torch.autograd.grad(plain, (x, a, b), direction), strict=True
    ):
        assert torch.equal(one, other)


WIDTHS = [(20, 96), (7, 34), (5, 7), (64, 160), (48, 64), (33, 100)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", WIDTHS, ids=str)
def test_equals_plain_torch_bit_for_bit_at_any_width(shape, dtype):
    w = torch.randn(shape).to(dtype)
    weight = NF4Weight.quantize(w)
    assert torch.equal(weight.dense(dtype), nf4_reference(weight))
    assert (weight.dense(dtype) - w).abs().max() < 0.2 * w.abs().max()  # half of the widest gap between levels
    first = weight.first(4)
    assert torch.equal(first.dense(dtype), weight.dense(dtype)[:4])


def test_kept_and_lent_are_the_same_numbers():
    weight, other = NF4Weight.quantize(torch.randn(24, 64)), NF4Weight.quantize(torch.randn(8, 64))
    fresh = weight.dense(torch.float32).clone()
    weight.workspace = other.workspace = Workspace()
    lent = weight.lent(torch.float32)
    assert torch.equal(lent, fresh) and lent.data_ptr() == weight.workspace.flat.data_ptr()
    other.lent(torch.float32)
    assert not torch.equal(lent, fresh), "a lent weight is overwritten: whoever keeps one would train on another's"
    assert weight.keep() == 24 * 64 * 4
    assert torch.equal(weight.lent(torch.float32), fresh) and torch.equal(weight.dense(torch.float32), fresh)
    assert weight.lent(torch.float32).data_ptr() == weight.kept.data_ptr()


def test_moving_a_model_moves_what_its_adapters_stand_on():
    """bitsandbytes issue 2078: a weight that is moved loses its state."""
    layer = NF4Linear(NF4Weight.quantize(torch.randn(24, 64)), None)
    held, before = layer.frozen, layer.frozen.dense(torch.float32)
    layer.to("meta")
    assert layer.frozen is held and held.packed.is_meta
    again = NF4Linear(NF4Weight.quantize(torch.randn(24, 64)), None).to("cpu")
    assert again.frozen.packed.device.type == "cpu" and before.shape == again.frozen.shape
