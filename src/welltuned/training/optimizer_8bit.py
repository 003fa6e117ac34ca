"""AdamW over the flat buffer with both moments in 8 bits, but for gains and biases, which are few and keep fp32.

So bitsandbytes leaves tensors of fewer than 4,096 numbers. Embeddings are coded here as everything else: what makes
them special there, blocks of which a few rows have gradients and others hardly any, is what kernels/adamw_8bit's second
moment withstands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from welltuned.kernels.adamw_8bit import Moment, Update, Workspace, adamw_8bit_, blocks_of
from welltuned.recipe import OPTIMIZERS_8BIT
from welltuned.training.optimizer import NO_CODES, AdamWSettings, FlatAdamW, Span, cut, require_same_state


class FlatAdamW8bit:
    """As FlatAdamW; the moments of the first `decayed` columns are codes with a scale for each 256.

    Attributes:
        exp_avg_KP, exp_avg_sq_KP: the moments of the other columns, fp32.
        codes: those of the first by name: codes [K, decayed] uint8 and scales [K, blocks] fp32 of both.
    """

    def __init__(
        self,
        flat_KP: Tensor,
        grad_KP: Tensor,
        decayed: int,
        settings: AdamWSettings,
        spans: Sequence[Span] = (),
    ):
        self._flat_KP, self._grad_KP, self._settings = flat_KP, grad_KP, settings
        rows, columns = flat_KP.shape
        every = cut(spans or [Span(0, columns)], decayed)
        self._spans = [span for span in every if span.end <= decayed and span.end > span.start]
        blocks = sum(blocks_of(span.end - span.start) for span in self._spans)
        self.codes: dict[str, Tensor] = {}
        for name in ("exp_avg", "exp_avg_sq"):
            self.codes[f"{name}_codes"] = torch.empty(rows, decayed, dtype=torch.uint8, device=flat_KP.device)
            self.codes[f"{name}_scale"] = torch.empty(rows, blocks, device=flat_KP.device)
        after = [span for span in every if span.end > decayed]
        rest = [replace(span, start=span.start - decayed, end=span.end - decayed) for span in after]
        self._rest = FlatAdamW(flat_KP[:, decayed:], grad_KP[:, decayed:], 0, settings, rest) if rest else None
        empty_KP = flat_KP.new_empty(rows, 0)
        self.exp_avg_KP = self._rest.exp_avg_KP if self._rest else empty_KP
        self.exp_avg_sq_KP = self._rest.exp_avg_sq_KP if self._rest else empty_KP
        self._steps_K = [0] * rows
        self._room = Workspace.of(max((span.end - span.start for span in self._spans), default=0), flat_KP.device)
        self._clear_codes()

    @property
    def steps_G(self) -> Tensor:
        """How many updates each adapter has had, then each group of numbers in fp32."""
        coded = torch.tensor(self._steps_K, dtype=torch.float32)
        return coded if self._rest is None else torch.cat([coded, self._rest.steps_G])

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
        for name, tensor in self.codes.items():
            tensor.copy_(codes[name])
        self.restore_steps(steps_G.tolist())

    def restore_steps(self, steps_G: Sequence[float]) -> None:
        """Set how many updates each adapter and each group of numbers in fp32 has had."""
        rows = len(self._steps_K)
        self._steps_K[:] = map(int, steps_G[:rows])
        if self._rest is not None:
            self._rest.restore_steps(steps_G[rows:])

    def reset(self) -> None:
        """As before the first update."""
        self._clear_codes()
        self._steps_K[:] = [0] * len(self._steps_K)
        if self._rest is not None:
            self._rest.reset()

    def step(self, rate_K: Sequence[float | None]) -> None:
        """One update; the gradients are left as they are. An adapter whose rate is None is not touched."""
        for k, rate in enumerate(rate_K):
            if rate is None:
                continue
            self._steps_K[k] += 1
            block = 0
            for span in self._spans:
                columns, size = slice(span.start, span.end), blocks_of(span.end - span.start)
                m, v = self._moments(k, columns, slice(block, block + size))
                at = Update(
                    rate=rate * span.factor,
                    beta1=self._settings.beta1,
                    beta2=self._settings.beta2,
                    eps=self._settings.eps,
                    weight_decay=self._settings.weight_decay,
                    step=self._steps_K[k],
                )
                adamw_8bit_(self._flat_KP[k, columns], self._grad_KP[k, columns], m, v, at, self._room)
                block += size
        if self._rest is not None:
            self._rest.step(rate_K)

    def zero_grad(self) -> None:
        self._grad_KP.zero_()

    def _moments(self, k: int, columns: slice, blocks: slice) -> tuple[Moment, Moment]:
        codes = self.codes
        return (
            Moment(codes["exp_avg_codes"][k, columns], codes["exp_avg_scale"][k, blocks], signed=True),
            Moment(codes["exp_avg_sq_codes"][k, columns], codes["exp_avg_sq_scale"][k, blocks], signed=False),
        )

    def _clear_codes(self) -> None:
        for k in range(len(self._steps_K)):
            for moment in self._moments(k, slice(None), slice(None)):
                moment.clear()


Optimizer = FlatAdamW | FlatAdamW8bit


def make_optimizer(
    name: str, flat_KP: Tensor, grad_KP: Tensor, decayed: int, settings: AdamWSettings, spans: Sequence[Span]
) -> Optimizer:
    """The optimizer that a recipe's `optim` names."""
    kind = FlatAdamW8bit if name in OPTIMIZERS_8BIT else FlatAdamW
    return kind(flat_KP, grad_KP, decayed, settings, spans)
