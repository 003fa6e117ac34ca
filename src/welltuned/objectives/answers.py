"""Examples with one or two answers as packed rows, and the log-probability of each answer under the model.

A preference pair is laid out as it is stored: its prompt once, then the branches of both answers, where the model
`shares`; else as two sequences that each begin with the prompt. Both give the same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from welltuned.data.pairs import sequences
from welltuned.data.render import Example
from welltuned.kernels.attention import on
from welltuned.kernels.token_logprob import token_logprob
from welltuned.kernels.token_loss import Head
from welltuned.models.packed import Packed, hidden_states, logits

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Laid:
    """Examples laid end to end. A is the number of answers: one an example, two a pair (chosen, then rejected).

    With `whole_chosen` a pair has a third: the other tokens of its chosen sequence, the prompt's.

    Attributes:
        row_M, target_M: the packed position that predicts each trained token, and that token.
        answer_M: the answer that it belongs to.
        last_A: the packed position of each answer's last token.
        spans: tokens and a number of every piece that has dropout masks of its own: the prompt of a pair has the same
            masks wherever it stands.
    """

    packed: Packed
    row_M: Tensor
    target_M: Tensor
    answer_M: Tensor
    last_A: Tensor
    tokens_A: Tensor
    spans: Spans


def laid_length(example: Example, shared: bool) -> int:
    """Tokens that pass through the model for an example."""
    if example.fork is None or shared:
        return len(example.ids)
    return len(example.ids) + example.fork.shared


@dataclass(slots=True)
class _Layout:
    """What is laid so far."""

    ids: list[NDArray[np.int32]]
    lengths: list[int]
    branches: list[tuple[int, ...]]
    rows: list[NDArray[np.int64]]
    targets: list[NDArray[np.int32]]
    answers: list[NDArray[np.int64]]
    last: list[int]
    spans: list[tuple[int, int]]
    start: int = 0

    def sequence(self, example: Example) -> None:
        """A sequence of its own."""
        labels = np.flatnonzero(example.mask[1:]) + 1
        self._answer(self.start + labels - 1, example.ids[labels], self.start + len(example.ids) - 1)
        self._lay(example.ids, ())

    def rest(self, example: Example, start: int) -> None:
        """The tokens of a pair's chosen sequence, which begins at `start`, that are not trained."""
        assert example.fork is not None
        labels = np.flatnonzero(~example.mask[1 : example.fork.second]) + 1
        self._answer(start + labels - 1, example.ids[labels], start + example.fork.second - 1)

    def forked(self, example: Example) -> None:
        """A pair whose prompt is there once: the first token of a branch is predicted from the prompt's last."""
        assert example.fork is not None
        shared, second = example.fork
        own = example.fork.branches(len(example.ids))
        for begin, length in ((shared, own[0]), (second, own[1])):
            labels = np.flatnonzero(example.mask[begin : begin + length])
            before = np.where(labels > 0, begin + labels - 1, shared - 1)
            self._answer(self.start + before, example.ids[begin + labels], self.start + begin + length - 1)
        self._lay(example.ids, own)

    def _answer(self, rows: NDArray[np.int64], targets: NDArray[np.int32], last: int) -> None:
        self.rows.append(rows)
        self.targets.append(targets)
        self.answers.append(np.full(len(rows), len(self.last)))
        self.last.append(last)

    def _lay(self, ids: NDArray[np.int32], branches: tuple[int, ...]) -> None:
        self.ids.append(ids)
        self.lengths.append(len(ids))
        self.branches.append(branches)
        self.start += len(ids)


def lay(
    examples: Sequence[Example],
    keys: Sequence[int] | None = None,
    *,
    shared: bool,
    whole_chosen: bool = False,
    device: torch.device | str = "cpu",
) -> Laid:
    """Lay examples end to end, in the given order.

    Args:
        keys: a number for each example that names its dropout masks.
        shared: whether the prompt of a pair is there once.
        whole_chosen: whether the untrained tokens of the chosen sequence count as an answer of their own.
    """
    out = _Layout([], [], [], [], [], [], [], [])
    for example, key in zip(examples, keys or [0] * len(examples), strict=True):
        fork = example.fork
        if fork is None:
            out.sequence(example)
            out.spans.append((len(example.ids), _named(key, 0)))
            continue
        own = [(n, _named(key, 1 + i)) for i, n in enumerate(fork.branches(len(example.ids)))]
        start = out.start
        prompt = [(fork.shared, _named(key, 0))] if fork.shared else []
        if shared:
            out.forked(example)
            out.spans += [*prompt, *own]
        else:
            for answer, span in zip(sequences(example), own, strict=True):
                out.sequence(answer)
                out.spans += [*prompt, span]
        if whole_chosen:
            out.rest(example, start)
    forks = out.branches if any(out.branches) else None
    device = torch.device(device)

    def tensor(parts: Sequence[NDArray[np.int64] | NDArray[np.int32]]) -> Tensor:
        return on(device, torch.from_numpy(np.concatenate(parts).astype(np.int64)))

    tokens_A = on(device, torch.tensor([float(len(rows)) for rows in out.rows]))
    packed = Packed(tensor(out.ids), out.lengths, forks)
    last_A = on(device, torch.tensor(out.last))
    return Laid(packed, tensor(out.rows), tensor(out.targets), tensor(out.answers), last_A, tokens_A, tuple(out.spans))


def _named(key: int, piece: int) -> int:
    return key * 3 + piece


def token_logps(model: PreTrainedModel, head: Head | None, laid: Laid) -> Tensor:
    """The log-probability of each trained token [M], in fp32 or wider; call within `packed_model`."""
    if head is None:
        rows_MV = logits(model, laid.packed)[laid.row_M]
        wide = rows_MV.to(torch.promote_types(rows_MV.dtype, torch.float32))
        return -torch.nn.functional.cross_entropy(wide, laid.target_M, reduction="none")
    return token_logprob(hidden_states(model, laid.packed)[laid.row_M], head, laid.target_M)[0]


def answer_logps(logp_M: Tensor, laid: Laid) -> Tensor:
    """The log-probability of each answer [A]: the sum of its trained tokens', in float64.

    Losses live on differences of such sums: in fp32 a thousand nats come in steps of 6e-5.
    """
    logp_M = logp_M.double()
    return logp_M.new_zeros(len(laid.last_A)).index_add(0, laid.answer_M, logp_M)
