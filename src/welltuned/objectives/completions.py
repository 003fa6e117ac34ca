"""Sampled completions of prompts as packed rows, and the log-probability of each of their tokens.

A group is a prompt and some of its completions: the prompt is there once, and each completion is a branch of it, where
the model `shares`; else every completion is a row of its own that begins with the prompt. Both give the same numbers.
The last token of a completion predicts nothing here, so it is a target only and passes not through the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from welltuned.data.packing import pack
from welltuned.kernels.attention import on
from welltuned.kernels.token_logprob import token_logprob
from welltuned.kernels.token_loss import Head
from welltuned.models.packed import Packed, hidden_states, logits

Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Group:
    """Some completions of one prompt.

    Attributes:
        key: names the dropout masks of the prompt; a completion's are named by it and the completion's number.
        sequences: the number of each completion within the update, or whatever its tokens are to be labelled with.
    """

    prompt: Ids
    completions: tuple[Ids, ...]
    key: int
    sequences: tuple[int, ...]

    def tokens(self, shared: bool) -> int:
        """Tokens that pass through the model."""
        own = sum(len(ids) - 1 for ids in self.completions)
        return own + len(self.prompt) * (1 if shared else len(self.completions))


@dataclass(frozen=True, slots=True)
class Laid:
    """Groups laid end to end: the position that predicts each completion token [M], the token, whose it is.

    `spans` are tokens and a name of every piece that has dropout masks of its own.
    """

    packed: Packed
    row_M: Tensor
    target_M: Tensor
    sequence_M: Tensor
    spans: tuple[tuple[int, int], ...]


def cut(groups: Sequence[Group], budget: int, shared: bool) -> list[list[Group]]:
    """Micro-batches of at most `budget` tokens: a group that is longer is divided, and its prompt is there again."""
    pieces = [piece for group in groups for piece in _divided(group, budget, shared)]
    return [[pieces[i] for i in bin_] for bin_ in pack([piece.tokens(shared) for piece in pieces], budget)]


def _divided(group: Group, budget: int, shared: bool) -> list[Group]:
    pieces: list[list[int]] = []
    room = 0
    for i, ids in enumerate(group.completions):
        need = len(ids) - 1 + (0 if shared else len(group.prompt))
        if not pieces or need > room:
            pieces.append([])
            room = budget - (len(group.prompt) if shared else 0)
        pieces[-1].append(i)
        room -= need
    return [
        Group(group.prompt, tuple(group.completions[i] for i in p), group.key, tuple(group.sequences[i] for i in p))
        for p in pieces
    ]


def lay(groups: Sequence[Group], *, shared: bool, device: torch.device | str = "cpu") -> Laid:
    """Lay groups end to end, in the given order."""
    ids: list[Ids] = []
    lengths: list[int] = []
    branches: list[tuple[int, ...]] = []
    rows: list[NDArray[np.int64]] = []
    spans: list[tuple[int, int]] = []
    start = 0
    for group in groups:
        trunk = start
        for i, (completion, sequence) in enumerate(zip(group.completions, group.sequences, strict=True)):
            if not shared or i == 0:
                trunk = start
                ids.append(group.prompt)
                spans.append((len(group.prompt), group.key))
                start += len(group.prompt)
            own = len(completion) - 1
            # The first token is predicted by the prompt's last, each other one by the one before it.
            rows.append(np.concatenate([[trunk + len(group.prompt) - 1], start + np.arange(own)]))
            if own:
                ids.append(completion[:-1])
                spans.append((own, _named(group.key, sequence)))
                start += own
            if not shared:
                lengths.append(len(group.prompt) + own)
        if shared:
            parts = tuple(len(c) - 1 for c in group.completions if len(c) > 1)
            lengths.append(len(group.prompt) + sum(parts))
            branches.append(parts)
    each = [c for group in groups for c in group.completions]
    owner = np.repeat([s for group in groups for s in group.sequences], [len(c) for c in each])

    def tensor(values: NDArray[np.int64] | NDArray[np.int32]) -> Tensor:
        return on(torch.device(device), torch.from_numpy(values.astype(np.int64)))

    packed = Packed(tensor(np.concatenate(ids)), lengths, branches if any(branches) else None)
    target_M = tensor(np.concatenate(each))
    return Laid(packed, tensor(np.concatenate(rows)), target_M, tensor(owner), tuple(spans))


def _named(key: int, sequence: int) -> int:
    return key * 0x9E3779B1 + 1 + sequence


def token_logprobs(model: PreTrainedModel, head: Head | None, laid: Laid, temperature: float) -> Tensor:
    """The log-probability of each completion token [M] at a temperature, in fp32 or wider; within `packed_model`."""
    if head is None:
        rows_MV = logits(model, laid.packed)[laid.row_M]
        wide_MV = rows_MV.to(torch.promote_types(rows_MV.dtype, torch.float32)) / temperature
        return -torch.nn.functional.cross_entropy(wide_MV, laid.target_M, reduction="none")
    return token_logprob(hidden_states(model, laid.packed)[laid.row_M], head, laid.target_M, temperature=temperature)[0]
