"""Packed attention against plain products and against torch's attention, an example at a time."""

import pytest
import torch
import torch.nn.functional as F

from welltuned.kernels import attention as module
from welltuned.kernels.attention import attention_reference, packed_attention

D = 8
LENGTHS = [5, 1, 13, 2]


def draw(heads=4, groups=2, lengths=LENGTHS, dtype=torch.float64):
    n = sum(lengths)
    return [torch.randn(h, n, D, dtype=dtype).requires_grad_() for h in (heads, groups, groups)]


def per_example(attention, q, k, v, lengths=LENGTHS):
    """Attention of each example alone, put together as [N, Q, D]."""
    outs, start = [], 0
    for n in lengths:
        rows = slice(start, start + n)
        outs.append(attention(q[:, rows], k[:, rows], v[:, rows]).transpose(0, 1))
        start += n
    return torch.cat(outs)


def sdpa(q, k, v, scale, window):
    """torch's own, with the mask written out."""
    repeat, n = q.shape[0] // k.shape[0], q.shape[1]
    distance = torch.arange(n)[:, None] - torch.arange(n)[None, :]
    mask = (distance >= 0) & (distance < (window or n))
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask[None, None], scale=scale)[0]


@pytest.fixture(params=[(80, 512), (4, 512), (5, 512), (1, 512), (80, 4)], ids=lambda p: f"block {p[0]}, short {p[1]}")
def blocks(request, monkeypatch):
    """One block an example; several, even, ragged and single; and torch's SDPA instead of blocks."""
    monkeypatch.setattr(module, "BLOCK", request.param[0])
    monkeypatch.setattr(module, "SHORT", request.param[1])


KINDS = {
    "plain": {},
    "window shorter than the examples": {"window": 3},
    "window of one": {"window": 1},
    "window as long as the longest": {"window": 13},
    "window longer than all": {"window": 50},
    "softcap": {"softcap": 1.5},
    "softcap and window": {"softcap": 1.5, "window": 4},
    "sinks": {"sinks": True},
    "sinks and window": {"sinks": True, "window": 4},
}


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_equals_reference(agree, blocks, kind, heads):
    q, k, v = draw(*heads)
    options = dict(kind)
    sinks = torch.randn(heads[0], dtype=torch.float64).requires_grad_() if options.pop("sinks", False) else None
    agree(
        lambda: packed_attention(q, k, v, LENGTHS, 0.3, sinks_Q=sinks, **options),
        lambda: per_example(lambda *t: attention_reference(*t, 0.3, sinks_Q=sinks, **options), q, k, v),
        *((q, k, v) if sinks is None else (q, k, v, sinks)),
    )


@pytest.mark.parametrize("window", [None, 3, 13, 50])
def test_equals_torch(agree, blocks, window):
    q, k, v = draw()
    agree(
        lambda: packed_attention(q, k, v, LENGTHS, 0.3, window),
        lambda: per_example(lambda *t: sdpa(*t, 0.3, window), q, k, v),
        q, k, v,
    )  # fmt: skip


@pytest.mark.parametrize("lengths", [[81, 300, 80, 1], [70, 600]], ids=str)
def test_equals_torch_in_float32_on_strided_heads(agree, lengths):
    """As transformers hands them over: views of [N, heads, D]; short ones in blocks, long ones by SDPA."""
    wide = [torch.randn(sum(lengths), h, D).requires_grad_() for h in (4, 2, 2)]
    agree(
        lambda: packed_attention(*(t.transpose(0, 1) for t in wide), lengths, 0.3),
        lambda: per_example(lambda *t: sdpa(*t, 0.3, None), *(t.transpose(0, 1) for t in wide), lengths),
        *wide, rtol=1e-5,
    )  # fmt: skip


def test_values_of_another_width(agree, blocks):
    """DeepSeek's latent attention: queries and keys are wider than values."""
    q, k, _ = draw()
    v = torch.randn(2, sum(LENGTHS), 5, dtype=torch.float64).requires_grad_()
    agree(
        lambda: packed_attention(q, k, v, LENGTHS, 0.3),
        lambda: per_example(lambda *t: attention_reference(*t, 0.3), q, k, v),
        q, k, v,
    )  # fmt: skip


def test_strided_gradient(agree, blocks):
    """What flows back may be a view of anything."""
    q, k, v = draw()
    agree(
        lambda: packed_attention(q, k, v, LENGTHS, 0.3).permute(2, 1, 0)[::2],
        lambda: per_example(lambda *t: attention_reference(*t, 0.3), q, k, v).permute(2, 1, 0)[::2],
        q, k, v,
    )  # fmt: skip
    (mine,) = torch.autograd.grad(packed_attention(q, k, v, LENGTHS, 0.3).sum(), v)  # a gradient without strides
    (plain,) = torch.autograd.grad(per_example(lambda *t: attention_reference(*t, 0.3), q, k, v).sum(), v)
    torch.testing.assert_close(mine, plain)


