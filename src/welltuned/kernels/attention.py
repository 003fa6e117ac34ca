"""Causal attention within each example of a packed row; nothing attends across examples.

An example may end in branches: continuations of one beginning (its trunk), each of which sees the trunk and itself, so
that what several answers share is computed once (Wang & Hegde 2024, arXiv 2410.20305).

Four ways to the same numbers (and kernels/flex.py, of long trunks): CUDA half precision runs torch's variable-length
flash attention; short examples on the
CPU run blocks of queries against the keys they may see, in batched matrix products; elsewhere each example is a slice
with its own causal SDPA, which skips padding and never builds an N x N mask; logit soft-capping and attention sinks,
which SDPA lacks, take the plain product per slice.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Branches = Sequence[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows that see each other causally, and before them a trunk: [trunk, trunk + shared)."""

    start: int
    length: int
    trunk: int
    shared: int = 0

    @property
    def keys(self) -> int:
        return self.shared + self.length

    @property
    def apart(self) -> bool:
        """Whether other rows lie between the trunk and these."""
        return self.shared > 0 and self.trunk + self.shared != self.start

    def of(self, t_GND: Tensor) -> Tensor:
        """What these rows see [G, keys, D]: a copy where they lie apart from their trunk, else a view."""
        if not self.apart:
            return t_GND[:, self.start - self.shared : self.start + self.length]
        trunk, own = t_GND[:, self.trunk : self.trunk + self.shared], t_GND[:, self.start : self.start + self.length]
        return torch.cat([trunk, own], 1)


def spans(lengths: Sequence[int], branches: Branches | None = None) -> Iterator[Span]:
    """The trunk of each example, then its branches; an example without branches is one span.

    Args:
        branches: of each example the rows of its branches, which are its last; () for none.
    """
    start = 0
    for length, parts in zip(lengths, branches or [()] * len(lengths), strict=True):
        shared = length - sum(parts)
        if shared < 0 or min(parts, default=1) < 1:
            raise ValueError(f"branches {parts} do not lie in an example of {length} rows")
        if shared:
            yield Span(start, shared, start)
        at = start + shared
        for part in parts:
            yield Span(at, part, start, shared)
            at += part
        start += length


def _allowed(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] True where a query, which are the last of the keys, may see key j: i >= j, i - j < window."""
    i, j = torch.arange(keys - queries, keys, device=device), torch.arange(keys, device=device)
    allowed = i[:, None] >= j[None, :]
    return allowed if window is None else allowed & (i[:, None] - j[None, :] < window)


def attention_reference(
    q_QND: Tensor,
    k_GND: Tensor,
    v_GND: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_Q: Tensor | None = None,
) -> Tensor:
    """Attention [Q, n, D] of n queries, the last of the keys, by plain products; keys and values repeated by groups."""
    repeat = q_QND.shape[0] // k_GND.shape[0]
    k, v = k_GND.repeat_interleave(repeat, 0), v_GND.repeat_interleave(repeat, 0)
    z = q_QND @ k.transpose(1, 2) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z.masked_fill(~_allowed(q_QND.shape[1], k.shape[1], window, q_QND.device), -torch.inf)
    wide = z.float() if z.dtype.itemsize < 4 else z
    if sinks_Q is not None:  # gpt-oss: a learned logit that takes probability and gives no value
        sink = sinks_Q.to(wide.dtype)[:, None, None].expand(-1, z.shape[1], 1)
        return torch.cat([wide, sink], -1).softmax(-1)[..., :-1].to(v.dtype) @ v
    return wide.softmax(-1).to(v.dtype) @ v


BLOCK = 80  # queries a block: short enough to skip most of the upper triangle, long enough for the matrix products
SHORT = 512  # longest example that is worth keeping its probabilities for; beyond it SDPA recomputes them


def _blocks(n: int) -> list[tuple[int, int]]:
    """Bounds of equal blocks of about BLOCK queries."""
    count = -(-n // BLOCK)
    size = -(-n // count)
    return [(i, min(i + size, n)) for i in range(0, n, size)]


def _probabilities(
    q: Tensor, k: Tensor, span: Span, upper: Tensor, window: int | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Of each block of a span's queries its bounds, and the probabilities [G, Q/G · rows, seen keys].

    Args:
        q: [G, Q/G, N, D], scaled. k: what the span sees. upper: -inf above the diagonal, of a block.
    """
    groups, _, _, d = q.shape
    for i, j in _blocks(span.length):
        seen = span.shared + j
        z = torch.bmm(q[:, :, span.start + i : span.start + j].reshape(groups, -1, d), k[:, :seen].transpose(1, 2))
        each = z.view(groups, -1, j - i, seen)
        each[..., span.shared + i :] += upper[: j - i, : j - i]
        if window is not None and window < seen:
            each.masked_fill_(~_allowed(j - i, seen, window, q.device), -torch.inf)
        yield i, j, torch.softmax(z, -1)


