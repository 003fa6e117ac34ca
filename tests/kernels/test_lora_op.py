"""The fused LoRA projection against its reference, and its dropout."""

import pytest
import torch

from welltuned.kernels.lora import Dropout, Projection, Rows, lora, lora_reference
from welltuned.kernels.nf4 import DenseWeight

IN, OUT = 12, 9


def normal(*shape, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def projection(scales, inputs=IN, outputs=OUT, index=3, dtype=torch.float64):
    return Projection(DenseWeight(normal(outputs, inputs, dtype=dtype, grad=False)), scales, index)


def adapters(k, r, inputs=IN, outputs=OUT):
    return normal(k, r, inputs), normal(k, outputs, r)


SHAPES = {
    "one adapter": (11, 1, 4, None),
    "one token": (1, 1, 4, None),
    "rank 1": (11, 1, 1, None),
    "rank 17": (11, 1, 17, None),
    "three adapters": (11, 3, 4, (5, 2, 4)),
    "an adapter without rows": (11, 3, 4, (4, 0, 7)),
    "only the last adapter has rows": (11, 3, 4, (0, 0, 11)),
    "two adapters with a row each": (2, 2, 1, (1, 1)),
    "three with equally many rows": (12, 3, 4, (4, 4, 4)),
    "the last two with equally many": (10, 3, 4, (0, 5, 5)),
}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("n", "k", "r", "per_adapter"), SHAPES.values(), ids=SHAPES.keys())
def test_equals_reference(agree, n, k, r, per_adapter, dropout):
    p, (a, b), x = projection([0.5, 2.0, 3.0][:k]), adapters(k, r), normal(n, IN)
    spans = ((n, 7),) if n == 1 else ((1, 7), (n - 1, 8))
    rows = Rows(per_adapter, Dropout(dropout, spans))
    agree(lambda: lora(x, p, a, b, None, rows), lambda: lora_reference(x, p, a, b, None, rows), x, a, b)


def test_equal_rows_are_batched_products(monkeypatch):
    """Two batched products forward, whatever K; without them the test above would compare the loop with itself."""
    calls = []
    for name in ("mm", "bmm"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k))
    p, (a, b), x = projection([0.5, 2.0, 3.0]), adapters(3, 4), normal(12, IN)
    y = lora(x, p, a, b, None, Rows((4, 4, 4)))
    assert calls == ["bmm"]  # S = x A^T; B's is an in-place addition
    y.sum().backward()
    assert calls.count("mm") == 1 and calls.count("bmm") == 4  # the frozen weight's; dS, dB, dA


@pytest.mark.parametrize("shares", [(0.4, 0.0), (0.2, 0.5)])
def test_each_adapter_has_its_own_dropout(agree, shares):
    p, (a, b), x = projection([0.5, 2.0]), adapters(2, 4), normal(10, IN)
    rows = Rows((5, 5), Dropout(max(shares), ((5, 7), (5, 7)), shares))

    def singles():
        return torch.cat([
            lora_reference(x[s], Projection(p.weight, [p.scale_K[k]], p.index), a[k : k + 1], b[k : k + 1], None,
                           Rows(None, Dropout(shares[k], ((5, 7),))))
            for k, s in enumerate((slice(0, 5), slice(5, 10)))
        ])  # fmt: skip

    agree(lambda: lora(x, p, a, b, None, rows), singles, x, a, b)


@pytest.mark.parametrize("trained", [True, False])
def test_bias(agree, trained):
    p, (a, b), x, bias = projection([0.5]), adapters(1, 4), normal(11, IN), normal(OUT, grad=trained)
    leaves = (x, a, b, bias) if trained else (x, a, b)
    agree(lambda: lora(x, p, a, b, bias, Rows()), lambda: lora_reference(x, p, a, b, bias, Rows()), *leaves)


def test_non_contiguous_input_and_gradient(agree):
    p, (a, b), wide, rows = projection([0.5]), adapters(1, 4), normal(IN, 11), Rows()
    agree(
        lambda: lora(wide.t(), p, a, b, None, rows).t(),
        lambda: lora_reference(wide.t(), p, a, b, None, rows).t(),
        wide, a, b,
    )  # fmt: skip


def test_transposed_weight(agree):
    """GPT-2's Conv1D stores [in, out]: the projection sees a view."""
    p, (a, b), x = Projection(DenseWeight(normal(IN, OUT, grad=False).t()), [1.5]), adapters(1, 4), normal(11, IN)
    agree(lambda: lora(x, p, a, b, None, Rows()), lambda: lora_reference(x, p, a, b, None, Rows()), x, a, b)


def test_input_without_gradient(agree):
    p, (a, b), x, rows = projection([0.5]), adapters(1, 4), normal(11, IN, grad=False), Rows()
    agree(lambda: lora(x, p, a, b, None, rows), lambda: lora_reference(x, p, a, b, None, rows), a, b)


