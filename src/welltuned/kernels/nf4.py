"""Frozen weights as the projections see them: dense, or 4-bit NormalFloat that is dequantised for each product.

NF4 with double quantisation: Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, section 3. The storage format and the
(de)quantisation are bitsandbytes'; its Linear4bit forward is not used, because its CPU path repacks weights in eval
mode and never undoes it, after which gradients are wrong.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A frozen matrix W_OI in the model's dtype (a transposed view for GPT-2's Conv1D)."""

    w_OI: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.w_OI if self.w_OI.dtype == dtype else self.w_OI.to(dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return self.w_OI.shape[0], self.w_OI.shape[1]


@dataclass(frozen=True, slots=True)
class NF4Weight:
    """A frozen matrix as packed 4-bit codes and bitsandbytes' QuantState (block 64, scales quantised again in 256s)."""

    packed: Tensor
    state: Any

    @classmethod
    def quantize(cls, w_OI: Tensor) -> "NF4Weight":
        import bitsandbytes.functional as bnb

        packed, state = bnb.quantize_4bit(
            w_OI.detach().contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True
        )
        return cls(packed, state)

    def to(self, device: torch.device) -> "NF4Weight":
        if self.packed.device != device:
            self.state.to(device)  # in place
        return NF4Weight(self.packed.to(device), self.state)

    def dense(self, dtype: torch.dtype) -> Tensor:
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(self.packed, self.state).to(dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return self.state.shape[0], self.state.shape[1]


FrozenWeight = DenseWeight | NF4Weight
