"""Completions from the model as it is now: batched, with a cache of keys and values, and a sampler of our own.

The model's own forward runs, with its adapters as they are, so no copy of the weights can be stale. A prompt is
computed once for all of its completions. Every completion has its own stream of random numbers, a function of its name:
which others are sampled beside it, and in how many batches, does not change what is drawn for it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from welltuned.kernels.lora import mixed
from welltuned.kernels.token_loss import Head
from welltuned.models.packed import ATTENTION, attending, packs

DECODING = "welltuned_decoding"
SHRINK = 0.25  # share of a batch's completions that have ended before they are taken out of it


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

    `entropy` is the sum over its tokens of the entropy of what each was drawn from, before top_p, in nats.
    """

    ids: NDArray[np.int32]
    ended: bool
    entropy: float


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
    parts = _parts([len(p) for p in prompts], names, sampling)
    with _decoding(model):
        for batch in _batches([len(prompts[i]) for i, _ in parts], [len(n) for _, n in parts], sampling, packs(model)):
            some = [parts[b] for b in batch]
            made = _Batch(model, head, [prompts[i] for i, _ in some], [n for _, n in some], sampling).run()
            for (index, _), completions in zip(some, made, strict=True):
                out[index] += completions
    return out


def _parts(
    lengths: Sequence[int], names: Sequence[Sequence[int]], sampling: Sampling
) -> list[tuple[int, Sequence[int]]]:
    """Each prompt's number with its names, in several parts where they are too many for one batch."""
    found = []
    for index, (length, all_names) in enumerate(zip(lengths, names, strict=True)):
        most = max(1, sampling.tokens_at_once // (length + sampling.max_new_tokens))
        found += [(index, all_names[start : start + most]) for start in range(0, len(all_names), most)]
    return found


def _batches(lengths: Sequence[int], counts: Sequence[int], sampling: Sampling, ragged: bool) -> list[list[int]]:
    """Prompts of like length together, so that little is padding; of equal length where the model takes no padding."""
    batches: list[list[int]] = []
    held = 0
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        tokens = counts[index] * (lengths[index] + sampling.max_new_tokens)
        unlike = bool(batches) and not ragged and lengths[batches[-1][0]] != lengths[index]
        if not batches or unlike or held + tokens > sampling.tokens_at_once:
            batches.append([])
            held = 0
        batches[-1].append(index)
        held += tokens
    return batches


# ── attention of new tokens over the cache ───────────────────────────────────────────────────────────────────────────


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention call: query [B, Q, n, D], key and value [B, G, m, D], out [B, n, Q, D].

    Queries that share keys are rows of one product: keys and values are not repeated for them. Windows are in the mask.
    """
    rows, heads, n, d = query.shape
    groups, m = key.shape[1:3]
    scale = d**-0.5 if scaling is None else scaling
    q = (query * scale).reshape(rows * groups, heads // groups * n, d)
    z = torch.bmm(q, key.reshape(rows * groups, m, d).transpose(1, 2)).view(rows, groups, heads // groups, n, m)
    if softcap is not None:
        z = z.div_(softcap).tanh_().mul_(softcap)
    if attention_mask is None and n > 1:  # transformers leaves it out where it is causal and nothing else
        attention_mask = torch.ones(n, m, dtype=torch.bool, device=z.device).tril_(m - n)[None, None]
    if attention_mask is not None:  # the same for all heads
        z.masked_fill_(
            ~attention_mask[:, :, None], torch.finfo(z.dtype).min
        )  # finite: padding sees nothing, and no NaN
    if s_aux is not None:
        sink = s_aux.to(z.dtype).view(1, groups, -1, 1, 1).expand(rows, -1, -1, n, 1)
        p = torch.cat([z, sink], -1).softmax(-1, dtype=torch.promote_types(z.dtype, torch.float32))[..., :-1]
    else:
        p = z.softmax(-1, dtype=torch.promote_types(z.dtype, torch.float32))
    out = torch.bmm(p.to(value.dtype).view(rows * groups, -1, m), value.reshape(rows * groups, m, -1))
    return out.view(rows, heads, n, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(DECODING, _attention)
AttentionMaskInterface.register(DECODING, sdpa_mask)


@contextmanager
def _decoding(model: PreTrainedModel) -> Iterator[None]:
    """Within the block a model that attends to packed rows attends to its cache; another one's attention is its own."""
    now = model.config._attn_implementation
    with attending(model, DECODING if now == ATTENTION else now):
        yield


# ── one batch ────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Batch:
    """Prompts padded on the left, so that all completions begin in one column."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: Head | None,
        prompts: Sequence[NDArray[np.int32]],
        names: Sequence[Sequence[int]],
        sampling: Sampling,
    ):
        self.model, self.head, self.sampling, self.prompts = model, head, sampling, prompts
        self.device = model.device
        self.counts = [len(n) for n in names]
        self.shares = packs(model)  # a cache that is keys and values alone can be repeated and thinned out
        if sampling.temperature > 0:
            drawn = torch.stack([uniforms(name, sampling.max_new_tokens) for group in names for name in group])
            self.uniform_ST = drawn.to(self.device)
        self.stops = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=self.device)

    def run(self) -> list[list[Completion]]:
        sequences, longest = sum(self.counts), self.sampling.max_new_tokens
        ids_ST = torch.zeros(sequences, longest, dtype=torch.int64, device=self.device)
        entropy_ST = torch.zeros(sequences, longest, dtype=torch.float32, device=self.device)
        length_S = torch.full((sequences,), longest, device=self.device)
        ended_S = torch.zeros(sequences, dtype=torch.bool, device=self.device)
        live_B = torch.arange(sequences, device=self.device)  # the sequence in each row of the batch
        cache, logits_BV, mask_BN = self._begin()
        for t in range(longest):
            done_B = ended_S[live_B]
            token_B, entropy_B = self._draw(logits_BV, live_B, t)
            ids_ST[live_B, t] = torch.where(done_B, 0, token_B)
            entropy_ST[live_B, t] = torch.where(done_B, 0.0, entropy_B)
            stopping_B = ~done_B & torch.isin(token_B, self.stops)
            length_S[live_B[stopping_B]] = t + 1
            ended_S[live_B[stopping_B]] = True
            keep_B = ~ended_S[live_B]
            left = int(keep_B.sum())
            if left == 0 or t + 1 == longest:
                break
            if self.shares and len(live_B) - left >= SHRINK * len(live_B):
                rows = keep_B.nonzero()[:, 0]
                cache.batch_select_indices(rows)
                live_B, token_B, mask_BN = live_B[rows], token_B[rows], mask_BN[rows]
            mask_BN = F.pad(mask_BN, (0, 1), value=1)
            logits_BV = self._logits(token_B[:, None], mask_BN, cache)
        return self._split(ids_ST.cpu(), length_S.tolist(), ended_S.tolist(), entropy_ST.sum(1).tolist())

    def _begin(self) -> tuple[DynamicCache, Tensor, Tensor]:
        """The prompts, each once where the cache can be repeated; (cache, logits of the first token, padding mask)."""
        width = max(len(p) for p in self.prompts)
        ids = torch.zeros(len(self.prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(self.prompts):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, width - len(prompt) :] = 1
        of_S = torch.repeat_interleave(torch.arange(len(self.prompts)), torch.tensor(self.counts)).to(self.device)
        ids, mask = ids.to(self.device), mask.to(self.device)
        if not self.shares:
            ids, mask = ids[of_S], mask[of_S]
        cache = DynamicCache(config=self.model.config)
        logits_PV = self._logits(ids, mask, cache)
        if self.shares and any(count > 1 for count in self.counts):
            cache.batch_select_indices(of_S)
            return cache, logits_PV[of_S], mask[of_S]
        return cache, logits_PV, mask

    def _logits(self, ids_BN: Tensor, mask_BN: Tensor, cache: DynamicCache) -> Tensor:
        """Logits of the token after the last of each row, in float32 or wider."""
        places_BN = (mask_BN.cumsum(1) - 1).clamp_min_(0)[:, -ids_BN.shape[1] :]
        arguments = {
            "input_ids": ids_BN,
            "attention_mask": mask_BN,
            "position_ids": places_BN,
            "past_key_values": cache,
            "use_cache": True,
        }
        if self.head is None:
            logits_BV = self.model(**arguments).logits[:, -1]
        else:
            logits_BV = self.head.logits(self.model.base_model(**arguments).last_hidden_state[:, -1])
        return logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))

    def _draw(self, logits_BV: Tensor, live_B: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """(the next token of each row, the entropy of what it was drawn from)."""
        sampling = self.sampling
        if sampling.temperature == 0:
            return logits_BV.argmax(1), logits_BV.new_zeros(len(logits_BV))
        log_p_BV = (logits_BV / sampling.temperature).log_softmax(1)
        p_BV = log_p_BV.exp()
        entropy_B = -torch.linalg.vecdot(p_BV, log_p_BV)
        u_B = self.uniform_ST[live_B, t]
        if sampling.top_p == 1.0:
            return _inverse(p_BV, u_B), entropy_B
        sorted_BV, order_BV = p_BV.sort(dim=1, descending=True, stable=True)
        before_BV = sorted_BV.cumsum(1) - sorted_BV
        sorted_BV = torch.where(before_BV < sampling.top_p, sorted_BV, 0.0)  # the likeliest token always stays
        return order_BV.gather(1, _inverse(sorted_BV, u_B)[:, None])[:, 0], entropy_B

    def _split(
        self, ids_ST: Tensor, lengths: list[int], ended: list[bool], entropies: list[float]
    ) -> list[list[Completion]]:
        rows = iter(zip(ids_ST.numpy().astype(np.int32), lengths, ended, entropies, strict=True))
        return [
            [Completion(ids[:n].copy(), end, entropy) for ids, n, end, entropy in (next(rows) for _ in range(count))]
            for count in self.counts
        ]


def _inverse(p_BV: Tensor, u_B: Tensor) -> Tensor:
    """The token at which the summed probability first exceeds u times the whole: one uniform number draws a token."""
    summed_BV = p_BV.cumsum(1)
    u_B1 = u_B.to(p_BV.dtype).clamp_max_(1.0 - 2.0**-23)[:, None]  # so that u times the whole stays below the whole
    return torch.searchsorted(summed_BV, u_B1 * summed_BV[:, -1:], right=True)[:, 0]
