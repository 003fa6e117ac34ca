"""Causal attention within each example of a packed row; nothing attends across examples.

Three ways to the same numbers: CUDA half precision runs torch's variable-length flash attention; elsewhere each
example is a slice with its own causal SDPA, which skips padding and never builds an N x N mask; logit soft-capping and
attention sinks, which SDPA lacks, take the plain product per slice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _allowed(n: int, window: int | None, device: torch.device) -> Tensor:
    """[n, n] True where query i may see key j: j <= i and, with a window, i - j < window."""
    i = torch.arange(n, device=device)
    allowed = i[:, None] >= i[None, :]
    return allowed if window is None else allowed & (i[:, None] - i[None, :] < window)


def attention_reference(
    q_QND: Tensor, k_GND: Tensor, v_GND: Tensor, scale: float, window: int | None = None,
    softcap: float | None = None, sinks_Q: Tensor | None = None,
) -> Tensor:
    """One example's attention [Q, n, D] by plain products; grouped queries by repeating keys and values."""
    repeat = q_QND.shape[0] // k_GND.shape[0]
    k, v = k_GND.repeat_interleave(repeat, 0), v_GND.repeat_interleave(repeat, 0)
    z = q_QND @ k.transpose(1, 2) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z.masked_fill(~_allowed(q_QND.shape[1], window, q_QND.device), -torch.inf)
    wide = z.float() if z.dtype.itemsize < 4 else z
    if sinks_Q is not None:  # gpt-oss: a learned logit that takes probability and gives no value
        sink = sinks_Q.to(wide.dtype)[:, None, None].expand(-1, z.shape[1], 1)
        return torch.cat([wide, sink], -1).softmax(-1)[..., :-1].to(v.dtype) @ v
    return wide.softmax(-1).to(v.dtype) @ v


def _slice_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    n = q.shape[1]
    if window is not None and window < n:
        mask = _allowed(n, window, q.device)
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=True)[0]
    return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True)[0]


def packed_attention(
    q_QND: Tensor, k_GND: Tensor, v_GND: Tensor, lengths: list[int], scale: float, window: int | None = None,
    softcap: float | None = None, sinks_Q: Tensor | None = None,
) -> Tensor:
    """Attention output [N, Q, D] of packed examples of the given lengths (they add up to N)."""
    if sum(lengths) != q_QND.shape[1]:
        raise ValueError(f"lengths add up to {sum(lengths)}, not to {q_QND.shape[1]} rows")
    plain = softcap is not None or sinks_Q is not None
    if q_QND.is_cuda and q_QND.dtype in (torch.bfloat16, torch.float16) and not plain:
        return _cuda_varlen(q_QND, k_GND, v_GND, lengths, scale, window)
    outs = []
    for q, k, v in zip(q_QND.split(lengths, 1), k_GND.split(lengths, 1), v_GND.split(lengths, 1), strict=True):
        out = (
            attention_reference(q, k, v, scale, window, softcap, sinks_Q)
            if plain
            else _slice_attention(q, k, v, scale, window)
        )
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


def _cuda_varlen(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds = torch.tensor([0, *lengths], dtype=torch.int32, device=q.device).cumsum(0, dtype=torch.int32)
    q_NQD, k_NGD, v_NGD = (t.transpose(0, 1).contiguous() for t in (q, k, v))
    left, longest = -1 if window is None else window - 1, max(lengths)
    out = varlen_attn(
        q_NQD, k_NGD, v_NGD, bounds, bounds, longest, longest, scale=scale, window_size=(left, 0), enable_gqa=True
    )
    assert isinstance(out, Tensor)
    return out
