"""How A and B begin: drawn, or taken from the weights (PiSSA, OLoRA, and what 4 bits lose, LoftQ).

PiSSA (Meng et al. 2024, arXiv 2404.02948): the r largest singular directions of W. OLoRA (Büyükakyüz 2024, arXiv
2406.01775): the first r columns of its QR decomposition. Both are taken off the base, which so starts at what it was.
PEFT changes the base weights for that; here W - s B0 A0 is computed as such, and W stays what it is on disk.
LoftQ (Li et al. 2023, arXiv 2310.08659), one step: s B A is the best approximation of W - Q(W) of rank r.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from welltuned.kernels.lora import Projection
from welltuned.kernels.nf4 import FrozenWeight
from welltuned.models.frozen import frozen_weight
from welltuned.models.lora_settings import FROM_WEIGHTS, Init, LoraSettings


def begin(a_RI: Tensor, b_OR: Tensor, projection: Projection, settings: LoraSettings, name: str) -> None:
    """Set an adapter's part of a linear layer to its start, where it is 0; a smaller rank's other rows stay 0."""
    r = settings.rank_of(name)
    if settings.init in FROM_WEIGHTS:
        a_RI[:r], b_OR[:, :r] = start_from(projection.weight, settings, name)
    else:
        init_a(a_RI[:r], settings, projection.index)


def begin_experts(a_ERI: Tensor, settings: LoraSettings, index: int) -> None:
    for expert in range(len(a_ERI)):
        init_a(a_ERI[expert], settings, index + expert)


def init_a(a_RI: Tensor, settings: LoraSettings, index: int) -> None:
    """PEFT's starts: U(-1/sqrt(I), 1/sqrt(I)), which is Kaiming-uniform with a = sqrt(5), or N(0, 1/R^2).

    Drawn row by row from a generator of its own, so that a smaller rank is a prefix of a larger one and adapters of
    one seed start alike whatever else is adapted.
    """
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + index)
    if settings.init is Init.GAUSSIAN:
        a_RI.copy_(torch.randn(a_RI.shape, generator=generator).div_(len(a_RI)))
        return
    bound = 1.0 / math.sqrt(a_RI.shape[1])
    a_RI.copy_(torch.rand(a_RI.shape, generator=generator).mul_(2 * bound).sub_(bound))


@torch.no_grad()
def start_from(weight: FrozenWeight, settings: LoraSettings, name: str) -> tuple[Tensor, Tensor]:
    """(A_RI, B_OR) whose product s B A is the part of the weight that the adapter starts at, in fp32."""
    w_OI, r, scale = weight.dense(torch.float32), settings.rank_of(name), settings.scale_of(name)
    if settings.init is Init.OLORA:
        q_OR, r_RI = torch.linalg.qr(w_OI)
        return r_RI[:r], q_OR[:, :r]  # as in PEFT: the scale is not divided out
    return _best(w_OI, r, scale, settings)


def _best(w_OI: Tensor, r: int, scale: float, settings: LoraSettings) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of rank r, over the scale; singular values go to both in equal parts."""
    if settings.svd_iterations is None:
        u_OR, s_R, v_RI = torch.linalg.svd(w_OI, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            u_OR, s_R, v_IR = torch.svd_lowrank(w_OI, q=r, niter=settings.svd_iterations)
        v_RI = v_IR.mT
    root_R = (s_R[:r] / scale).sqrt()
    return root_R[:, None] * v_RI[:r], u_OR[:, :r] * root_R


@dataclass(frozen=True, slots=True)
class Loss4Bit:
    """Root of the summed squares of what the base differs from the original weights, as a share of theirs.

    `before`: of the 4-bit weights alone; `after`: with the adapter at its start.
    """

    before: float
    after: float

    def sentence(self) -> str:
        return (
            f"LoftQ: the 4-bit weights differ from the original ones by {self.before:.3%} of their norm, and with the "
            f"adapter's start by {self.after:.3%}"
        )


@torch.no_grad()
def start_each(
    settings: LoraSettings, adapted: Mapping[str, tuple[FrozenWeight, Tensor, Tensor]], original: PreTrainedModel
) -> Loss4Bit:
    """Set each (4-bit weight, A_RI, B_OR) to the best approximation of what its weight lost; how much that was."""
    whole = before = after = 0.0
    for name, (weight, a_RI, b_OR) in adapted.items():
        w_OI = frozen_weight(original.get_submodule(name)).dense(torch.float32).to(a_RI.device)
        lost_OI = w_OI - weight.dense(torch.float32)
        a, b = _best(lost_OI, settings.rank_of(name), settings.scale_of(name), settings)
        a_RI.copy_(a)
        b_OR.copy_(b)
        whole += float(w_OI.double().square().sum())
        before += float(lost_OI.double().square().sum())
        after += float((lost_OI - settings.scale_of(name) * (b @ a)).double().square().sum())
    return Loss4Bit((before / whole) ** 0.5, (after / whole) ** 0.5)