def test_sink_takes_probability_and_gives_no_value():
    q, k, v = draw(lengths=[4])
    low = packed_attention(q, k, v, [4], 0.3, sinks_Q=torch.full((4,), -1e4, dtype=torch.float64))
    torch.testing.assert_close(low, packed_attention(q, k, v, [4], 0.3), rtol=1e-9, atol=1e-9)
    high = packed_attention(q, k, v, [4], 0.3, sinks_Q=torch.full((4,), 1e4, dtype=torch.float64))
    assert not high.any()


@pytest.mark.parametrize("kind", [{}, {"window": 3}, {"softcap": 1.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_poison(blocks, dtype, kind):
    """Another example's numbers, whatever they are, leave this one's outputs and gradients bit for bit."""
    lengths = [6, 9, 4]
    q, k, v = draw(lengths=lengths, dtype=dtype)
    direction = torch.randn(19, 4, D, dtype=dtype)

    def run(tensors):
        out = packed_attention(*tensors, lengths, 0.3, **kind)
        return out.detach(), torch.autograd.grad(out, tensors, direction)

    clean, clean_grads = run([q, k, v])
    poisoned = [t.detach().clone() for t in (q, k, v)]
    for t in poisoned:
        t[:, 6:15] = torch.nan
    out, grads = run([t.requires_grad_() for t in poisoned])
    for rows in (slice(0, 6), slice(15, 19)):
        assert torch.equal(out[rows], clean[rows])
        for mine, other in zip(grads, clean_grads, strict=True):
            assert torch.equal(mine[:, rows], other[:, rows])


def test_causal(blocks):
    """A later token never reaches an earlier one."""
    q, k, v = draw(lengths=[9], dtype=torch.float32)
    before = packed_attention(q, k, v, [9], 0.3)
    for t in (q, k, v):
        t.data[:, 5:] = 7.0
    assert torch.equal(packed_attention(q, k, v, [9], 0.3)[:5], before[:5])


def test_gradcheck(blocks):
    q, k, v = (torch.randn(h, 5, 3, dtype=torch.float64).requires_grad_() for h in (2, 1, 1))
    assert torch.autograd.gradcheck(lambda *t: packed_attention(*t, [2, 3], 0.5), (q, k, v))


def test_lengths_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="add up to 3, not to 21"):
        packed_attention(*draw(), [1, 2], 0.3)


# ── branches of one trunk ────────────────────────────────────────────────────────────────────────────────────────────

TREES = [9, 4, 12, 7, 5], [(3, 4), (), (5, 1, 2), (3, 4), (4,)]  # of the fourth nothing is shared


def apart(attention, q, k, v, lengths, branches):
    """Every branch with a copy of its trunk, as rows of their own; then the rows as they lie."""
    outs, start = [], 0
    for n, parts in zip(lengths, branches, strict=True):
        trunk, at = list(range(start, start + n - sum(parts))), start + n - sum(parts)
        if trunk:
            outs.append(attention(*(t[:, trunk] for t in (q, k, v))).transpose(0, 1))
        for part in parts:
            rows = [*trunk, *range(at, at + part)]
            outs.append(attention(*(t[:, rows] for t in (q, k, v))).transpose(0, 1)[len(trunk) :])
            at += part
        start += n
    return torch.cat(outs)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_branches_equal_copies_of_their_trunk(agree, blocks, kind, heads):
    lengths, branches = TREES
    q, k, v = draw(*heads, lengths=lengths)
    options = dict(kind)
    sinks = torch.randn(heads[0], dtype=torch.float64).requires_grad_() if options.pop("sinks", False) else None
    agree(
        lambda: packed_attention(q, k, v, lengths, 0.3, sinks_Q=sinks, branches=branches, **options),
        lambda: apart(lambda *t: attention_reference(*t, 0.3, sinks_Q=sinks, **options), q, k, v, lengths, branches),
        *((q, k, v) if sinks is None else (q, k, v, sinks)),
    )


def test_a_branch_that_saw_another_would_show():
    lengths, branches = TREES
    q, k, v = draw(lengths=lengths)
    right = packed_attention(q, k, v, lengths, 0.3, branches=branches)
    assert (packed_attention(q, k, v, lengths, 0.3) - right).abs().max() > 1e-2


def test_branches_that_are_not_within_their_example():
    q, k, v = draw(lengths=[5])
    for branches in ([(3, 3)], [(5, 0)]):
        with pytest.raises(ValueError, match="do not lie in an example"):
            packed_attention(q, k, v, [5], 0.3, branches=branches)


def test_what_the_variable_length_kernel_is_told():
    """Keys of each span are gathered, trunk first; without branches nothing is."""
    seen = module.seen_by([7, 3], [(2, 3), ()], torch.device("cpu"))
    assert seen.query_B.tolist() == [0, 2, 4, 7, 10]
    assert seen.key_B.tolist() == [0, 2, 6, 11, 14]
    assert seen.rows_K.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8, 9]
    assert seen.longest == (3, 5)
    plain = module.seen_by([7, 3], None, torch.device("cpu"))
    assert plain.rows_K is None and plain.query_B.tolist() == plain.key_B.tolist() == [0, 7, 10]
