"""Frozen weights as the projections see them: dense, or 4-bit NormalFloat that is dequantised for each product.

NF4 with double quantisation: Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, section 3. The storage format and the
(de)quantisation are bitsandbytes'; its Linear4bit forward is not used, because its CPU path repacks weights in eval
mode and never undoes it, after which gradients are wrong. Nor is its Params4bit, which loses that state on the way to
another device.
"""

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, weakref_slot=True)
class DenseWeight:
    """A frozen matrix W_OI in the model's dtype (a transposed view for GPT-2's Conv1D)."""

    w_OI: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.w_OI if self.w_OI.dtype == dtype else self.w_OI.to(dtype)

    def lent(self, dtype: torch.dtype) -> Tensor:
        """The same: nothing overwrites it."""
        return self.dense(dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return self.w_OI.shape[0], self.w_OI.shape[1]


@dataclass(frozen=True, slots=True)
class LiveWeight:
    """A frozen matrix W_OI that is asked for anew each time: in a model in pieces it is whole in its turn only."""

    read: Callable[[], Tensor]
    shape: tuple[int, int]

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.read().to(dtype)

    def lent(self, dtype: torch.dtype) -> Tensor:
        return self.dense(dtype)


@dataclass(slots=True)
class Workspace:
    """Room for one dense weight, which the 4-bit weights of a model take in turns.

    Work on a device is done in order, so the next weight cannot overtake the product that reads this one.
    """

    flat: Tensor | None = None

    def of(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape)
        if self.flat is None or self.flat.dtype != dtype or self.flat.device != device or self.flat.numel() < size:
            self.flat = torch.empty(size, dtype=dtype, device=device)
        return self.flat[:size].view(shape)


@dataclass(slots=True, weakref_slot=True, eq=False)
class NF4Weight:
    """A frozen matrix as packed 4-bit codes and bitsandbytes' QuantState (block 64, scales quantised again in 256s).

    Attributes:
        workspace: where `lent` expands it; None: anew each time.
        kept: the dense matrix, where memory allows to expand it once.
    """

    packed: Tensor
    state: Any
    workspace: Workspace | None = None
    kept: Tensor | None = None

    @classmethod
    def quantize(cls, w_OI: Tensor) -> "NF4Weight":
        import bitsandbytes.functional as bnb

        packed, state = bnb.quantize_4bit(
            w_OI.detach().contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True
        )
        return cls(packed, state)

    def to(self, device: torch.device) -> "NF4Weight":
        """Itself, moved in place: whoever holds it (a layer, the adapter on it) sees the same numbers there."""
        if self.packed.device != device:
            self.state.to(device)
            self.packed, self.workspace = self.packed.to(device), None
            self.kept = None if self.kept is None else self.kept.to(device)
        return self

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W_OI, to be kept as long as one likes."""
        return (self._expanded() if self.kept is None else self.kept).to(dtype)

    def lent(self, dtype: torch.dtype) -> Tensor:
        """W_OI for one product: the next weight of this model that is lent overwrites it. The numbers are `dense`'s."""
        if self.kept is not None or self.workspace is None:
            return self.dense(dtype)
        return self._expanded(self.workspace.of(self.shape, self.state.dtype, self.packed.device)).to(dtype)

    def first(self, rows: int) -> "NF4Weight":
        """The first rows, an even number of them; all where there are no more."""
        if rows >= self.shape[0]:
            return NF4Weight(self.packed, self.state)
        state, count = copy(self.state), rows * self.shape[1]
        state.shape, state.absmax = torch.Size((rows, self.shape[1])), state.absmax[: -(-count // state.blocksize)]
        return NF4Weight(self.packed[: count // 2], state)

    def keep(self) -> int:
        """Stay dense from here on, beside the codes; the bytes that this takes."""
        if self.kept is None:
            self.kept = self._expanded()
        return self.kept.numel() * self.kept.element_size()

    def _expanded(self, out_OI: Tensor | None = None) -> Tensor:
        import bitsandbytes.functional as bnb

        if self.packed.is_cuda:
            return bnb.dequantize_4bit(self.packed, self.state, out=out_OI)
        dense_OI = bnb.dequantize_4bit(self.packed, _in_blocks(self.state)).view(self.shape)
        return dense_OI if out_OI is None else out_OI.copy_(dense_OI)  # it knows no `out` on a CPU

    @property
    def shape(self) -> tuple[int, int]:
        return self.state.shape[0], self.state.shape[1]


def _in_blocks(state: Any) -> Any:
    """The state of the same codes as rows of whole blocks.

    bitsandbytes 0.50 on a CPU begins a block with each row, and gives other numbers where rows are not whole blocks.
    """
    if state.shape[1] % state.blocksize == 0:
        return state
    count, flat = math.prod(state.shape), copy(state)
    whole = count % state.blocksize == 0
    flat.shape = torch.Size((count // state.blocksize, state.blocksize) if whole else (1, count))
    return flat


def nf4_reference(weight: NF4Weight) -> Tensor:
    """The dense matrix by plain torch: W = level[code] (s2 level8[s1] + mean), two codes a byte, the first one high."""
    state, inner = weight.state, weight.state.state2
    packed = weight.packed.flatten()
    count = math.prod(weight.shape)
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:count].long()
    scales = inner.code[state.absmax.long()] * inner.absmax.repeat_interleave(inner.blocksize)[: state.absmax.numel()]
    by_weight = (scales + state.offset).repeat_interleave(state.blocksize)[:count]
    dense: Tensor = (state.code[codes] * by_weight).to(state.dtype).view(weight.shape)
    return dense


FrozenWeight = DenseWeight | NF4Weight | LiveWeight
