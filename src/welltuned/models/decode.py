"""The next token's logits of many sequences at once: prompts in one pass, then a token a sequence, from a cache.

Where a model runs on packed rows (`packs`), prompts lie end to end without padding, and each pass after them is one row
of new tokens. Keys and values of a prompt are there once for all of its sequences, those of its own for each; finished
sequences are taken out. Another model keeps its own attention and transformers' cache, a prompt a sequence.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from welltuned.kernels.attention import packed_attention, seen_by
from welltuned.kernels.token_loss import Head
from welltuned.models.packed import NotPackable, attending, packs

DECODING = "welltuned_decoding"
FIRST_ROOM = 32  # tokens that a cache has room for at first; then twice as many, and so on


class Decoder(Protocol):
    """One batch of sequences. Sequences are numbered in the order of their prompts."""

    thins: bool  # whether `keep` works

    def begin(self) -> Tensor:
        """The logits [B, V] after each sequence's prompt."""

    def step(self, token_B: Tensor) -> Tensor:
        """The logits [B, V] after one more token of each."""

    def keep(self, rows_B: Tensor) -> None:
        """Go on with these sequences alone (their places among those there are now, ascending)."""


@contextmanager
def decoding(model: PreTrainedModel) -> Iterator[None]:
    """Within the block a model that packs attends to our cache; another one's attention is its own."""
    with attending(model, DECODING if packs(model) else model.config._attn_implementation):
        yield


def new_decoder(
    model: PreTrainedModel,
    head: Head | None,
    prompts: Sequence[NDArray[np.int32]],
    counts: Sequence[int],
    longest: int,
) -> Decoder:
    """A decoder of `counts[p]` sequences a prompt, of at most `longest` tokens each; use it within `decoding`.

    Args:
        head: as in `Engine`; None where the model's own logits are used.
    """
    lengths = torch.tensor([len(p) for p in prompts], device=model.device)
    of = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(list(counts))).to(model.device)
    ids = [torch.from_numpy(p.astype(np.int64)).to(model.device) for p in prompts]
    if packs(model):
        return PackedDecoder(_Forward(model, head), ids, lengths, of, longest)
    return PlainDecoder(_Forward(model, head), torch.stack(ids)[of])


@dataclass(frozen=True, slots=True)
class _Forward:
    model: PreTrainedModel
    head: Head | None

    def __call__(self, rows: Tensor | slice, **arguments: Any) -> Tensor:
        """Logits of some places of the first row, or of all rows' last place; float32 or wider."""
        if self.head is None:
            out_BV: Tensor = _at(self.model(**arguments).logits, rows)
        else:
            out_BV = self.head.logits(_at(self.model.base_model(**arguments).last_hidden_state, rows))
        return out_BV.to(torch.promote_types(out_BV.dtype, torch.float32))


def _at(out: Tensor, rows: Tensor | slice) -> Tensor:
    return out[0, rows] if isinstance(rows, Tensor) else out[rows, -1]


class PlainDecoder:
    """Prompts of one length, each as often as it has sequences; the model's own attention and transformers' cache."""

    thins = False

    def __init__(self, forward: _Forward, ids_BN: Tensor):
        self.forward, self.ids_BN = forward, ids_BN
        self.cache = DynamicCache(config=forward.model.config)
        self.length = 0

    def begin(self) -> Tensor:
        return self._run(self.ids_BN)

    def step(self, token_B: Tensor) -> Tensor:
        return self._run(token_B[:, None])

    def keep(self, rows_B: Tensor) -> None:
        raise NotImplementedError("a cache that is more than keys and values cannot be thinned out")

    def _run(self, ids_BN: Tensor) -> Tensor:
        self.length += ids_BN.shape[1]
        places_N = torch.arange(self.length - ids_BN.shape[1], self.length, device=ids_BN.device)
        return self.forward(
            slice(None),
            input_ids=ids_BN,
            attention_mask=ids_BN.new_ones(len(ids_BN), self.length),
            position_ids=places_N.expand(ids_BN.shape),
            past_key_values=self.cache,
            use_cache=True,
        )


# ── our own cache ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Layer:
    """Keys and values of one attention: of prompts [P, G, L, D], padded behind, and of sequences [B, G, T, D]."""

    prompt_k: Tensor
    prompt_v: Tensor
    own_k: Tensor
    own_v: Tensor


