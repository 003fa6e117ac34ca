"""Comparing a fused op with its plain reference: the value and every gradient."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tiny products: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def agree():
    """agree(fused, reference, *leaves): same output, same gradient of a random projection of it for each leaf."""

    def check(fused, reference, *leaves, rtol=1e-9):
        mine, plain = fused(), reference()
        direction = torch.randn_like(plain)
        close(mine, plain, rtol)
        mine_grads = torch.autograd.grad(mine, leaves, direction)
        plain_grads = torch.autograd.grad(plain, leaves, direction)
        for mine_grad, plain_grad in zip(mine_grads, plain_grads, strict=True):
            close(mine_grad, plain_grad, rtol)

    return check


def close(mine, plain, rtol):
    assert mine.shape == plain.shape
    assert mine.dtype == plain.dtype
    scale = max(1.0, plain.abs().max().item()) if plain.numel() else 1.0
    torch.testing.assert_close(mine, plain, rtol=rtol, atol=rtol * scale)
