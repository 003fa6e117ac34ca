"""The chunked log-probabilities against their reference, with upstream gradients that no forward pass could know."""

import pytest
import torch

from welltuned.kernels import token_loss as tiles_of
from welltuned.kernels.token_logprob import token_logprob, token_logprob_reference
from welltuned.kernels.token_loss import Head

H = 6


@pytest.fixture(params=[(256, 8192), (3, 7), (1, 1)], ids=lambda p: f"{p[0]}x{p[1]}")
def tiles(request, monkeypatch):
    monkeypatch.setattr(tiles_of, "ON_CPU", request.param)


def normal(*shape, grad=True, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def problem(m=8, vocabulary=20, bias=False, train_head=False, train_bias=False, **head):
    w = normal(vocabulary, H, grad=train_head)
    b = normal(vocabulary, grad=train_bias) if bias else None
    target = torch.randint(vocabulary, (m,))
    target[0], target[-1] = 0, vocabulary - 1
    return normal(m, H), Head(w, b, **head), target


HEADS = {
    "plain": {},
    "bias and scale": {"bias": True, "scale": 0.25},
    "softcap": {"softcap": 2.0, "scale": 0.5},
    "trained weight": {"train_head": True},
    "trained bias": {"bias": True, "train_bias": True},
    "all trained": {"bias": True, "train_head": True, "train_bias": True, "scale": 3.0, "softcap": 2.0},
}


def leaves_of(h, head):
    return [t for t in (h, head.w_VH, head.bias_V) if t is not None and t.requires_grad]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", HEADS.values(), ids=HEADS.keys())
def test_equals_reference(agree, tiles, kind, temperature):
    h, head, target = problem(**kind)
    agree(
        lambda: token_logprob(h, head, target, temperature=temperature)[0],
        lambda: token_logprob_reference(h, head, target, temperature)[0],
        *leaves_of(h, head),
    )
    mine = token_logprob(h, head, target, temperature=temperature, entropy=True)[1]
    torch.testing.assert_close(mine, token_logprob_reference(h, head, target, temperature)[1], rtol=1e-9, atol=1e-9)
    assert not mine.requires_grad


@pytest.mark.parametrize("kind", HEADS.values(), ids=HEADS.keys())
def test_gradcheck(monkeypatch, kind):
    monkeypatch.setattr(tiles_of, "ON_CPU", (3, 4))
    h, head, target = problem(m=4, vocabulary=9, **kind)

    def run(*tensors):
        given = iter(tensors)
        now = [next(given) if t is not None and t.requires_grad else t for t in (h, head.w_VH, head.bias_V)]
        # A ratio of probabilities, clipped: the gradient of each row depends on its own value.
        logprob = token_logprob(now[0], Head(now[1], now[2], head.scale, head.softcap), target, temperature=1.3)[0]
        return (logprob + 2.0).exp().clamp(0.1, 0.9)

    assert torch.autograd.gradcheck(run, leaves_of(h, head))


@pytest.mark.parametrize("kind", [{}, {"softcap": 2.0}, {"train_head": True}], ids=str)
def test_frozen_hidden_states_and_no_gradient_at_all(tiles, kind):
    h, head, target = problem(**kind)
    plain = token_logprob_reference(h, head, target)[0]
    with torch.no_grad():
        value = token_logprob(h, head, target)[0]
    torch.testing.assert_close(value, plain.detach(), rtol=1e-9, atol=1e-9)
    if head.w_VH.requires_grad:
        (mine,) = torch.autograd.grad(token_logprob(h.detach(), head, target)[0].sum(), head.w_VH)
        (exact,) = torch.autograd.grad(plain.sum(), head.w_VH)
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-9)


def test_no_row():
    h, head, target = problem()
    value, entropy = token_logprob(h[:0], head, target[:0], entropy=True)
    assert value.shape == entropy.shape == (0,)
    (gradient,) = torch.autograd.grad(value.sum(), h)
    assert not gradient.any()


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_huge_logits(tiles, softcap):
    """Logits of +-1e4, the largest on the target or far from it: finite, and as the reference has it."""
    w = torch.randn(20, H)
    h = (w[:8] * 1e4 / w[:8].pow(2).sum(1, keepdim=True)).requires_grad_()
    head = Head(w, softcap=softcap)
    for target in (torch.arange(8), torch.arange(8) + 12):
        (mine, spread), (plain, exact) = (
            token_logprob(h, head, target, entropy=True),
            token_logprob_reference(h, head, target),
        )
        (mine_h,), (plain_h,) = torch.autograd.grad(mine.sum(), h), torch.autograd.grad(plain.sum(), h)
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine_h, plain_h, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(spread, exact, rtol=1e-3, atol=3e-3)


@pytest.mark.parametrize("kind", [{}, {"scale": 0.5, "softcap": 5.0}, {"train_head": True}], ids=str)
def test_bfloat16_is_near_float32(tiles, kind):
    h, head, target = problem(m=40, vocabulary=50, **kind)
    half_h = h.detach().bfloat16().requires_grad_()
    half_w = head.w_VH.detach().bfloat16().requires_grad_(head.w_VH.requires_grad)
    upstream = torch.randn(40)
    value = token_logprob(half_h, Head(half_w, scale=head.scale, softcap=head.softcap), target)[0]
    assert value.dtype == torch.float32
    wide_h, wide_w = (t.detach().float().requires_grad_() for t in (half_h, half_w))
    plain = token_logprob_reference(wide_h, Head(wide_w, scale=head.scale, softcap=head.softcap), target)[0]
    torch.testing.assert_close(value, plain, rtol=2e-2, atol=2e-2)
    leaves, wide_leaves = ((half_h, half_w), (wide_h, wide_w)) if half_w.requires_grad else ((half_h,), (wide_h,))
    grads, exact = torch.autograd.grad(value, leaves, upstream), torch.autograd.grad(plain, wide_leaves, upstream)
    for mine, wanted in zip(grads, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.float() - wanted).norm() < 2e-2 * wanted.norm()


def test_zero_upstream_is_a_zero_gradient_exactly(tiles):
    """A row whose advantage is zero moves nothing, not even by rounding."""
    h, head, target = problem(train_head=False)
    upstream = torch.zeros(8, dtype=torch.float64)
    upstream[3] = 1.0
    (gradient,) = torch.autograd.grad(token_logprob(h, head, target)[0], h, upstream)
    assert gradient[3].any()
    assert not gradient[torch.arange(8) != 3].any()


def test_each_row_is_its_own(monkeypatch):
    """A row's log-probability does not depend on the rows around it, within a block or across blocks."""
    monkeypatch.setattr(tiles_of, "ON_CPU", (64, 16))
    h, head, target = problem(m=300, vocabulary=33)
    each = token_logprob(h, head, target)[0]
    other = h.detach().clone()
    other[100:] = torch.randn(200, H, dtype=torch.float64)
    assert torch.equal(token_logprob(other, head, target)[0][:100], each[:100].detach())
