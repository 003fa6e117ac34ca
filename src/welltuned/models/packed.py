"""Run a transformers model on packed examples: one row, no padding, attention within each example.

Uses transformers' own hooks (AttentionInterface, AttentionMaskInterface); nothing in the model's code is replaced.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from welltuned.kernels.attention import packed_attention

ATTENTION = "welltuned_packed"


@dataclass(frozen=True, slots=True)
class Packed:
    """Whole examples laid end to end.

    Args:
        ids_N: token ids, int64.
        lengths: tokens of each example; they add up to N.
    """

    ids_N: Tensor
    lengths: list[int]

    @property
    def position_ids_N(self) -> Tensor:
        return torch.cat([torch.arange(n, device=self.ids_N.device) for n in self.lengths])


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed_lengths: list[int] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention call: [1, heads, N, D] in, [1, N, heads, D] out."""
    if packed_lengths is None or query.shape[0] != 1:
        raise RuntimeError(f"{ATTENTION} attention runs packed rows only; use `hidden_states` or standard attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = packed_attention(
        query[0], key[0], value[0], packed_lengths, scale, window=sliding_window, softcap=softcap, sinks_Q=s_aux
    )
    return out[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


@contextmanager
def packed_model(model: PreTrainedModel) -> Iterator[None]:
    """Within the block this model (and no other) attends within packed examples, its own dropout off."""
    before, training = model.config._attn_implementation, model.training
    model.set_attn_implementation(ATTENTION)
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)


def _arguments(batch: Packed) -> dict[str, Any]:
    return {
        "input_ids": batch.ids_N[None],
        "position_ids": batch.position_ids_N[None],
        "use_cache": False,
        "packed_lengths": batch.lengths,
    }


def hidden_states(model: PreTrainedModel, batch: Packed) -> Tensor:
    """The backbone's last hidden states [N, H]; call within `packed_model`."""
    return model.base_model(**_arguments(batch)).last_hidden_state[0]


def logits(model: PreTrainedModel, batch: Packed) -> Tensor:
    """The whole model's logits [N, V], whatever its head does; call within `packed_model`."""
    return model(**_arguments(batch)).logits[0]
