"""AdamW in 8 bits: map and codes beside plain ones and bitsandbytes', one update beside torch's, block edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from welltuned.kernels import adamw_8bit as op
from welltuned.kernels.adamw_8bit import BLOCK, Moment, Update, Workspace, adamw_8bit_, blocks_of, coded_reference

USUAL = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)


def moment(n, signed):
    made = Moment(torch.empty(n, dtype=torch.uint8), torch.empty(blocks_of(n)), signed)
    made.clear()
    return made


def coded(x, signed):
    """`x` as the update codes it."""
    made = moment(len(x), signed)
    room = Workspace.of(len(x), x.device)
    for numbers, blocks in op._pieces(len(x), room.m_n.numel()):
        op._code(x[numbers].clone(), made, numbers, blocks, room)
    return made


def numbers(n, seed, decades=8.0, signed=True):
    draw = torch.Generator().manual_seed(seed)
    x = 10 ** (-decades * torch.rand(n, generator=draw)) * torch.randn(n, generator=draw).abs()
    return x * (torch.randint(2, (n,), generator=draw) * 2 - 1) if signed else x


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_the_papers(signed):
    values = op.dynamic_map(signed)
    assert len(values) == len(set(values.tolist())) == 256 and torch.equal(values, values.sort().values)
    assert values.max() == 1 and 0.0 in values.tolist()
    assert float(values.min()) < -0.9 if signed else values.min() == 0
    bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    assert torch.equal(values, bnb.create_dynamic_map(signed=signed))


@given(st.integers(1, 1100), st.integers(0, 99), st.booleans())
@settings(max_examples=40, deadline=None)
def test_codes_are_the_nearest(n, seed, signed):
    x = numbers(n, seed, signed=signed)
    made, (codes, largest) = coded(x, signed), coded_reference(x, signed)
    assert torch.equal(made.largest_B, largest)
    assert torch.equal(made.codes_n, codes)
    if not signed:  # whose map has the block's largest itself, and what is a value of it stays it
        assert torch.equal(coded(made.expanded(), signed).expanded(), made.expanded())


@pytest.mark.parametrize("signed", [True, False])
def test_codes_at_every_edge(signed):
    """On an edge the lower code, one step of fp32 beyond it the next one; and the ends."""
    edges, inf = op.edges_of(signed), torch.tensor(torch.inf)
    below, above = edges.nextafter(-inf), edges.nextafter(inf)
    for x, code in ((edges, range(255)), (below, range(255)), (above, range(1, 256))):
        x = torch.nn.functional.pad(x, (0, 1), value=1.0)
        found = coded(x.clamp_min(0.0) if not signed else x, signed).codes_n.tolist()
        assert found == [*code, 255]
    assert coded(torch.tensor([-0.0, 0.0, 1e-45, -1e-45 if signed else 1e-45, 1.0]), signed).codes_n[-1] == 255


def test_codes_are_bitsandbytes_where_its_map_is_searched():
    """Its code for any device but a CPU, in Python: the nearest value by an argmin; and the same expanded."""
    default = pytest.importorskip("bitsandbytes.backends.default.ops", reason="bitsandbytes is not installed")
    import bitsandbytes.functional as bnb

    assert default is not None
    x = numbers(BLOCK * 9 + 17, 3)
    made = coded(x, signed=True)
    values = bnb.create_dynamic_map(signed=True)
    half = torch.ops.bitsandbytes.quantize_blockwise(x.double(), values, BLOCK)  # no float64 kernel: the search
    assert torch.equal(half[0].flatten(), made.codes_n) and torch.equal(half[1], made.largest_B)
    expanded = bnb.dequantize_blockwise(made.codes_n, absmax=made.largest_B, code=values, blocksize=BLOCK)
    assert torch.equal(expanded, made.expanded())


@pytest.mark.parametrize("n", [1, 255, 256, 257, 512, 1000])
@pytest.mark.parametrize("most", [256, 512, 2**20])
def test_an_update_is_torchs_on_what_the_codes_say(n, most, monkeypatch):
    """From the same moments, for several updates, whatever the pieces; weights to rounding."""
    monkeypatch.setitem(op.CHUNK, "cpu", most)
    p, m, v, room = numbers(n, 1), moment(n, True), moment(n, False), Workspace.of(n, torch.device("cpu"))
    for step in range(1, 6):
        g = numbers(n, 10 + step, 3.0)
        twin = p.clone().requires_grad_(True)
        plain = torch.optim.AdamW([twin], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
        state = {"step": torch.tensor(step - 1.0), "exp_avg": m.expanded(), "exp_avg_sq": v.expanded()}
        plain.state[twin], twin.grad = state, g.clone()
        plain.step()
        at = Update(rate=1e-2, step=step, **{**USUAL, "weight_decay": 0.1})
        adamw_8bit_(p, g, m, v, at, room)
        torch.testing.assert_close(p, twin.detach(), rtol=1e-6, atol=1e-8)
        assert torch.equal(m.codes_n, coded(state["exp_avg"], True).codes_n)
        assert torch.equal(v.codes_n, coded(state["exp_avg_sq"], False).codes_n)


def test_blocks_know_nothing_of_each_other():
    x = numbers(3 * BLOCK, 5)
    before = coded(x, True)
    x[BLOCK : 2 * BLOCK] *= 1e6
    after = coded(x, True)
    for k in (0, 2):
        assert torch.equal(before.codes_n[k * BLOCK :][:BLOCK], after.codes_n[k * BLOCK :][:BLOCK])


@pytest.mark.parametrize("signed", [True, False])
def test_blocks_of_zeros_stay_zero(signed):
    """Before the first update, after updates without a gradient, and of numbers too small to be divided by."""
    fresh = moment(600, signed)
    assert not fresh.expanded().any()
    x = torch.zeros(600)
    x[:3], x[599] = torch.tensor([1.0, 0.0, 0.5]), 1e-42
    made = coded(x, signed)
    assert torch.isfinite(made.expanded()).all() and made.expanded()[0] == 1 and not made.expanded()[256:512].any()
    p, m, v = torch.ones(600), moment(600, True), moment(600, False)
    room = Workspace.of(600, p.device)
    for step in (1, 2):
        adamw_8bit_(p, torch.zeros(600), m, v, Update(rate=0.1, step=step, **USUAL), room)
    assert (p == 1).all() and not m.expanded().any() and not v.expanded().any()


def plain_edges(signed):
    """Halfway between neighbours, zero's too."""
    values = op.dynamic_map(signed)
    return (values[:-1] + values[1:]) / 2


