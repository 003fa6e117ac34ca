"""Full fine-tuning: the parameters of the model, moved into one flat buffer with the interface of an adapter bank."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from welltuned.models.lora import Slot
from welltuned.models.parts import within


class FullParameters:
    """All parameters of one model as views of flat_KP [1, P], fp32; matrices first, so that they alone decay.

    Args:
        frozen: names of parts that stay as they are.

    Attributes:
        in_pieces: whether these are only this rank's parts of them (models/sharded.py); `whole` has their whole shapes.
        decayed: how many columns of the flat buffer weight decay applies to (matrices, not gains or biases).
    """

    in_pieces = False

    def __init__(self, model: PreTrainedModel, frozen: tuple[str, ...] = ()):
        self.model = model.float()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not within(name, frozen))
        trained = [item for item in model.named_parameters() if item[1].requires_grad]  # tied weights come once
        named = sorted(trained, key=lambda item: item[1].dim() < 2)
        self.slots: list[Slot] = []
        start = 0
        for name, parameter in named:
            self.slots.append(Slot(name, start, tuple(parameter.shape)))
            start += parameter.numel()
        self.whole = {slot.name: slot.shape for slot in self.slots}
        self.decayed = sum(slot.size for slot in self.slots if len(slot.shape) > 1)
        device = named[0][1].device
        self.flat_KP = torch.empty(1, start, dtype=torch.float32, device=device)
        self.grad_KP = torch.zeros_like(self.flat_KP)
        self._parameters = [parameter for _, parameter in named]
        for slot, parameter in zip(self.slots, self._parameters, strict=True):
            self._adopt(slot, parameter)
        self.claim_gradients()

    def _adopt(self, slot: Slot, parameter: nn.Parameter) -> None:
        view = self.flat_KP[0, slot.start : slot.start + slot.size].view(slot.shape)
        view.copy_(parameter.data)
        parameter.data = view

    def claim_gradients(self) -> None:
        """Make autograd accumulate into grad_KP, also after someone set the parameters' gradients to None."""
        for slot, parameter in zip(self.slots, self._parameters, strict=True):
            parameter.grad = self.grad_KP[0, slot.start : slot.start + slot.size].view(slot.shape)

    def use_rows(self, per_adapter: tuple[int, ...] | None, dropout_spans: tuple[tuple[int, int], ...]) -> None:
        """Nothing to say: there are no adapters and no dropout."""

    def no_dropout(self) -> None:
        """Nothing to turn off."""

    def tensors(self, k: int = 0) -> dict[str, Tensor]:
        """Parameters by name, as views of the flat buffer."""
        return {s.name: self.flat_KP[k, s.start : s.start + s.size].view(s.shape) for s in self.slots}
