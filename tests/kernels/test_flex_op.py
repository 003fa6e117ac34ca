"""The mask of rows with shared trunks against what attention does today, and FlexAttention with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from welltuned.kernels import flex as module
from welltuned.kernels.attention import attention_reference, packed_attention, seen_by, spans
from welltuned.kernels.flex import block_mask, flex, marks, pairs, sees, wanted

CPU = torch.device("cpu")
ROWS = {
    "one pair": ([9], [(3, 2)]),
    "a group and an example without branches": ([17, 4, 12], [(3, 5, 1, 2), (), (2, 6)]),
    "no trunk": ([8, 5], [(3, 5), (2,)]),
    "no branches": ([6, 1, 7], None),
}


def dense(lengths, branches):
    """[N, N] True where query i sees key j: FlexAttention's function, called for every pair."""
    n = sum(lengths)
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    return sees(marks(lengths, branches))(torch.tensor(0), torch.tensor(0), i, j)


def by_spans(lengths, branches):
    """The same from the spans that the other ways run one at a time."""
    allowed = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    for span in spans(lengths, branches):
        rows = slice(span.start, span.start + span.length)
        allowed[rows, span.trunk : span.trunk + span.shared] = True
        allowed[rows, rows] = torch.ones(span.length, span.length, dtype=torch.bool).tril()
    return allowed


@pytest.mark.parametrize(("lengths", "branches"), ROWS.values(), ids=ROWS.keys())
def test_mask_is_that_of_the_spans(lengths, branches):
    assert torch.equal(dense(lengths, branches), by_spans(lengths, branches))


@st.composite
def forked(draw):
    lengths, branches = [], []
    for _ in range(draw(st.integers(1, 4))):
        parts = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
        trunk = draw(st.integers(0 if parts else 1, 9))
        lengths.append(trunk + sum(parts))
        branches.append(parts)
    return lengths, branches


@settings(max_examples=60, deadline=None)
@given(forked(), st.sampled_from([1, 4, 8]))
def test_blocks_are_counted_from_lengths(row, block):
    """Every pair of every tile, and so which tiles are skipped and which need no mask."""
    lengths, branches = row
    allowed = dense(lengths, branches)
    n, count = len(allowed), -(-len(allowed) // block)
    padded = torch.zeros(count * block, count * block, dtype=torch.int64)
    padded[:n, :n] = allowed
    tiles = padded.view(count, block, count, block).sum((1, 3))
    assert torch.equal(torch.from_numpy(pairs(lengths, branches, block)), tiles)
    mask = block_mask(lengths, branches, CPU, block)
    assert torch.equal(mask.to_dense()[0, 0].bool(), tiles > 0)
    full = torch.zeros_like(tiles, dtype=torch.bool)
    for i, (many, order) in enumerate(zip(mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0], strict=True)):
        full[i, order[:many].long()] = True
    assert torch.equal(full, tiles == block * block)


def draw(lengths, heads=4, groups=2, d=8, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(h, sum(lengths), d, dtype=dtype) for h in (heads, groups, groups)]


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention's own plain path: compiling it for a CPU would test another kernel than a GPU's."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(module, "_compiled", lambda: flex_attention)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("lengths", "branches"), ROWS.values(), ids=ROWS.keys())
def test_values_are_those_of_the_branches(uncompiled, lengths, branches):
    q, k, v = draw(lengths)
    known = packed_attention(q, k, v, lengths, 0.3, branches=branches)
    out = flex(q, k, v, block_mask(lengths, branches, CPU, 16), 0.3)
    torch.testing.assert_close(out, known, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("lengths", "branches"), ROWS.values(), ids=ROWS.keys())