def _grouped(q_QND: Tensor, groups: int, scale: float) -> Tensor:
    """Scaled queries [G, Q/G, N, D]: a smaller pass than over the logits."""
    return (q_QND * scale).reshape(groups, -1, *q_QND.shape[1:])


def _upper(like: Tensor) -> Tensor:
    return torch.full((BLOCK, BLOCK), -torch.inf, dtype=like.dtype, device=like.device).triu(1)


def _gradients(
    g_NQD: Tensor,
    q: Tensor,
    k_GND: Tensor,
    v_GND: Tensor,
    parts: Sequence[Span],
    scale: float,
    kept: Sequence[Tensor] | None,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq_QND, dk_GND, dv_GND); q as `_grouped` gives it. Without `kept` probabilities they are formed again."""
    groups, repeat, n_all, d = q.shape
    d_value = v_GND.shape[-1]
    g = g_NQD.view(n_all, groups, repeat, d_value).permute(1, 2, 0, 3)
    dq = torch.empty_like(q)
    dk_GND, dv_GND = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (k_GND, v_GND))
    blocks, upper = iter(kept or ()), _upper(q)
    for span in parts:
        k, v, dk, dv = (span.of(t) for t in (k_GND, v_GND, dk_GND, dv_GND))
        if span.apart:  # copies, which hold what the trunk has got so far: not to be added once more
            dk.zero_()
            dv.zero_()
        again = _probabilities(q, k, span, upper, window) if kept is None else None
        for i, j, p in again or ((i, j, next(blocks)) for i, j in _blocks(span.length)):
            rows, seen = slice(span.start + i, span.start + j), span.shared + j
            g_block = g[:, :, rows].reshape(groups, -1, d_value)
            dv[:, :seen].baddbmm_(p.transpose(1, 2), g_block)
            dp = torch.bmm(g_block, v[:, :seen].transpose(1, 2))
            dz = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, :, rows] = torch.bmm(dz, k[:, :seen]).view(groups, -1, j - i, d)
            dk[:, :seen].baddbmm_(dz.transpose(1, 2), q[:, :, rows].reshape(groups, -1, d))
        if span.apart:
            for whole, part in ((dk_GND, dk), (dv_GND, dv)):
                whole[:, span.trunk : span.trunk + span.shared] += part[:, : span.shared]
                whole[:, span.start : span.start + span.length] += part[:, span.shared :]
    return dq.mul_(scale).view(-1, n_all, d), dk_GND, dv_GND


class _BlockedAttention(torch.autograd.Function):
    """Causal attention of packed short examples; keeps the probabilities of each block, the upper triangle skipped.

    On two cores 1.4 to 1.9 times as fast, forward and backward, as the CPU's flash kernel at 64 to 512 tokens.
    """

    @staticmethod
    def forward(ctx, q_QND, k_GND, v_GND, parts, scale):  # type: ignore[no-untyped-def]
        heads, n_all, _ = q_QND.shape
        groups, _, d_value = v_GND.shape  # which is not d in DeepSeek's latent attention
        q = _grouped(q_QND, groups, scale)
        out_NQD = q_QND.new_empty(n_all, heads, d_value)
        out = out_NQD.view(n_all, groups, heads // groups, d_value).permute(1, 2, 0, 3)
        kept, upper = [], _upper(q)
        for span in parts:
            k, v = span.of(k_GND), span.of(v_GND)
            for i, j, p in _probabilities(q, k, span, upper):
                kept.append(p)
                rows = slice(span.start + i, span.start + j)
                out[:, :, rows] = torch.bmm(p, v[:, : span.shared + j]).view(groups, -1, j - i, d_value)
        ctx.save_for_backward(q, k_GND, v_GND, *kept)
        ctx.parts, ctx.scale = parts, scale
        return out_NQD

    @staticmethod
    def backward(ctx, g_NQD):  # type: ignore[no-untyped-def]
        q, k_GND, v_GND, *kept = ctx.saved_tensors
        return *_gradients(g_NQD, q, k_GND, v_GND, ctx.parts, ctx.scale, kept), None, None


def packed_attention_backward(
    g_NQD: Tensor,
    q_QND: Tensor,
    k_GND: Tensor,
    v_GND: Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    branches: Branches | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `packed_attention` where nothing was kept: its probabilities are formed again."""
    q = _grouped(q_QND, v_GND.shape[0], scale)
    return _gradients(g_NQD, q, k_GND, v_GND, list(spans(lengths, branches)), scale, None, window)