def furthest(updates=200):
    """Sums of AdamW's updates of a number whose gradient is a ten-thousandth of its block's largest, in rates."""
    p, g = torch.zeros(BLOCK), torch.full((BLOCK,), 1e-4)
    g[0] = 1.0
    m, v, room = moment(BLOCK, True), moment(BLOCK, False), Workspace.of(BLOCK, p.device)
    for step in range(1, updates + 1):
        adamw_8bit_(p, g, m, v, Update(rate=1.0, step=step, **USUAL), room)
    return float(p[1:].abs().max())


def test_a_small_gradient_beside_a_large_one_is_not_blown_up(monkeypatch):
    """AdamW in fp32 moves all of them by 200 rates; nearest codes would move the small ones several times that."""
    assert furthest() <= 1.1 * 200
    op.tables.cache_clear()
    with monkeypatch.context() as planted:
        planted.setattr(op, "edges_of", plain_edges)
        assert furthest() > 3 * 200
    op.tables.cache_clear()


def test_error_of_a_code_is_small_next_to_the_number():
    """Within three decades of a block's largest: at most 6 % signed, 3 % unsigned, and a tenth of that on average."""
    for signed, most, usual in ((True, 0.2, 0.05), (False, 0.1, 0.02)):
        x = numbers(BLOCK * 40, 7, 3.0, signed)
        near = x.abs() > 1e-2 * coded(x, signed).largest_B.repeat_interleave(BLOCK)
        error = ((coded(x, signed).expanded() - x) / x).abs()[near]
        assert error.max() < most and error.mean() < usual


def test_the_room_is_made_once():
    room = Workspace.of(2**21, torch.device("cpu"))
    assert math.isclose(room.bytes, 16 * op.CHUNK["cpu"], rel_tol=0.01)
