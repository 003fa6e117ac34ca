"""How far the trained weights have moved since the start, relative to the weights that they change."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from welltuned.models.full import FullParameters
from welltuned.models.lora import AdapterBank, LoraLinear
from welltuned.training.ranks import ALONE, Ranks

SAMPLED = 8  # matrices that stand for all: a pass over every weight after every update would cost time


@dataclass(frozen=True, slots=True)
class _LowRank:
    """s · (B A - B0 A0) of one projection, beside the norm of its frozen weight."""

    scale: float
    a_RI: Tensor
    b_OR: Tensor
    start_a_RI: Tensor
    start_b_OR: Tensor

    def change(self) -> float:
        """The Frobenius norm by matrices of rank · rank: |U V|² = sum((Uᵀ U) * (V Vᵀ)).

        U = [B - B0, B0] and V = [A; A - A0], so that a small change is no difference of large numbers.
        """
        u = torch.cat([self.b_OR - self.start_b_OR, self.start_b_OR], dim=1)
        v = torch.cat([self.a_RI, self.a_RI - self.start_a_RI])
        squared = ((u.T @ u).double() * (v @ v.T).double()).sum()
        return abs(self.scale) * math.sqrt(max(0.0, float(squared)))


@dataclass(frozen=True, slots=True)
class _Dense:
    now: Tensor
    start: Tensor

    def change(self) -> float:
        return float(torch.linalg.vector_norm(self.now - self.start))


class Movement:
    """The relative change of a few matrices spread over the model: sqrt(sum |dW|² / sum |W|²).

    For adapters dW is what they add to the frozen W; where only experts carry adapters, and in full fine-tuning, it is
    the change of the trained numbers themselves. Make it before the first update. Ranks that hold parts of the model
    must make it, and ask it, together.
    """

    def __init__(self, trained: AdapterBank | FullParameters, ranks: Ranks = ALONE):
        self._ranks = ranks if isinstance(trained, FullParameters) and trained.in_pieces else ALONE
        self.parts: list[_LowRank | _Dense] = []
        squared = 0.0
        linear = _linears(trained)
        for name in _spread(list(linear)):
            part, norm = _low_rank(trained, name, linear[name])
            self.parts.append(part)
            squared += norm**2
        tensors = trained.tensors()
        for name in [] if linear else _spread([n for n, t in tensors.items() if t.dim() > 1]):
            start = tensors[name].detach().clone()
            self.parts.append(_Dense(tensors[name].detach(), start))
            squared += float(torch.linalg.vector_norm(start)) ** 2
        self.norm = math.sqrt(self._whole(squared))

    @torch.no_grad()
    def relative(self) -> float:
        """The relative change now; NaN where nothing can be compared."""
        changed = self._whole(sum(part.change() ** 2 for part in self.parts))
        return math.sqrt(changed) / self.norm if self.norm else math.nan

    def _whole(self, squared: float) -> float:
        """The sum over the ranks, where each has measured its own rows."""
        return float(self._ranks.total(lambda: torch.tensor(squared, dtype=torch.float64)))


def _linears(trained: AdapterBank | FullParameters) -> dict[str, LoraLinear]:
    if not isinstance(trained, AdapterBank):
        return {}
    return {name: module for name, module in trained.modules.items() if isinstance(module, LoraLinear)}


def _low_rank(trained: AdapterBank | FullParameters, name: str, module: LoraLinear) -> tuple[_LowRank, float]:
    assert isinstance(trained, AdapterBank)
    now, start = trained.tensors(), trained.tensors_at_start()
    a, b = f"{name}.lora_A", f"{name}.lora_B"
    norm = float(torch.linalg.vector_norm(module.projection.weight.dense(torch.float32)))
    scale = float(module.projection.scale_K[0])
    return _LowRank(scale, now[a].detach(), now[b].detach(), start[a], start[b]), norm


def _spread(names: list[str]) -> list[str]:
    """At most SAMPLED of them, evenly from the first to the last."""
    count = min(SAMPLED, len(names))
    return [names[round(i * (len(names) - 1) / max(1, count - 1))] for i in range(count)]
