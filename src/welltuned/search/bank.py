"""The arms in one bank: one optimizer over the rows of its flat buffer, a running average of each, and one round.

A round is one update of every arm that takes part, each on its own rows, with its own rate, clipping and health.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor

from welltuned.errors import RunError
from welltuned.models.lora import AdapterBank, LoraSettings
from welltuned.search.items import Items, Share, gradients
from welltuned.training.checkpoint import Checkpoint, Position, Snapshot, named
from welltuned.training.optimizer import AdamWSettings, FlatAdamW, Span, clip_
from welltuned.training.snapshot import Origin
from welltuned.training.step import Engine, Gradient

LAYOUT = "grad and param do not obey the gradient layout contract"  # a hint of torch: rows of a buffer have gaps
MEMORY = 0.3  # share of an arm's updates so far that its running average forgets over


class Bank:
    """K arms' numbers.

    Attributes:
        average_KP: of each arm's weights, over about the last third of its updates. It stands for the weights that a
            decayed rate would reach: constant rates with averaging match decay (Hägele et al. 2024, arXiv 2405.18392).
            Over a tenth it hardly does in short runs, where high rates then look far worse than they end.
    """

    def __init__(self, engine: Engine, settings: AdamWSettings, spans: Sequence[Span]):
        assert isinstance(engine.trained, AdapterBank)
        self.engine, self.adapters, self._settings, self._spans = engine, engine.trained, settings, spans
        self.average_KP = self.adapters.flat_KP.clone()
        self._take_buffers()

    def _take_buffers(self) -> None:
        bank = self.adapters
        self.optimizer = FlatAdamW(bank.flat_KP, bank.grad_KP, bank.decayed, self._settings, self._spans)
        bank.claim_gradients()

    @property
    def size(self) -> int:
        return len(self.adapters.settings)

    # ── one round ────────────────────────────────────────────────────────────────────────────────────────────────────

    def gradients(self, engine: Engine, items: Items, shares: Sequence[Share]) -> list[Gradient]:
        """Each share's own gradient in its row of the buffer, from a cleared one."""
        self.optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=LAYOUT)
            return gradients(engine, items, shares)

    def clip(self, limit: float) -> list[float]:
        """Every row's gradient scaled down to the limit by itself; the norms before that."""
        return clip_(self.adapters.grad_KP, limit)

    def step(self, rate_K: Sequence[float | None], step_K: Sequence[int]) -> None:
        """One update of every row that has a rate; the others' numbers are not touched.

        Args:
            step_K: which update of its arm it is, from 1.
        """
        self.optimizer.step(rate_K)
        for k, (rate, step) in enumerate(zip(rate_K, step_K, strict=True)):
            if rate is not None:
                self.average_KP[k].lerp_(self.adapters.flat_KP[k], 1 / max(1.0, MEMORY * step))

    def is_finite(self, k: int) -> bool:
        return bool(torch.isfinite(self.adapters.flat_KP[k]).all())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the model computes with the running averages."""
        now_KP = self.adapters.flat_KP.clone()
        self.adapters.flat_KP.copy_(self.average_KP)
        try:
            yield
        finally:
            self.adapters.flat_KP.copy_(now_KP)

    # ── which arms ───────────────────────────────────────────────────────────────────────────────────────────────────

    def keep(self, rows: Sequence[int], fresh: Mapping[int, LoraSettings] = MappingProxyType({})) -> None:
        """Leave these rows, in this order, with their moments and averages; the others' memory is given back.

        Args:
            fresh: places in the new order at which another adapter begins, with nothing remembered.
        """
        at = list(rows)
        steps_KG = self.optimizer.steps_G.view(self.size, -1)[at]
        moments = self.optimizer.exp_avg_KP[at], self.optimizer.exp_avg_sq_KP[at], steps_KG
        self.average_KP = self.average_KP[at]
        self.adapters.keep(rows)
        for k, settings in fresh.items():
            self.adapters.renew(k, settings)
            self.average_KP[k].copy_(self.adapters.flat_KP[k])
            for moment in moments:
                moment[k] = 0
        self._take_buffers()
        self.optimizer.restore(moments[0], moments[1], steps_KG.flatten())

    # ── saving ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def snapshot(self, position: Position, origin: Origin, metrics_bytes: int, *, copied: bool) -> Snapshot:
        """The bank in host memory: weights and averages are the rows of one buffer, [2K, P].

        Raises:
            RunError: a number is not finite; such a state is never saved.
        """
        both_KP = torch.cat([self.adapters.flat_KP.cpu(), self.average_KP.cpu()])
        moments = [t.to("cpu", copy=copied) for t in (self.optimizer.exp_avg_KP, self.optimizer.exp_avg_sq_KP)]
        if not all(bool(torch.isfinite(t).all()) for t in (both_KP, *moments)):
            raise RunError("trained weights or moments are not finite: they are not saved")
        return Snapshot(
            flat_KP=both_KP,
            exp_avg_KP=moments[0],
            exp_avg_sq_KP=moments[1],
            steps_G=self.optimizer.steps_G,
            slots=self.adapters.slots,
            position=position,
            run=origin.run,
            metrics_bytes=metrics_bytes,
            identity=origin.identity,
            versions=origin.versions,
        )

    def restore(self, found: Checkpoint) -> None:
        """The rows of a checkpoint; the bank must hold as many.

        Raises:
            RunError: it holds other tensors.
        """
        both_KP = torch.cat([self.adapters.flat_KP.cpu(), self.average_KP.cpu()])
        places = named(both_KP, self.adapters.slots)
        if shapes(places) != shapes(found.trained):
            raise RunError(f"{found.folder} holds other tensors than this search trains")
        for name, tensor in found.trained.items():
            places[name].copy_(tensor)
        self.adapters.flat_KP.copy_(both_KP[: self.size])
        self.average_KP.copy_(both_KP[self.size :])
        self.optimizer.restore(found.exp_avg_KP, found.exp_avg_sq_KP, found.steps_G)
        self.optimizer.zero_grad()


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
