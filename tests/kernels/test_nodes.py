"""The fused ops as nodes of the compiler: what torch asks of an op, and the numbers of the ops that they stand for."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from welltuned.kernels import nodes
from welltuned.kernels.attention import attention_reference, packed_attention
from welltuned.kernels.gated_mlp import Activation, GatedMLP, gated_mlp
from welltuned.kernels.grouped import Adapter, DenseStack, Experts, lora_experts
from welltuned.kernels.ledger import layout, layout_of, ledger_of, rows_of
from welltuned.kernels.lora import Dropout, Projection, Rows, lora
from welltuned.kernels.nf4 import DenseWeight, NF4Weight

N, IN, OUT, RANK = 7, 6, 5, 2
ROWS = {
    "one adapter": Rows(),
    "two adapters": Rows((3, 4)),
    "two of which one has no rows": Rows((7, 0)),
    "dropout": Rows(None, Dropout(0.3, ((3, 11), (4, 2**88 + 5)))),
    "dropout of each its own": Rows((3, 4), Dropout(0.5, ((3, -7), (4, 9)), (0.0, 0.5))),
}


def normal(*shape, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_a_ledger_gives_the_same_rows_again(rows):
    """And the same masks, for keys of any size."""
    again = rows_of(ledger_of(rows))
    assert again.per_adapter == rows.per_adapter
    if rows.dropout.p:
        x = torch.zeros(7, 3)
        assert torch.equal(again.dropout.mask(x, 4), rows.dropout.mask(x, 4))
    else:
        assert not again.dropout.p


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 5), max_size=3)), min_size=1, max_size=5))
def test_a_layout_gives_lengths_and_branches_again(examples):
    lengths, branches = [n + sum(parts) for n, parts in examples], [tuple(parts) for _, parts in examples]
    assert layout(layout_of(lengths, branches)) == (lengths, branches)
    assert layout(layout_of(lengths, None)) == (lengths, [()] * len(lengths))


def projection(inputs=IN, outputs=OUT, scales=(0.7, 1.3), index=3):
    return Projection(DenseWeight(normal(outputs, inputs, grad=False)), list(scales), index)


def adapter(inputs=IN, outputs=OUT, k=2):
    return normal(k, RANK, inputs), normal(k, outputs, RANK)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_lora(agree, rows):
    p, (a, b), x, bias = projection(), adapter(), normal(N, IN), normal(OUT)
    handle = nodes.handle_of(p)
    agree(
        lambda: nodes.lora_node(x, a, b, bias, handle, ledger_of(rows)),
        lambda: lora(x, p, a, b, bias, rows),
        x, a, b, bias, rtol=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_gated_mlp(agree, rows):
    mlp = GatedMLP(projection(IN, OUT, index=0), projection(IN, OUT, index=1), projection(OUT, IN, index=2),
                   Activation.SILU)  # fmt: skip
    pairs, x, handle = (adapter(), adapter(), adapter(OUT, IN)), normal(N, IN), nodes.handle_of(mlp)
    agree(
        lambda: nodes.gated_mlp_node(x, pairs, handle, ledger_of(rows)),
        lambda: gated_mlp(x, mlp, *pairs, rows),
        x, *(t for pair in pairs for t in pair), rtol=0.0,
    )  # fmt: skip


class Held:
    """A module of experts."""

    def __init__(self, experts, scale_K):
        self.parts = lambda: (experts, scale_K)


def gate(h):
    e, u = h.chunk(2, -1)
    return F.silu(e) * u


@pytest.mark.parametrize("adapted", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_experts(agree, adapted):
    """The derivative of the activation is taken where autograd is not at work."""
    experts = Experts(DenseStack(normal(3, 8, IN, grad=False)), DenseStack(normal(3, IN, 4, grad=False)), gate)
    index = torch.tensor([[0, 2], [2, 1], [1, 0], [2, 0], [0, 1], [1, 2], [2, 3]])  # 3: no expert
    weight, x, rows = normal(N, 2), normal(N, IN), Rows((3, 4))
    up = (normal(2, 3, RANK, IN), normal(2, 3, 8, RANK)) if adapted[0] else None
    down = (normal(2, 3, RANK, 4), normal(2, 3, IN, RANK)) if adapted[1] else None
    held = Held(experts, (0.7, 1.3))
    handle = nodes.handle_of(held)
    plain = [None if pair is None else Adapter(*pair, (0.7, 1.3)) for pair in (up, down)]
    agree(
        lambda: nodes.experts_node(x, index, weight, up, down, handle, ledger_of(rows), 8),
        lambda: lora_experts(x, index, weight, experts, *plain, rows),
        x, weight, *(t for pair in (up, down) if pair is not None for t in pair), rtol=0.0,
    )  # fmt: skip


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="4-bit weights need bitsandbytes")
def test_frozen_four_bit_projection(agree):
    weight = NF4Weight.quantize(torch.randn(64, 64))
    x, bias, handle = normal(N, 64, dtype=torch.float32), normal(64, dtype=torch.float32), nodes.handle_of(weight)
    agree(
        lambda: nodes.frozen_node(x, bias, handle, 64),
        lambda: F.linear(x, weight.dense(torch.float32), bias),
        x, bias, rtol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize(
    ("lengths", "branches"), [([5, 1, 13, 2], None), ([17, 4], [(3, 5, 1), ()]), ([170, 90], [(40, 60), ()])], ids=str
)
def test_attention(agree, lengths, branches, window):
    """Probabilities are formed again in its backward pass; also of windows and of several blocks."""
    q, k, v = (normal(h, sum(lengths), 8) for h in (4, 2, 2))
    ledger = layout_of(lengths, branches)
    agree(
        lambda: nodes.attention_node(q, k, v, ledger, None, 0.3, window),
        lambda: packed_attention(q, k, v, lengths, 0.3, window, branches=branches),
        q, k, v,
    )  # fmt: skip


def test_attention_against_plain_products(agree):
    q, k, v = (normal(h, 19, d) for h, d in ((4, 8), (2, 8), (2, 5)))
    agree(
        lambda: nodes.attention_node(q, k, v, layout_of([19], None), None, 0.3, 6),
        lambda: attention_reference(q, k, v, 0.3, 6).transpose(0, 1),
        q, k, v,
    )  # fmt: skip


def test_a_handle_keeps_nothing_alive():
    p = projection()
    handle = nodes.handle_of(p)
    assert nodes.held_by(handle) is p
    del p
    with pytest.raises(KeyError):
        nodes.held_by(handle)


def checked():
    """Each node with arguments, kept alive."""
    p, (a, b), x = projection(scales=(0.7,)), adapter(k=1), normal(N, IN)
    mlp = GatedMLP(projection(scales=(1.0,)), projection(scales=(1.0,)), projection(OUT, IN, (1.0,)), Activation.SILU)
    experts = Experts(DenseStack(normal(3, 8, IN, grad=False)), DenseStack(normal(3, IN, 4, grad=False)), gate)
    held, index = Held(experts, (0.7,)), torch.tensor([[0, 2]] * N)
    rows, handles = ledger_of(Rows()), [nodes.handle_of(t) for t in (p, mlp, held, p.weight)]
    pairs = (*adapter(k=1), *adapter(k=1), *adapter(OUT, IN, k=1))
    stacks = normal(1, 3, RANK, IN), normal(1, 3, 8, RANK), None, None
    q, k, v = (normal(h, 9, 8) for h in (4, 2, 2))
    given = {
        "lora": (nodes._lora, (x, a, b, None, handles[0], rows)),
        "gated_mlp": (nodes._gated_mlp, (x, *pairs, handles[1], rows)),
        "experts": (nodes._experts, (x, index, normal(N, 2), *stacks, handles[2], rows, 8)),
        "frozen": (nodes._frozen, (x, None, handles[3], OUT)),
        "attend": (nodes._attend, (q, k, v, layout_of([4, 5], None), 0.3, None)),
    }
    return given, (p, mlp, held)


@pytest.mark.parametrize("name", ["lora", "gated_mlp", "experts", "frozen", "attend"])
def test_torch_takes_it_for_an_op(name):
    """Schema, shapes without numbers, and a backward pass that is traced with them."""
    given, _alive = checked()
    op, args = given[name]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(op, args, test_utils=tests)


def test_wrong_shapes_would_be_seen():
    """The planted fault: a node that gives another shape than it says."""
    op = torch.library.custom_op(
        "welltuned_test::odd", lambda x: x[:, :2].clone(), mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    op.register_fake(lambda x: x.new_empty(x.shape))
    with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError):
        torch.library.opcheck(op, (torch.randn(3, 4),), test_utils=("test_faketensor",))