class PackedDecoder:
    """Attention calls are told apart by their order in a pass.

    Legend: B sequences, P prompts, C places a prompt has for sequences, L tokens of the longest prompt, t tokens before
    this one that are a sequence's own, Q and G query and key heads, D head dimension.
    """

    thins = True

    def __init__(self, forward: _Forward, ids: Sequence[Tensor], length_P: Tensor, of_B: Tensor, longest: int):
        self.forward, self.longest, self.length_P, self.of_B = forward, longest, length_P, of_B
        self.lengths = [len(i) for i in ids]
        self.ids_N = torch.cat(list(ids))
        self.seen = seen_by(self.lengths, None, self.ids_N.device)
        self.layers: list[_Layer] = []
        self.hidden: dict[int | None, Tensor | None] = {}
        self.at, self.t, self.room = 0, -1, min(FIRST_ROOM, longest)  # t is -1 in the prompts' pass
        ends_P = length_P.cumsum(0)
        self.last_P = ends_P - 1
        column_L = torch.arange(max(self.lengths), device=length_P.device)
        self.rows_PL = (ends_P - length_P)[:, None] + torch.minimum(column_L, length_P[:, None] - 1)
        self._place()

    def begin(self) -> Tensor:
        places_N = torch.cat([torch.arange(n) for n in self.lengths]).to(self.ids_N.device)
        return self._run(self.ids_N, places_N, self.last_P)[self.of_B]

    def step(self, token_B: Tensor) -> Tensor:
        self.t += 1
        if self.t == self.room:
            self._make_room()
        places_B = self.length_P[self.of_B] + self.t
        return self._run(token_B, places_B, torch.arange(len(token_B), device=token_B.device))

    def _run(self, ids_N: Tensor, places_N: Tensor, rows: Tensor) -> Tensor:
        self.at, self.hidden = 0, {}
        return self.forward(
            rows, input_ids=ids_N[None], position_ids=places_N[None], use_cache=False, welltuned_decoder=self
        )

    def keep(self, rows_B: Tensor) -> None:
        left_P, of_B = torch.unique(self.of_B[rows_B], return_inverse=True)
        self.of_B, self.length_P = of_B, self.length_P[left_P]
        for layer in self.layers:
            layer.own_k, layer.own_v = layer.own_k[rows_B], layer.own_v[rows_B]
            if len(left_P) < len(layer.prompt_k):
                layer.prompt_k, layer.prompt_v = layer.prompt_k[left_P], layer.prompt_v[left_P]
        self._place()

    def _place(self) -> None:
        """Where each sequence's queries lie among those of its prompt; None where they lie there as they come."""
        counts_P = torch.bincount(self.of_B, minlength=len(self.length_P))
        self.places = int(counts_P.max())
        first_P = counts_P.cumsum(0) - counts_P
        within_B = torch.arange(len(self.of_B), device=self.of_B.device) - first_P[self.of_B]
        whole = len(self.of_B) == self.places * len(counts_P)
        self.place_B = None if whole else self.of_B * self.places + within_B

    def _make_room(self) -> None:
        more = min(self.longest, 2 * self.room) - self.room
        for layer in self.layers:
            layer.own_k, layer.own_v = F.pad(layer.own_k, (0, 0, 0, more)), F.pad(layer.own_v, (0, 0, 0, more))
        self.room += more

    def attend(
        self,
        q_QND: Tensor,
        k_GND: Tensor,
        v_GND: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks_Q: Tensor | None,
    ) -> Tensor:
        """What one attention gives [N, Q, D]; what it is asked with is kept."""
        if self.t < 0:
            self.layers.append(self._remember(k_GND, v_GND))
            return packed_attention(q_QND, k_GND, v_GND, self.lengths, scale, window, softcap, sinks_Q, self.seen)
        layer = self.layers[self.at]
        self.at += 1
        layer.own_k[:, :, self.t], layer.own_v[:, :, self.t] = k_GND.transpose(0, 1), v_GND.transpose(0, 1)
        q_BQD = (q_QND * scale).transpose(0, 1)
        first = 0 if window is None else max(0, self.t + 1 - window)
        z_own = _products(q_BQD, layer.own_k[:, :, first : self.t + 1].transpose(2, 3))
        z_prompt = self._to_sequences(_products(self._to_prompts(q_BQD), layer.prompt_k.transpose(2, 3)))
        z_BQM = torch.cat([z_prompt, z_own], 2)
        if softcap is not None:
            z_BQM = z_BQM.div_(softcap).tanh_().mul_(softcap)
        hidden_BL = self._hidden(window)
        if hidden_BL is not None:
            z_BQM[:, :, : hidden_BL.shape[1]].masked_fill_(hidden_BL[:, None], torch.finfo(z_BQM.dtype).min)
        p_prompt, p_own = _softmax(z_BQM, sinks_Q).to(v_GND.dtype).split([z_prompt.shape[2], z_own.shape[2]], 2)
        out_BQD = self._to_sequences(_products(self._to_prompts(p_prompt), layer.prompt_v))
        return out_BQD.add_(_products(p_own, layer.own_v[:, :, first : self.t + 1]))

    def _remember(self, k_GND: Tensor, v_GND: Tensor) -> _Layer:
        k, v = (t[:, self.rows_PL].transpose(0, 1).contiguous() for t in (k_GND, v_GND))
        own = [t.new_empty(len(self.of_B), t.shape[1], self.room, t.shape[3]) for t in (k, v)]
        return _Layer(k, v, *own)

    def _to_prompts(self, rows_BQM: Tensor) -> Tensor:
        """[P, Q, C, M]: each prompt's sequences beside each other, zeros where there is none."""
        count, heads, width = rows_BQM.shape
        if self.place_B is not None:
            places = rows_BQM.new_zeros(len(self.length_P) * self.places, heads, width)
            rows_BQM = places.index_copy_(0, self.place_B, rows_BQM)
        return rows_BQM.reshape(len(self.length_P), self.places, heads, width).transpose(1, 2)

    def _to_sequences(self, out_PQCM: Tensor) -> Tensor:
        rows = out_PQCM.transpose(1, 2).reshape(-1, out_PQCM.shape[1], out_PQCM.shape[3])
        return rows if self.place_B is None else rows[self.place_B]

    def _hidden(self, window: int | None) -> Tensor | None:
        """[B, L] True where a prompt's column is padding, or out of the window; None where all are seen."""
        if window not in self.hidden:
            hidden_PL = torch.arange(self.rows_PL.shape[1], device=self.length_P.device) >= self.length_P[:, None]
            if window is not None:
                seen_P = self.length_P + self.t - window
                hidden_PL |= torch.arange(hidden_PL.shape[1], device=hidden_PL.device) <= seen_P[:, None]
            self.hidden[window] = hidden_PL[self.of_B] if bool(hidden_PL.any()) else None
        return self.hidden[window]


