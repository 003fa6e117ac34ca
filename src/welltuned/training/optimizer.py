"""AdamW over the flat buffer, the schedule of its rate, and gradient clipping; every adapter for itself.

AdamW: Loshchilov & Hutter 2019, arXiv 1711.05101. One fused call on one buffer replaces hundreds of small ones.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor

from welltuned.errors import RunError

NO_CODES: Mapping[str, Tensor] = MappingProxyType({})


class Scheduler(StrEnum):
    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The learning rate of each update.

    Warm-up climbs to the peak in `warmup_steps` equal steps, so that no update runs at rate zero; linear and cosine
    then fall so that the update after the last would be at zero.
    """

    kind: Scheduler
    peak: float
    warmup_steps: int
    total_steps: int

    def rate(self, step: int) -> float:
        """The rate of update `step`, which counts from 0."""
        if step < self.warmup_steps and self.kind is not Scheduler.CONSTANT:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.peak * _SHAPES[self.kind](done)


_SHAPES: dict[Scheduler, Callable[[float], float]] = {
    Scheduler.LINEAR: lambda done: max(0.0, 1.0 - done),
    Scheduler.COSINE: lambda done: 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))),
    Scheduler.CONSTANT: lambda done: 1.0,
    Scheduler.CONSTANT_WITH_WARMUP: lambda done: 1.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWSettings:
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True, slots=True)
class Span:
    """Columns of the flat buffer from `start` to `end`, whose rate is `factor` times the row's."""

    start: int
    end: int
    factor: float = 1.0


class FlatAdamW:
    """AdamW for the rows of flat_KP, each with its own rate; only the first `decayed` columns decay.

    Args:
        spans: where columns have rates of their own, all columns in their order; () for one rate.

    Attributes:
        exp_avg_KP, exp_avg_sq_KP: the two moments, as flat as the weights, made at once so that no update needs more
            memory than the one before. codes: empty; moments in 8 bits, where an optimizer has them.
    """

    codes = NO_CODES

    def __init__(
        self,
        flat_KP: Tensor,
        grad_KP: Tensor,
        decayed: int,
        settings: AdamWSettings,
        spans: Sequence[Span] = (),
    ):
        self._grad_KP = grad_KP
        self.exp_avg_KP, self.exp_avg_sq_KP = torch.zeros_like(flat_KP), torch.zeros_like(flat_KP)
        self._steps: list[Tensor] = []
        self._gradients: list[Tensor] = []
        groups = []
        state = {}
        for k in range(flat_KP.shape[0]):
            for span in cut(spans or [Span(0, flat_KP.shape[1])], decayed):
                columns, decay = slice(span.start, span.end), settings.weight_decay if span.end <= decayed else 0.0
                row = flat_KP[k, columns].detach().requires_grad_(True)
                if row.numel():
                    self._gradients.append(grad_KP[k, columns])
                    groups.append({"params": [row], "weight_decay": decay, "adapter": k, "factor": span.factor})
                    self._steps.append(torch.zeros((), dtype=torch.float32, device=row.device))
                    moments = {"exp_avg": self.exp_avg_KP[k, columns], "exp_avg_sq": self.exp_avg_sq_KP[k, columns]}
                    state[row] = {"step": self._steps[-1], **moments}
        self.adamw = torch.optim.AdamW(
            groups, betas=(settings.beta1, settings.beta2), eps=settings.eps, lr=0.0, fused=True
        )
        self.adamw.state.update(state)

    @property
    def steps_G(self) -> Tensor:
        """How many updates each group of numbers has had."""
        return torch.stack(self._steps).cpu()

    def restore(
        self, exp_avg_KP: Tensor, exp_avg_sq_KP: Tensor, steps_G: Tensor, codes: Mapping[str, Tensor] = NO_CODES
    ) -> None:
        """Go on from these moments.

        Raises:
            RunError: they are another optimizer's.
        """
        require_same_state(self.exp_avg_KP, self.codes, exp_avg_KP, codes)
        self.exp_avg_KP.copy_(exp_avg_KP)
        self.exp_avg_sq_KP.copy_(exp_avg_sq_KP)
        self.restore_steps(steps_G.tolist())

    def restore_steps(self, steps_G: Sequence[float]) -> None:
        """Set how many updates each group of numbers has had."""
        for step, value in zip(self._steps, steps_G, strict=True):
            step.fill_(value)

    def reset(self) -> None:
        """As before the first update."""
        for tensor in (self.exp_avg_KP, self.exp_avg_sq_KP, *self._steps):
            tensor.zero_()

    def step(self, rate_K: Sequence[float | None]) -> None:
        """One update; the gradients are left as they are. An adapter whose rate is None is not touched."""
        for group, gradient in zip(self.adamw.param_groups, self._gradients, strict=True):
            rate = rate_K[group["adapter"]]
            group["lr"] = 0.0 if rate is None else rate * group["factor"]
            group["params"][0].grad = None if rate is None else gradient
        self.adamw.step()

    def zero_grad(self) -> None:
        self._grad_KP.zero_()


def cut(spans: Sequence[Span], at: int) -> list[Span]:
    """The same columns, with no span across `at`; neighbours of one factor are one."""
    cut: list[Span] = []
    for span in spans:
        ends = [span.start, at, span.end] if span.start < at < span.end else [span.start, span.end]
        for start, end in pairwise(ends):
            last = cut[-1] if cut else None
            if last is not None and last.end == start != at and last.factor == span.factor:
                cut[-1] = Span(last.start, end, span.factor)
            else:
                cut.append(Span(start, end, span.factor))
    return cut


def require_same_state(
    ours_KP: Tensor, our_codes: Mapping[str, Tensor], found_KP: Tensor, found_codes: Mapping[str, Tensor]
) -> None:
    """Refuse moments of another optimizer.

    Raises:
        RunError: as said.
    """
    shapes = [{name: tuple(t.shape) for name, t in codes.items()} for codes in (our_codes, found_codes)]
    if tuple(ours_KP.shape) != tuple(found_KP.shape) or shapes[0] != shapes[1]:
        kinds = ["8-bit AdamW" if codes else "AdamW in fp32" for codes in (found_codes, our_codes)]
        what = f"it holds the moments of {kinds[0]}, and this run's optim is {kinds[1]}"
        if kinds[0] == kinds[1]:
            what = "it holds the moments of other tensors"
        raise RunError(f"{what}: go on with the optim that it was begun with, or begin a new run")


def clip_(grad_KP: Tensor, limit: float, norm_K: Tensor | None = None) -> list[float]:
    """Scale every adapter's gradient down to `limit` where it is longer (0: never); the norms before that.

    Args:
        norm_K: where grad_KP is only a part of it: the norm of the whole.
    """
    norm_K = torch.linalg.vector_norm(grad_KP, dim=1) if norm_K is None else norm_K
    if limit > 0:
        grad_KP.mul_((limit / norm_K.clamp_min(1e-12)).clamp_max(1.0)[:, None].to(grad_KP.device))
    norms: list[float] = norm_K.tolist()
    return norms