def test_gradients_through_the_mask_are_those_of_the_branches(lengths, branches):
    """FlexAttention has no backward pass on a CPU: of the same function of pairs, written out."""
    q, k, v = (t.requires_grad_() for t in draw(lengths))
    repeat = q.shape[0] // k.shape[0]
    z = q @ k.repeat_interleave(repeat, 0).transpose(1, 2) * 0.3
    p = z.masked_fill(~dense(lengths, branches), -torch.inf).softmax(-1)
    plain = (p @ v.repeat_interleave(repeat, 0)).transpose(0, 1)
    known = packed_attention(q, k, v, lengths, 0.3, branches=branches)
    torch.testing.assert_close(plain, known, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(plain)
    for mine, other in zip(
        torch.autograd.grad(plain, (q, k, v), direction), torch.autograd.grad(known, (q, k, v), direction), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_a_mask_that_forgets_branches_would_be_seen():
    """The planted fault: a branch that sees the one before it."""
    lengths, branches = ROWS["one pair"]
    faulty = marks(lengths, branches)
    faulty[1] = 0
    i, j = torch.arange(9)[:, None], torch.arange(9)[None, :]
    assert not torch.equal(sees(faulty)(None, None, i, j), by_spans(lengths, branches))


def test_it_is_used_only_where_proven_and_trunks_are_seen_by_many(monkeypatch):
    many, two = ([100], [(10,) * 5]), ([100], [(40, 40)])
    assert not wanted(*many, CPU)
    monkeypatch.setitem(module._PROVEN, CPU, True)
    assert wanted(*many, CPU) and not wanted(*two, CPU) and not wanted([5, 5], None, CPU)


def test_proving_tells_wrong_numbers_and_failing_compilers(monkeypatch):
    given = 4, 2, 8, torch.float32, CPU
    monkeypatch.setattr(module, "_PROVEN", {})
    assert "does not support backward on CPU" in module.prove(*given) and not module._PROVEN[CPU]
    right = lambda q, k, v, mask, scale: packed_attention(q, k, v, [300, 200], scale, branches=[(60, 90, 50), (70, 30)])  # noqa: E731
    monkeypatch.setattr(module, "flex", right)
    assert module.prove(*given) is None and module._PROVEN[CPU]
    monkeypatch.setattr(module, "flex", lambda *a: right(*a) + 0.1 * a[2].transpose(0, 1).repeat_interleave(2, 1))
    assert "apart" in module.prove(*given) and not module._PROVEN[CPU]


def test_a_row_brings_its_own_attention(monkeypatch):
    """Where the micro-batch has such a mask, half precision on a GPU goes through it, but not through a window."""
    from dataclasses import replace

    from welltuned.kernels import attention

    lengths, branches = ROWS["one pair"]
    seen = replace(seen_by(lengths, branches, CPU), whole=lambda q, k, v, scale: "whole")
    monkeypatch.setattr(attention, "takes_varlen", lambda q: True)
    monkeypatch.setattr(attention, "varlen", lambda *a: "varlen")
    q, k, v = draw(lengths)
    assert packed_attention(q, k, v, lengths, 0.3, seen=seen, branches=branches) == "whole"
    assert packed_attention(q, k, v, lengths, 0.3, 3, seen=seen, branches=branches) == "varlen"
    assert attention_reference(q, k, v, 0.3).shape == (4, 9, 8)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lengths_are_no_part_of_the_compiled_code(monkeypatch):
    """Ragged rows with other numbers of branches: compiled once for one length of the row, once for all others."""
    from torch.nn.attention.flex_attention import flex_attention

    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(module, "_compiled", lambda: torch.compile(flex_attention, backend=counted, dynamic=True))
    for lengths, branches in (
        ([150, 40], [(30, 40), (10, 9)]),
        ([301], [(60, 61, 62)]),
        ([99, 33, 260], [(20, 31), (), (70, 71)]),
        ([512], [(100, 101, 9)]),
    ):
        q, k, v = draw(lengths, dtype=torch.float32)
        out = flex(q, k, v, block_mask(lengths, branches, CPU), 0.3)
        known = packed_attention(q, k, v, lengths, 0.3, branches=branches)
        torch.testing.assert_close(out, known, rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 2