def test_scale_multiplies_the_adapter_only():
    x, (a, b) = normal(5, IN, grad=False), adapters(1, 4)
    p = projection([1.0])
    base = x @ p.weight.dense(x.dtype).t()
    once = lora(x, p, a, b, None, Rows()) - base
    thrice = lora(x, Projection(p.weight, [3.0]), a, b, None, Rows()) - base
    torch.testing.assert_close(thrice, 3.0 * once, rtol=1e-12, atol=1e-12)
    as_tensor = lora(x, Projection(p.weight, torch.tensor([3.0])), a, b, None, Rows()) - base
    assert torch.equal(as_tensor, thrice)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(dropout):
    p, (a, b), x, bias = projection([0.5, 2.0], 4, 3), adapters(2, 2, 4, 3), normal(5, 4), normal(3)
    rows = Rows((2, 3), Dropout(dropout, ((2, 1), (3, 2))))
    assert torch.autograd.gradcheck(lambda *t: lora(t[0], p, *t[1:], rows), (x, a, b, bias))


def test_two_adapters_are_two_single_ones(agree):
    """No number of one adapter's rows depends on the other."""
    p, (a, b), x = projection([0.5, 2.0]), adapters(2, 4), normal(11, IN)

    def singles():
        parts = [(slice(0, 5), 0), (slice(5, 11), 1)]
        ones = [lora(x[s], Projection(p.weight, [p.scale_K[k]]), a[k : k + 1], b[k : k + 1], None, Rows())
                for s, k in parts]  # fmt: skip
        return torch.cat(ones)

    agree(lambda: lora(x, p, a, b, None, Rows((5, 6))), singles, x, a, b)


def test_rows_set_anew_before_the_backward_pass():
    """Gradient accumulation reuses the shared Rows object: the graph keeps those it was built with."""
    p, (a, b), x = projection([0.5, 2.0]), adapters(2, 4), normal(6, IN)
    rows = Rows((2, 4), Dropout(0.3, ((6, 1),)))
    expected = torch.autograd.grad(lora_reference(x, p, a, b, None, rows).sum(), (x, a, b))
    y = lora(x, p, a, b, None, rows)
    rows.per_adapter, rows.dropout = (6, 0), Dropout(0.3, ((6, 2),))
    for mine, plain in zip(torch.autograd.grad(y.sum(), (x, a, b)), expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-12)


def test_half_precision_keeps_float32_masters():
    """bf16 activations and weight: gradients of A and B arrive in fp32, near those of fp32 arithmetic."""
    weight = torch.randn(32, 64).bfloat16()
    x, a, b = torch.randn(40, 64).bfloat16(), torch.randn(1, 8, 64) / 8, torch.randn(1, 32, 8) / 8
    bias = torch.randn(32)
    leaves = [t.requires_grad_() for t in (x, a, b, bias)]
    y = lora(x, Projection(DenseWeight(weight), [0.5]), a, b, bias, Rows())
    assert y.dtype == torch.bfloat16
    direction = torch.randn(40, 32).bfloat16()
    mine = torch.autograd.grad(y, leaves, direction)
    assert [g.dtype for g in mine] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    xf = x.detach().float().requires_grad_()
    plain_y = lora_reference(xf, Projection(DenseWeight(weight.float()), [0.5]), a, b, bias, Rows())
    plain = torch.autograd.grad(plain_y, (xf, a, b, bias), direction.float())
    for m, q in zip((y, *mine), (plain_y, *plain), strict=True):
        assert (m.float() - q).norm() < 0.01 * q.norm()


def test_rows_that_do_not_add_up_are_refused():
    p, (a, b), x = projection([0.5, 2.0]), adapters(2, 4), normal(6, IN)
    with pytest.raises(ValueError, match="do not add up to 6"):
        lora(x, p, a, b, None, Rows((2, 3)))
    with pytest.raises(ValueError, match="cover 5 rows of 6"):
        lora(x, p, a, b, None, Rows((2, 4), Dropout(0.1, ((5, 1),))))


# Dropout -------------------------------------------------------------------------------------------------------------


def test_mask_belongs_to_the_example_not_to_the_pack():
    x = torch.empty(10, 33)
    alone = Dropout(0.5, ((4, 11),)).mask(x[:4], projection=2)
    first = Dropout(0.5, ((4, 11), (6, 12))).mask(x, projection=2)
    last = Dropout(0.5, ((6, 12), (4, 11))).mask(x, projection=2)
    assert torch.equal(first[:4], alone)
    assert torch.equal(last[6:], alone)


def test_masks_differ_between_examples_and_projections():
    x = torch.empty(64, 64)
    masks = [Dropout(0.5, ((64, key),)).mask(x, index) for key in (0, 1, 2, 1 << 32) for index in (0, 1, 2, 211)]
    kept = [mask != 0 for mask in masks]
    for i, one in enumerate(kept):
        for other in kept[:i]:
            assert 0.4 < (one == other).double().mean() < 0.6  # independent coins agree half the time


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_mask_has_the_right_rate_and_keeps_the_mean(p):
    mask = Dropout(p, ((1000, 5),)).mask(torch.empty(1000, 100, dtype=torch.float64), 0)
    dropped = (mask == 0).double().mean().item()
    assert abs(dropped - p) < 4 * (p * (1 - p) / mask.numel()) ** 0.5
    assert torch.equal(mask[mask != 0].unique(), torch.tensor([1 / (1 - p)], dtype=torch.float64))


def test_mask_is_the_same_in_every_dtype_up_to_rounding():
    spans = ((16, 5),)
    single, half = (Dropout(0.3, spans).mask(torch.empty(16, 32, dtype=t), 0) for t in (torch.float32, torch.bfloat16))
    assert torch.equal(single == 0, half == 0)
