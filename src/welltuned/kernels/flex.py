"""Attention of rows with shared trunks on a GPU as one kernel: torch's FlexAttention, with a mask made from lengths.

Variable-length flash attention takes the keys of each branch with its trunk before them, so a trunk's keys and values
are copied once for every branch. FlexAttention reads them where they lie: a query sees what is before it in its own
example, if that is of the trunk or of its own branch. It needs torch's compiler, and is proven before it is used.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from welltuned.kernels.attention import Branches, on, packed_attention, spans

BLOCK = 128  # queries and keys of a tile, FlexAttention's own
COPIES = 2.0  # keys laid out over rows from which reading them where they lie is taken to pay (not measured)
_PROVEN: dict[torch.device, bool] = {}


def marks(lengths: Sequence[int], branches: Branches | None) -> Tensor:
    """[2, N] int32: each row's example, and the number of its branch, 0 where branches see it."""
    rows = np.zeros((2, sum(lengths)), dtype=np.int32)
    parts, ends = list(spans(lengths, branches)), np.cumsum(lengths)
    trunks = {span.trunk for span in parts if span.shared}
    for number, span in enumerate(parts, 1):
        at = slice(span.start, span.start + span.length)
        rows[0, at] = np.searchsorted(ends, span.start, side="right")
        rows[1, at] = 0 if span.start in trunks else number
    return torch.from_numpy(rows)


def sees(marks_2N: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's mask function: whether query i sees key j."""
    example_N, branch_N = marks_2N[0], marks_2N[1]

    def allowed(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = (branch_N[j] == 0) | (branch_N[j] == branch_N[i])
        return (i >= j) & (example_N[i] == example_N[j]) & own

    return allowed


def pairs(lengths: Sequence[int], branches: Branches | None, block: int = BLOCK) -> NDArray[np.int64]:
    """How many (query, key) pairs of each two blocks see each other [blocks, blocks], from lengths alone."""
    count = -(-sum(lengths) // block)
    edges = np.arange(count + 1) * block
    found = np.zeros((count, count), dtype=np.int64)

    def inside(start: int, length: int) -> NDArray[np.int64]:
        """Rows of each block that are among these."""
        clipped = np.clip(edges, start, start + length)
        return clipped[1:] - clipped[:-1]

    for span in spans(lengths, branches):
        own = inside(span.start, span.length)
        found += np.tril(np.outer(own, own), -1) + np.diag(own * (own + 1) // 2)
        if span.shared:
            found += np.outer(own, inside(span.trunk, span.shared))
    return found


def block_mask(lengths: Sequence[int], branches: Branches | None, device: torch.device, block: int = BLOCK) -> Any:
    """FlexAttention's block mask of a packed row: which tiles are skipped, which need no mask, which do."""
    from torch.nn.attention.flex_attention import BlockMask

    n, found = sum(lengths), pairs(lengths, branches, block)
    full = found == block * block

    def tiles(kind: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        """How many of each row of tiles, and their numbers, these first."""
        order = np.argsort(~kind, axis=1, kind="stable")
        host = (torch.from_numpy(t.astype(np.int32))[None, None] for t in (kind.sum(1), order))
        return on(device, next(host)), on(device, next(host))

    mask = sees(on(device, marks(lengths, branches)))
    masked, whole = tiles((found > 0) & ~full), tiles(full)
    return BlockMask.from_kv_blocks(*masked, *whole, block, mask, (n, n))


def flex(q_QND: Tensor, k_GND: Tensor, v_GND: Tensor, mask: Any, scale: float) -> Tensor:
    """Attention output [N, Q, D] of a packed row by its block mask."""
    grouped = q_QND.shape[0] != k_GND.shape[0]
    out = _compiled()(q_QND[None], k_GND[None], v_GND[None], block_mask=mask, scale=scale, enable_gqa=grouped)
    assert isinstance(out, Tensor)
    return out[0].transpose(0, 1)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def wanted(lengths: Sequence[int], branches: Branches | None, device: torch.device) -> bool:
    """Whether a packed row's attention is to be one kernel: proven on this device, and trunks are seen by many."""
    if not _PROVEN.get(device, False) or branches is None:
        return False
    return sum(span.keys for span in spans(lengths, branches)) >= COPIES * sum(lengths)


def prove(q_heads: int, k_heads: int, width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Compile it and compare it with what it would replace, gradients included; why not, where it is not used."""
    problem = _difference(q_heads, k_heads, width, dtype, device)
    _PROVEN[device] = problem is None
    return problem


def _difference(q_heads: int, k_heads: int, width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    lengths, branches = [300, 200], [(60, 90, 50), (70, 30)]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(h, sum(lengths), width, generator=generator).to(device, dtype).requires_grad_()
        for h in (q_heads, k_heads, k_heads)
    )
    scale, found = width**-0.5, []
    try:
        mask = block_mask(lengths, branches, device)
        for way in (
            lambda: packed_attention(q, k, v, lengths, scale, branches=branches),
            lambda: flex(q, k, v, mask, scale),
        ):
            out = way()
            found.append((out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    except Exception as error:  # a compiler's faults are of every kind
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    far = max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(found[1], found[0], strict=True))
    near = 0.02 if dtype.itemsize < 4 else 1e-4
    return None if far <= near else f"its numbers are {far:.1e} of their length apart, where {near:g} may be"
