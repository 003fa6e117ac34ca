"""RMS norm against its reference."""

import pytest
import torch

from welltuned.kernels.norm import rms_norm, rms_norm_reference

SHAPES = [(7, 16), (1, 5, 4, 8), (1, 1)]


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(agree, shape, eps):
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    gain = torch.randn(shape[-1], dtype=torch.float64)
    agree(lambda: rms_norm(x, gain, eps), lambda: rms_norm_reference(x, gain, eps), x)


def test_non_contiguous_input_and_gradient(agree):
    """Query and key norms see a transposed view."""
    x = torch.randn(1, 5, 4, 8, dtype=torch.float64).requires_grad_()
    gain = torch.randn(8, dtype=torch.float64)
    agree(
        lambda: rms_norm(x.transpose(1, 2), gain, 1e-6).transpose(1, 3),
        lambda: rms_norm_reference(x.transpose(1, 2), gain, 1e-6).transpose(1, 3),
        x,
    )


def test_tiny_and_huge_rows_stay_finite(agree):
    x = (torch.randn(4, 16) * torch.tensor([[0.0], [1e-20], [1.0], [1e15]])).requires_grad_()
    gain = torch.randn(16)
    agree(lambda: rms_norm(x, gain, 1e-6), lambda: rms_norm_reference(x, gain, 1e-6), x, rtol=1e-5)


def test_gradcheck():
    x, gain = torch.randn(3, 5, dtype=torch.float64).requires_grad_(), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: rms_norm(t, gain, 1e-3), (x,))


def test_half_precision_is_near_float32():
    x, gain = torch.randn(9, 64).bfloat16().requires_grad_(), torch.rand(64).bfloat16() + 0.5
    y = rms_norm(x, gain, 1e-6)
    assert y.dtype == torch.bfloat16
    plain = rms_norm_reference(x.detach().float(), gain.float(), 1e-6)
    assert (y.float() - plain).norm() < 5e-3 * plain.norm()
