"""An exponential moving average of the trained weights, kept beside them: m <- d m + (1 - d) w after every update.

d = min(decay, (1 + t) / (10 + t)) at update t, so that the first updates, which are far from the end, are soon
forgotten (as in TensorFlow's ExponentialMovingAverage with num_updates). Factors of LoRA are averaged, not products: of
one run, whose factors lie close to each other, the difference is of second order in their distance.
"""

import torch
from torch import Tensor

from welltuned.errors import RunError


class Average:
    """`flat_KP`: the average, as flat as the weights."""

    def __init__(self, decay: float, flat_KP: Tensor):
        self.decay, self.flat_KP = decay, flat_KP.detach().clone()

    @torch.no_grad()
    def follow(self, flat_KP: Tensor, update: int) -> None:
        """Take in the weights after update number `update`, from 1 on."""
        self.flat_KP.lerp_(flat_KP, 1 - min(self.decay, (1 + update) / (10 + update)))

    @torch.no_grad()
    def restore(self, saved_KP: Tensor | None, flat_KP: Tensor) -> None:
        """Go on from a checkpoint's average.

        Raises:
            RunError: the checkpoint has none, or one of other tensors.
        """
        if saved_KP is None or saved_KP.shape != flat_KP.shape:
            raise RunError("the checkpoint holds no average of these weights; train with the ema_decay that it had")
        self.flat_KP.copy_(saved_KP)

    @torch.no_grad()
    def exchange(self, flat_KP: Tensor) -> None:
        """Put the average in the weights' place and the weights in the average's; once more undoes it."""
        held_KP = flat_KP.clone()
        flat_KP.copy_(self.flat_KP)
        self.flat_KP.copy_(held_KP)
