"""The chunked head loss against its reference, at every boundary of rows and of the vocabulary."""

import pytest
import torch

from welltuned.kernels import token_loss as module
from welltuned.kernels.token_loss import Head, token_loss, token_loss_reference

H = 6


@pytest.fixture(params=[(256, 8192), (3, 7), (4, 5), (1, 1)], ids=lambda p: f"{p[0]}x{p[1]}")
def tiles(request, monkeypatch):
    """Sizes of a block of rows and of a tile of vocabulary: one of everything, ragged, even, single."""
    monkeypatch.setattr(module, "ON_CPU", request.param)


def normal(*shape, grad=True, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def problem(m=8, vocabulary=20, bias=False, train_head=False, train_bias=False, **head):
    w = normal(vocabulary, H, grad=train_head)
    b = normal(vocabulary, grad=train_bias) if bias else None
    target = torch.randint(vocabulary, (m,))
    target[0], target[-1] = 0, vocabulary - 1
    return normal(m, H), Head(w, b, **head), target, torch.rand(m, dtype=torch.float64)


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 2.0},
    "all of them": {"bias": True, "scale": 0.25, "softcap": 2.0},
    "trained weight": {"train_head": True},
    "trained bias": {"bias": True, "train_bias": True},
    "all trained": {"bias": True, "train_head": True, "train_bias": True, "scale": 3.0, "softcap": 2.0},
}


@pytest.mark.parametrize("kind", HEADS.values(), ids=HEADS.keys())
def test_equals_reference(agree, tiles, kind):
    h, head, target, weight = problem(**kind)
    leaves = [t for t in (h, head.w_VH, head.bias_V) if t is not None and t.requires_grad]
    agree(
        lambda: token_loss(h, head, target, weight)[0],
        lambda: token_loss_reference(h, head, target, weight)[0],
        *leaves,
    )
    each, plain = token_loss(h, head, target, weight)[1], token_loss_reference(h, head, target, weight)[1]
    torch.testing.assert_close(each, plain, rtol=1e-9, atol=1e-9)
    assert not each.requires_grad


@pytest.mark.parametrize("op", ["loss", "logprob"])
def test_a_vocabulary_of_262_thousand_needs_no_logits_of_all_rows(op):
    """Gemma 3's vocabulary: the logits of these rows would take 0.54 GB, and their gradient as much."""
    from torch.profiler import ProfilerActivity, profile

    from welltuned.kernels.token_logprob import token_logprob

    m, vocabulary = 512, 262_144
    h = torch.randn(m, 8, requires_grad=True)
    head, target = Head(torch.randn(vocabulary, 8)), torch.randint(vocabulary, (m,))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        if op == "loss":
            value = token_loss(h, head, target, torch.full((m,), 1 / m))[0]
        else:
            value = -token_logprob(h, head, target)[0].mean()
        value.backward()
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        now += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, now)
    assert 0 < peak < 4 * m * vocabulary / 16
    assert float(value.detach()) > 5 and torch.isfinite(h.grad).all()


@pytest.mark.parametrize("kind", [{}, {"softcap": 2.0}, {"train_head": True}], ids=str)
def test_frozen_hidden_states_and_no_gradient_at_all(tiles, kind):
    h, head, target, weight = problem(**kind)
    with torch.no_grad():
        value, each = token_loss(h, head, target, weight)
    plain, plain_each = token_loss_reference(h, head, target, weight)
    torch.testing.assert_close(value, plain.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(each, plain_each, rtol=1e-9, atol=1e-9)
    if head.w_VH.requires_grad:
        (mine,) = torch.autograd.grad(token_loss(h.detach(), head, target, weight)[0], head.w_VH)
        (exact,) = torch.autograd.grad(plain, head.w_VH)
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-9)


