"""Completions from the model as it is now: batched, with a cache of keys and values, and a sampler of our own.

The model's own forward runs, with its adapters as they are, so no copy of the weights can be stale. A prompt is
computed once for all of its completions. Every completion has its own stream of random numbers, a function of its name:
which others are sampled beside it, and in how many batches, does not change what is drawn for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from welltuned.kernels.lora import mixed
from welltuned.kernels.token_loss import Head
from welltuned.models.decode import Decoder, decoding, new_decoder
from welltuned.models.packed import packs

SHRINK = 0.125  # share of a batch's completions that have ended before they are taken out of it
BLOCK = 256  # vocabulary entries that are summed together before a token is looked for among them
IN_CACHE = 2**20  # logits that are worked on at a time on the CPU: 4 MB, three times


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are drawn. `temperature` 0 is greedy, and then one completion a prompt is all there is.

    Args:
        top_p: the likeliest tokens that together have this probability are drawn from (Holtzman et al. 2020,
            arXiv 1904.09751).
        stop_ids: tokens that end a completion, and belong to it.
        tokens_at_once: most tokens, prompts and completions at their longest, of the completions of one batch; one
            completion alone may have more.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    tokens_at_once: int = 16_384


@dataclass(frozen=True, slots=True)
class Completion:
    """ids [n] int32, the token that ended it included where `ended`; else it was cut at the limit.

    `entropy` is the sum over its tokens of the entropy of what each was drawn from, before top_p, in nats. Where
    another engine drew them it is estimated from `logprobs` [n], those of the tokens themselves.
    """

    ids: NDArray[np.int32]
    ended: bool
    entropy: float
    logprobs: NDArray[np.float32] | None = None


def uniforms(name: int, count: int) -> Tensor:
    """The random numbers in [0, 1) of one completion [count], float64."""
    generator = torch.Generator().manual_seed(mixed(name))
    return torch.rand(count, generator=generator, dtype=torch.float64)


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    head: Head | None,
    prompts: Sequence[NDArray[np.int32]],
    names: Sequence[Sequence[int]],
    sampling: Sampling,
) -> list[list[Completion]]:
    """For each prompt a completion a name. Call with dropout off; within `packed_model` or without.

    Args:
        head: as in `Engine`; None where the model's own logits are used.
        names: of each prompt one number a completion, which names its random numbers.
    """
    out: list[list[Completion]] = [[] for _ in prompts]
    packed = packs(model)
    parts = _parts([len(p) for p in prompts], names, sampling, packed)
    with decoding(model):
        for batch in _batches([len(prompts[i]) for i, _ in parts], [len(n) for _, n in parts], sampling, packed):
            some = [parts[b] for b in batch]
            chosen, named = [prompts[i] for i, _ in some], [n for _, n in some]
            decoder = new_decoder(model, head, chosen, [len(n) for n in named], sampling.max_new_tokens)
            for (index, _), completions in zip(some, _sample(decoder, named, sampling, model.device), strict=True):
                out[index] += completions
    return out


def _parts(
    lengths: Sequence[int], names: Sequence[Sequence[int]], sampling: Sampling, packed: bool
) -> list[tuple[int, Sequence[int]]]:
    """Each prompt's number with its names, in several parts where they are too many for one batch."""
    found = []
    for index, (length, all_names) in enumerate(zip(lengths, names, strict=True)):
        shared, own = (length, 0) if packed else (0, length)
        most = max(1, (sampling.tokens_at_once - shared) // (own + sampling.max_new_tokens))
        found += [(index, all_names[start : start + most]) for start in range(0, len(all_names), most)]
    return found


def _batches(lengths: Sequence[int], counts: Sequence[int], sampling: Sampling, packed: bool) -> list[list[int]]:
    """Prompts of like length together, so that little is padding; of equal length where the model takes no padding.

    A prompt's tokens count once where its completions share them.
    """
    batches: list[list[int]] = []
    held = 0
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        tokens = lengths[index] * (1 if packed else counts[index]) + counts[index] * sampling.max_new_tokens
        unlike = bool(batches) and not packed and lengths[batches[-1][0]] != lengths[index]
        if not batches or unlike or held + tokens > sampling.tokens_at_once:
            batches.append([])
            held = 0
        batches[-1].append(index)
        held += tokens
    return batches


# ── one batch ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _sample(
    decoder: Decoder, names: Sequence[Sequence[int]], sampling: Sampling, device: torch.device
) -> list[list[Completion]]:
    """Legend: S sequences in all, B those still in the batch, T tokens of a completion at its longest."""
    every, longest = [name for group in names for name in group], sampling.max_new_tokens
    uniform_ST = torch.stack([uniforms(name, longest) for name in every]).to(device) if sampling.temperature else None
    stops = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=device)
    ids_ST = torch.zeros(len(every), longest, dtype=torch.int64, device=device)
    entropy_S = torch.zeros(len(every), dtype=torch.float64, device=device)
    length_S = torch.full((len(every),), longest, device=device)
    ended_S = torch.zeros(len(every), dtype=torch.bool, device=device)
    live_B = torch.arange(len(every), device=device)  # the sequence in each row of the batch
    logits_BV = decoder.begin()
    for t in range(longest):
        u_B = None if uniform_ST is None else uniform_ST[live_B, t]
        token_B, entropy_B = draw(logits_BV, u_B, sampling)
        going_B = ~ended_S[live_B]
        ids_ST[live_B, t] = torch.where(going_B, token_B, 0)
        entropy_S[live_B] += torch.where(going_B, entropy_B, 0.0)
        stopping_B = going_B & torch.isin(token_B, stops)
        length_S[live_B[stopping_B]] = t + 1
        ended_S[live_B[stopping_B]] = True
        going_B &= ~stopping_B
        left = int(going_B.sum())
        if left == 0 or t + 1 == longest:
            break
        if decoder.thins and len(live_B) - left >= SHRINK * len(live_B):
            rows_B = going_B.nonzero()[:, 0]
            decoder.keep(rows_B)
            live_B, token_B = live_B[rows_B], token_B[rows_B]
        logits_BV = decoder.step(token_B)
    rows = iter(
        zip(
            ids_ST.cpu().numpy().astype(np.int32),
            *(length_S.tolist(), ended_S.tolist(), entropy_S.tolist()),
            strict=True,
        )
    )
    return [
        [Completion(ids[:n].copy(), end, entropy) for ids, n, end, entropy in (next(rows) for _ in group)]
        for group in names
    ]


