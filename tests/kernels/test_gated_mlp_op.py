"""The fused gated MLP against its reference."""

import pytest
import torch

from welltuned.kernels.gated_mlp import Activation, GatedMLP, gated_mlp, gated_mlp_reference
from welltuned.kernels.lora import Dropout, Projection, Rows
from welltuned.kernels.nf4 import DenseWeight


def normal(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def build(hidden=6, inner=10, k=1, r=3, activation=Activation.SILU):
    """(mlp, pairs)."""
    sizes = [(inner, hidden), (inner, hidden), (hidden, inner)]
    scales = [0.5, 2.0][:k]
    projections = [Projection(DenseWeight(normal(o, i, grad=False)), scales, n) for n, (o, i) in enumerate(sizes)]
    return GatedMLP(*projections, activation), [(normal(k, r, i), normal(k, o, r)) for o, i in sizes]


def leaves(pairs):
    return [t for pair in pairs for t in pair]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("per_adapter", [None, (3, 4), (0, 7)], ids=str)
@pytest.mark.parametrize("activation", Activation)
def test_equals_reference(agree, activation, per_adapter, dropout):
    mlp, pairs = build(k=1 if per_adapter is None else 2, activation=activation)
    x, rows = normal(7, 6), Rows(per_adapter, Dropout(dropout, ((3, 1), (4, 2))))
    agree(
        lambda: gated_mlp(x, mlp, *pairs, rows),
        lambda: gated_mlp_reference(x, mlp, *pairs, rows),
        x, *leaves(pairs),
    )  # fmt: skip


def test_input_without_gradient(agree):
    mlp, pairs = build()
    x = normal(7, 6, grad=False)
    agree(lambda: gated_mlp(x, mlp, *pairs, Rows()), lambda: gated_mlp_reference(x, mlp, *pairs, Rows()),
          *leaves(pairs))  # fmt: skip


def test_backward_twice_gives_the_same():
    """The backward pass works in place on what it forms itself, never on what was saved."""
    mlp, pairs = build()
    x = normal(7, 6)
    y = gated_mlp(x, mlp, *pairs, Rows())
    first, second = (torch.autograd.grad(y.sum(), (x, *leaves(pairs)), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradcheck():
    mlp, pairs = build(hidden=3, inner=4, r=2)

    def run(x, *flat):
        return gated_mlp(x, mlp, *zip(flat[::2], flat[1::2], strict=True), Rows())

    assert torch.autograd.gradcheck(run, (normal(4, 3), *leaves(pairs)))