def _slice_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    n, keys = q.shape[1], k.shape[1]
    if n < keys or (window is not None and window < n):  # SDPA's own causal mask takes the queries for the first keys
        mask = _allowed(n, keys, window, q.device)
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=True)[
            0
        ]
    return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True)[0]


def packed_attention(
    q_QND: Tensor,
    k_GND: Tensor,
    v_GND: Tensor,
    lengths: list[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_Q: Tensor | None = None,
    seen: "Seen | None" = None,
    branches: Branches | None = None,
) -> Tensor:
    """Attention output [N, Q, D] of packed examples of the given lengths (they add up to N).

    Args:
        seen: `seen_by(lengths, branches, device)`, where the caller has it: making it anew in each layer would stop
            the GPU.
        branches: as in `spans`.
    """
    if sum(lengths) != q_QND.shape[1]:
        raise ValueError(f"lengths add up to {sum(lengths)}, not to {q_QND.shape[1]} rows")
    plain = softcap is not None or sinks_Q is not None
    if takes_varlen(q_QND) and not plain:
        seen = seen or seen_by(lengths, branches, q_QND.device)
        if seen.whole is not None and (window is None or window >= seen.longest[1]):
            return seen.whole(q_QND, k_GND, v_GND, scale)
        return varlen(q_QND, k_GND, v_GND, seen, scale, window)
    parts = list(spans(lengths, branches))
    longest = max(span.keys for span in parts)
    unwindowed = window is None or window >= longest
    if not plain and unwindowed and longest <= SHORT and q_QND.device.type == "cpu" and q_QND.dtype.itemsize >= 4:
        blocked: Tensor = _BlockedAttention.apply(q_QND, k_GND, v_GND, parts, scale)
        return blocked
    outs = []
    for span in parts:
        q, k, v = q_QND[:, span.start : span.start + span.length], span.of(k_GND), span.of(v_GND)
        out = (
            attention_reference(q, k, v, scale, window, softcap, sinks_Q)
            if plain
            else _slice_attention(q, k, v, scale, window)
        )
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


@dataclass(frozen=True, slots=True)
class Seen:
    """Where queries and keys of each span begin and end [spans + 1], int32, as variable-length attention takes them.

    Attributes:
        rows_K: the row of each key, None where keys are the rows as they lie (no branches).
        whole: instead of all this, where trunks are read where they lie, their attention (kernels/flex.py).
    """

    query_B: Tensor
    key_B: Tensor
    longest: tuple[int, int]
    rows_K: Tensor | None = None
    whole: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None


def seen_by(lengths: Sequence[int], branches: Branches | None, device: torch.device) -> Seen:
    """What the rows of a packed row see, on the device."""
    parts = list(spans(lengths, branches))
    longest = max(span.length for span in parts), max(span.keys for span in parts)
    query_B = _bounds([span.length for span in parts], device)
    if longest[0] == longest[1] and not any(span.shared for span in parts):
        return Seen(query_B, query_B, longest)
    rows = [torch.arange(a, a + n) for s in parts for a, n in ((s.trunk, s.shared), (s.start, s.length))]
    return Seen(query_B, _bounds([span.keys for span in parts], device), longest, on(device, torch.cat(rows)))


def _bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    return on(device, torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32))


def on(device: torch.device, host: Tensor) -> Tensor:
    """A small tensor made on the CPU, on its way to the device: the GPU is not waited for."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def takes_varlen(q: Tensor) -> bool:
    """Whether torch has variable-length flash attention for it."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result
def _group_keyword() -> bool:
    """torch 2.11 takes fewer key heads as they are and does not know the keyword; 2.12 wants to be told."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in signature(varlen_attn).parameters


def varlen(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {"enable_gqa": True} if _group_keyword() else {}
    if seen.rows_K is not None:
        k, v = k.index_select(1, seen.rows_K), v.index_select(1, seen.rows_K)
    q_NQD, k_NGD, v_NGD = (t.transpose(0, 1).contiguous() for t in (q, k, v))
    left = -1 if window is None else window - 1  # queries are the last of the keys, and (left, 0) counts from there
    out = varlen_attn(
        q_NQD, k_NGD, v_NGD, seen.query_B, seen.key_B, *seen.longest, scale=scale, window_size=(left, 0), **grouped
    )
    assert isinstance(out, Tensor)
    return out