def draw(logits_BV: Tensor, u_B: Tensor | None, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(the next token of each row, the entropy of what it was drawn from in nats): the inverse of the summed
    probabilities at one uniform number a row, or the likeliest token where there is none.
    """
    if u_B is None:
        return logits_BV.argmax(1), logits_BV.new_zeros(len(logits_BV))
    rows = len(logits_BV) if logits_BV.is_cuda else max(1, IN_CACHE // logits_BV.shape[1])
    parts = [_draw(z, u, sampling) for z, u in zip(logits_BV.split(rows), u_B.split(rows), strict=True)]
    return torch.cat([token for token, _ in parts]), torch.cat([entropy for _, entropy in parts])


def _draw(logits_BV: Tensor, u_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    z_BV = (logits_BV - logits_BV.amax(1, keepdim=True)).mul_(1.0 / sampling.temperature)
    p_BV = z_BV.exp()  # as yet without their common factor
    total_B = p_BV.sum(1)
    entropy_B = total_B.log() - torch.linalg.vecdot(p_BV, z_BV) / total_B
    if sampling.top_p == 1.0:
        return _inverse(p_BV, u_B), entropy_B
    sorted_BV, order_BV = p_BV.sort(dim=1, descending=True, stable=True)
    before_BV = sorted_BV.cumsum(1) - sorted_BV
    inside_BV = before_BV < sampling.top_p * total_B[:, None]  # the likeliest token always is
    return order_BV.gather(1, _inverse(torch.where(inside_BV, sorted_BV, 0.0), u_B)[:, None])[:, 0], entropy_B


def _inverse(p_BV: Tensor, u_B: Tensor) -> Tensor:
    """The token at which the summed probability first exceeds u times the whole: one uniform number draws a token.

    Found among sums of blocks, then within one: a running sum over the whole vocabulary would be slower, and rounded
    more coarsely.
    """
    p_BMN = F.pad(p_BV, (0, -p_BV.shape[1] % BLOCK)).view(len(p_BV), -1, BLOCK)
    summed_BM = p_BMN.sum(2).cumsum(1)
    u_B1 = u_B.to(p_BV.dtype).clamp_max_(1.0 - 2.0**-23)[:, None]  # so that u times the whole stays below the whole
    goal_B1 = u_B1 * summed_BM[:, -1:]
    block_B1 = torch.searchsorted(summed_BM, goal_B1, right=True)
    before_B1 = F.pad(summed_BM, (1, 0)).gather(1, block_B1)
    summed_BN = p_BMN[torch.arange(len(p_BV), device=p_BV.device), block_B1[:, 0]].cumsum(1)
    # What is left of the goal may, by rounding, be no less than the block's sum: then it is the block's last token.
    within_B1 = torch.searchsorted(summed_BN, goal_B1 - before_B1, right=True)
    last_B1 = (summed_BN < summed_BN[:, -1:]).sum(1, keepdim=True)  # the first that reaches the block's sum
    return (block_B1 * BLOCK + torch.minimum(within_B1, last_B1))[:, 0]