def test_no_labelled_row():
    h, head, target, weight = problem()
    value, each = token_loss(h[:0], head, target[:0], weight[:0])
    assert value == 0
    assert each.shape == (0,)
    (gradient,) = torch.autograd.grad(value, h)
    assert not gradient.any()


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_logits(tiles, dtype, softcap):
    """Logits of +-1e4, the largest on the target or far from it: finite, and as the reference has it."""
    w = torch.randn(20, H, dtype=dtype)
    h = (w[:8] * 1e4 / w[:8].pow(2).sum(1, keepdim=True)).requires_grad_()
    head, weight = Head(w, softcap=softcap), torch.ones(8, dtype=dtype)
    for target in (torch.arange(8), torch.arange(8) + 12):
        mine, plain = (f(h, head, target, weight)[0] for f in (token_loss, token_loss_reference))
        (mine_h,), (plain_h,) = torch.autograd.grad(mine, h), torch.autograd.grad(plain, h)
        assert torch.isfinite(mine)
        assert torch.isfinite(mine_h).all()
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine_h, plain_h, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [{}, {"scale": 0.5, "softcap": 5.0}, {"train_head": True}], ids=str)
def test_bfloat16_is_near_float32(tiles, kind):
    h, head, target, weight = problem(m=40, vocabulary=50, **kind)
    half_h = h.detach().bfloat16().requires_grad_()
    half_w = head.w_VH.detach().bfloat16().requires_grad_(head.w_VH.requires_grad)
    value, each = token_loss(half_h, Head(half_w, scale=head.scale, softcap=head.softcap), target, weight.float())
    assert value.dtype == each.dtype == torch.float32
    wide_h, wide_w = (t.detach().float().requires_grad_() for t in (half_h, half_w))
    plain, plain_each = token_loss_reference(
        wide_h, Head(wide_w, scale=head.scale, softcap=head.softcap), target, weight.float()
    )
    torch.testing.assert_close(each, plain_each, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(value, plain, rtol=5e-3, atol=5e-3)
    leaves, wide_leaves = ((half_h, half_w), (wide_h, wide_w)) if half_w.requires_grad else ((half_h,), (wide_h,))
    grads, exact = torch.autograd.grad(value, leaves), torch.autograd.grad(plain, wide_leaves)
    for mine, wanted in zip(grads, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.float() - wanted).norm() < 2e-2 * wanted.norm()


@pytest.mark.parametrize("kind", [{}, {"bias": True, "train_head": True, "train_bias": True, "softcap": 2.0}], ids=str)
def test_gradcheck(monkeypatch, kind):
    monkeypatch.setattr(module, "ON_CPU", (3, 4))
    h, head, target, weight = problem(m=4, vocabulary=9, **kind)
    leaves = [t for t in (h, head.w_VH, head.bias_V) if t is not None and t.requires_grad]

    def run(h, w=head.w_VH, b=head.bias_V):
        return token_loss(h, Head(w, b, head.scale, head.softcap), target, weight)[0]

    assert torch.autograd.gradcheck(run, leaves)


def test_upstream_gradient_scales(tiles):
    """The step multiplies the loss by what it likes: gradients formed in the forward pass follow."""
    h, head, target, weight = problem(train_head=True)
    once = torch.autograd.grad(token_loss(h, head, target, weight)[0], (h, head.w_VH))
    scaled = torch.autograd.grad(token_loss(h, head, target, weight)[0] * -2.5, (h, head.w_VH))
    for one, other in zip(once, scaled, strict=True):
        torch.testing.assert_close(other, one * -2.5, rtol=1e-12, atol=1e-12)


def test_each_row_is_its_own():
    """A row's loss does not depend on the rows around it, within a block or across blocks."""
    h, head, target, weight = problem(m=300, vocabulary=33)
    each = token_loss(h, head, target, weight)[1]
    other = h.detach().clone()
    other[100:] = torch.randn(200, H, dtype=torch.float64)
    assert torch.equal(token_loss(other, head, target, weight)[1][:100], each[:100])
