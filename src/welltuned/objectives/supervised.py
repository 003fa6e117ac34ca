"""Supervised fine-tuning: the negative log-likelihood of the labelled tokens, summed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from welltuned.data.render import Example
from welltuned.kernels.token_loss import Head, token_loss
from welltuned.models.packed import Packed, hidden_states, logits


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Packed examples with their labels.

    Args:
        packed: token ids and lengths.
        row_M: the packed position that predicts each label (the position before it).
        target_M: the label's token id.
        example_M: which example of the micro-batch each label belongs to.
    """

    packed: Packed
    row_M: Tensor
    target_M: Tensor
    example_M: Tensor


def supervised_tokens(example: Example) -> int:
    """Labels of an example: trained tokens, less the first token, which nothing predicts."""
    return int(example.mask[1:].sum())


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> MicroBatch:
    """Lay examples end to end, in the given order."""
    row, target, owner, start = [], [], [], 0
    for index, example in enumerate(examples):
        labels = np.flatnonzero(example.mask[1:]) + 1
        row.append(start + labels - 1)
        target.append(example.ids[labels])
        owner.append(np.full(len(labels), index))
        start += len(example.ids)

    def tensor(parts: Sequence[np.ndarray]) -> Tensor:
        on_host = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        # From pinned memory, so that the next micro-batch is laid out while the GPU still works on this one.
        return on_host if torch.device(device).type == "cpu" else on_host.pin_memory().to(device, non_blocking=True)

    packed = Packed(tensor([e.ids for e in examples]), [len(e.ids) for e in examples])
    return MicroBatch(packed, tensor(row), tensor(target), tensor(owner))


def loss(model: PreTrainedModel, head: Head | None, batch: MicroBatch, weight_M: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of weight_M * nll_M, nll_M detached), nll in nats a label; call within `packed_model`.

    `head` None is the plain path: the whole model's logits, for architectures whose head is not understood.
    """
    if head is None:
        rows_MV = logits(model, batch.packed)[batch.row_M]
        nll_M = torch.nn.functional.cross_entropy(
            rows_MV.to(torch.promote_types(rows_MV.dtype, torch.float32)), batch.target_M, reduction="none"
        )
        return (nll_M * weight_M).sum(), nll_M.detach()
    hidden_MH = hidden_states(model, batch.packed)[batch.row_M]
    return token_loss(hidden_MH, head, batch.target_M, weight_M)
