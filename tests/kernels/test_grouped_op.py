"""Experts with LoRA against their reference, which forms each expert's changed weight and takes a token at a time."""

import pytest
import torch

from welltuned.kernels.grouped import Adapter, DenseStack, Experts, NF4Stack, experts_reference, lora_experts
from welltuned.kernels.lora import Rows

E, H, W, R = 5, 6, 4, 3


def normal(*shape, grad=False, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def gate(h):
    a, b = h.chunk(2, dim=-1)
    return torch.nn.functional.silu(a) * b


def interleaved(h):
    return (h[..., 1::2].clamp(-1, 1) + 1) * torch.sigmoid(h[..., ::2])


def experts(act=gate, biases=False, gated=2):
    bias = (normal(E, gated * W), normal(E, H)) if biases else (None, None)
    return Experts(DenseStack(normal(E, gated * W, H)), DenseStack(normal(E, H, W)), act, *bias)


def adapters(k=1, r=R, gated=2, scales=(0.5, 2.0, 3.0)):
    def one(outputs, inputs):
        return Adapter(normal(k, E, r, inputs, grad=True), normal(k, E, outputs, r, grad=True), scales[:k])

    return one(gated * W, H), one(H, W)


def routing(n, top=2):
    return torch.stack([torch.randperm(E)[:top] for _ in range(n)]), normal(n, top, grad=True)


def check(agree, made, up, down, rows=None, n=11, index=None, top=2):
    x, rows = normal(n, H, grad=True), rows or Rows()
    drawn, weight = routing(n, top)
    index = drawn if index is None else index
    leaves = [x, weight, *(t for a in (up, down) if a is not None for t in (a.a_KERI, a.b_KEOR))]
    agree(
        lambda: lora_experts(x, index, weight, made, up, down, rows),
        lambda: experts_reference(x, index, weight, made, up, down, rows),
        *leaves,
    )


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("act", [gate, interleaved])
@pytest.mark.parametrize(("n", "top"), [(11, 2), (1, 1), (1, 5), (40, 3)])
def test_equals_reference(agree, n, top, act, biases):
    check(agree, experts(act, biases), *adapters(), n=n, top=top)


def test_without_a_gate(agree):
    check(agree, experts(torch.relu, gated=1), *adapters(gated=1))


@pytest.mark.parametrize("which", [(True, False), (False, True), (False, False)])
def test_one_stack_adapted_or_none(agree, which):
    check(agree, experts(biases=True), *(a if on else None for a, on in zip(adapters(), which, strict=True)))


@pytest.mark.parametrize("per_adapter", [(5, 2, 4), (4, 0, 7), (0, 0, 11)])
def test_three_adapters(agree, per_adapter):
    check(agree, experts(biases=True), *adapters(k=3), rows=Rows(per_adapter))


def test_experts_that_are_not_hit(agree):
    """All tokens go to experts 1 and 3: the others' adapters get zeros, not rubbish."""
    up, down = adapters()
    check(agree, experts(), up, down, index=torch.tensor([[1, 3]] * 11))
    x, weight = normal(4, H), normal(4, 1)
    y = lora_experts(x, torch.tensor([[1]] * 4), weight, experts(), up, down, Rows())
    for gradient in torch.autograd.grad(y.sum(), (up.a_KERI, up.b_KEOR, down.a_KERI, down.b_KEOR)):
        assert gradient[:, 1].any() and not gradient[:, [0, 2, 3, 4]].any()


def test_a_slot_that_stands_for_no_expert():
    """transformers marks masked slots by a number beyond the last expert."""
    made, (up, down), x, (index, weight) = experts(biases=True), adapters(), normal(6, H, grad=True), routing(6)
    masked, zeroed = index.clone(), weight.detach().clone()
    masked[2, 1] = masked[4, 0] = E
    zeroed[2, 1] = zeroed[4, 0] = 0
    leaves = (x, up.a_KERI, up.b_KEOR, down.a_KERI, down.b_KEOR)
    mine, plain = (
        lora_experts(x, masked, weight, made, up, down, Rows()),
        experts_reference(x, index, zeroed, made, up, down, Rows()),
    )
    torch.testing.assert_close(mine, plain)
    for a, b in zip(torch.autograd.grad(mine.sum(), leaves), torch.autograd.grad(plain.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    made, (up, down), (index, weight) = experts(interleaved, True), adapters(2, 2), routing(4)
    x, rows = normal(4, H, grad=True), Rows((1, 3))

    def run(x, weight, au, bu, ad, bd):
        pair = Adapter(au, bu, (0.5, 2.0)), Adapter(ad, bd, (0.5, 2.0))
        return lora_experts(x, index, weight, made, *pair, rows)

    assert torch.autograd.gradcheck(run, (x, weight, up.a_KERI, up.b_KEOR, down.a_KERI, down.b_KEOR))


def test_half_precision_keeps_float32_masters():
    wide, (index, weight) = experts(biases=True), routing(60)
    up, down = (Adapter(*(t.detach().float().requires_grad_() for t in (a.a_KERI, a.b_KEOR)), a.scale_K)
                for a in adapters())  # fmt: skip
    half = Experts(*(DenseStack(s.w_EOI.bfloat16()) for s in (wide.up, wide.down)), gate,
                   wide.up_bias_EO.bfloat16(), wide.down_bias_EO.bfloat16())  # fmt: skip
    leaves = [normal(60, H).bfloat16().requires_grad_(), weight.detach().float().requires_grad_(),
              up.a_KERI, up.b_KEOR, down.a_KERI, down.b_KEOR]  # fmt: skip
    y = lora_experts(leaves[0], index, leaves[1], half, up, down, Rows())
    assert y.dtype == torch.bfloat16
    direction = torch.randn(60, H).bfloat16()
    mine = torch.autograd.grad(y, leaves, direction)
    assert [g.dtype for g in mine] == [torch.bfloat16, *[torch.float32] * 5]
    exact = Experts(*(DenseStack(s.w_EOI.bfloat16().float()) for s in (wide.up, wide.down)), gate,
                    wide.up_bias_EO.bfloat16().float(), wide.down_bias_EO.bfloat16().float())  # fmt: skip
    xf = leaves[0].detach().float().requires_grad_()
    plain_y = experts_reference(xf, index, leaves[1], exact, up, down, Rows())
    plain = torch.autograd.grad(plain_y, (xf, *leaves[1:]), direction.float())
    for m, q in zip((y, *mine), (plain_y, *plain), strict=True):
        assert (m.float() - q).norm() < 0.02 * q.norm()


def test_quantised_one_by_one(agree):
    """Each expert's codes are what it would have alone, and the products are those of the dequantised weights."""
    pytest.importorskip("bitsandbytes")
    from welltuned.kernels.nf4 import NF4Weight

    dense = torch.randn(E, 8, 64), torch.randn(E, 64, 4)
    stacks = [NF4Stack.quantize(w) for w in dense]
    for stack, w in zip(stacks, dense, strict=True):
        assert stack.shape == tuple(w.shape)
        assert all(torch.equal(stack[e].packed, NF4Weight.quantize(w[e]).packed) for e in range(E))
    again = [DenseStack(torch.stack([s[e].dense(torch.float32) for e in range(E)]).double()) for s in stacks]

    def one(outputs, inputs):
        return Adapter(normal(1, E, R, inputs, grad=True), normal(1, E, outputs, R, grad=True), (0.5,))

    up, down, x, (index, weight) = one(8, 64), one(64, 4), normal(9, 64, grad=True), routing(9)
    agree(
        lambda: lora_experts(x, index, weight, Experts(*stacks, gate), up, down, Rows()),
        lambda: experts_reference(x, index, weight, Experts(*again, gate), up, down, Rows()),
        x, weight, up.a_KERI, up.b_KEOR, down.a_KERI, down.b_KEOR,
    )  # fmt: skip