def _products(rows: Tensor, others: Tensor) -> Tensor:
    """rows [B, Q, M] or [P, Q, C, M] times others [., G, M, D]: heads that share a group are rows of one product."""
    batch, groups, inner, outer = others.shape
    flat = rows.reshape(batch * groups, -1, inner)
    return torch.bmm(flat, others.reshape(batch * groups, inner, outer)).view(*rows.shape[:-1], outer)


def _softmax(z_BQM: Tensor, sinks_Q: Tensor | None) -> Tensor:
    wide = torch.promote_types(z_BQM.dtype, torch.float32)
    if sinks_Q is None:
        return z_BQM.softmax(-1, dtype=wide)
    sink = sinks_Q.to(z_BQM.dtype)[None, :, None].expand(len(z_BQM), -1, 1)
    return torch.cat([z_BQM, sink], -1).softmax(-1, dtype=wide)[..., :-1]


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
    welltuned_decoder: PackedDecoder | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention call: [1, heads, N, D] in, [1, N, heads, D] out."""
    if welltuned_decoder is None:
        raise NotPackable(f"{DECODING} attention is for `complete`; use another one elsewhere")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = welltuned_decoder.attend(query[0], key[0], value[0], scale, sliding_window, softcap, s_aux)
    return out[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(DECODING, _attention)
AttentionMaskInterface.register(DECODING, _no_mask)
