"""Decoder layers that are run again in the backward pass, so that only what goes into them is kept; on the host, where
the device has no room for that either.

Whatever is chosen, numbers stay the same to the last bit: a layer that runs again does what it did (dropout masks are
functions of the example), and what lies on the host comes back in the bytes that it left in.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from welltuned.errors import InputError
from welltuned.kernels.lora import Rows
from welltuned.models.fuse import Fused
from welltuned.models.lora import shared_rows
from welltuned.models.parts import require_layers


def checkpoint_layers(
    model: PreTrainedModel, fused: Fused, layers: int | None = None, host: "HostCheckpoints | None" = None
) -> int:
    """Recompute the first `layers` decoder layers (None: all) instead of keeping their activations; how many.

    The first: when their turn comes in the backward pass, what the others kept is gone, and a layer's activations find
    room without raising the peak.

    Args:
        host: keep what goes into them there, instead of on the device.
    """
    found = require_layers(model, "gradient_checkpointing")
    chosen = found[: len(found) if layers is None else layers]
    for layer in chosen:
        again = partial(
            checkpoint,
            use_reentrant=False,
            preserve_rng_state=False,  # dropout masks are functions of the example
            context_fn=partial(_rows_again, shared_rows(layer)),
        )
        run: Callable[..., Any] = layer.forward
        forward = partial(again, run) if host is None else partial(_offloaded, host, again, run)
        fused.replace(layer, forward, "checkpointed layer")
    return len(chosen)


@dataclass(slots=True)
class _RowsAgain:
    """While a layer runs a second time, the rows are those of its first run, whatever has been set since."""

    rows: Rows
    first: Rows
    now: Rows = field(default_factory=Rows)

    def __enter__(self) -> None:
        self.now = Rows(self.rows.per_adapter, self.rows.dropout)
        self.rows.per_adapter, self.rows.dropout = self.first.per_adapter, self.first.dropout

    def __exit__(self, *_: object) -> None:
        self.rows.per_adapter, self.rows.dropout = self.now.per_adapter, self.now.dropout


def _rows_again(rows: Rows) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _RowsAgain(rows, Rows(rows.per_adapter, rows.dropout))


# ── on the host ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _offloaded(
    host: "HostCheckpoints", again: Callable[..., Any], run: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """A checkpointed layer whose hidden states, its first argument, wait on the host."""
    if not torch.is_grad_enabled():
        return run(*args, **kwargs)
    hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
    before = host.moved

    def leave(t: Tensor) -> "Tensor | Ticket":
        same = t.data_ptr() == hidden.data_ptr() and t.shape == hidden.shape
        return host.put(t) if same else t  # positions and rotations are every layer's: they stay

    with saved_tensors_hooks(leave, host.take):  # the layer's own tensors are the checkpoint's matter
        out = again(run, hidden, *rest, **kwargs)
    if host.moved == before:
        raise InputError(
            f"torch {torch.__version__} keeps what goes into a checkpointed layer where it is",
            where="offload_checkpoints",
            mend="set it to false",
        )
    return out


@dataclass(slots=True, weakref_slot=True, eq=False)
class Ticket:
    """One tensor on the host; its buffer goes back to the pool when nobody can ask for it any more."""

    host: Tensor
    like: Tensor  # no memory: shape and dtype
    pool: list[Tensor]
    fetched: Tensor | None = None
    arrived: Any = None

    def __del__(self) -> None:
        self.pool.append(self.host)


class HostCheckpoints:
    """Tensors that wait in pinned host memory, copied beside the computation: the next to be asked for is on its way
    while the one before is used.

    Both directions share one stream of copies, so a buffer is not written before it has been read.

    Attributes:
        moved: how many tensors were put here; `peak_bytes`: of all buffers.
    """

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool: list[Tensor] = []
        self._waiting: list[ReferenceType[Ticket]] = []  # in the order in which they came
        self.moved, self.peak_bytes = 0, 0

    def put(self, t: Tensor) -> Ticket:
        self.moved += 1
        flat = self._buffer(t)
        ticket = Ticket(flat, torch.empty_like(t, device="meta"), self._pool)
        place = flat[: t.numel()].view(t.shape)
        if self._stream is None:
            place.copy_(t)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                place.copy_(t, non_blocking=True)
            t.record_stream(self._stream)  # its memory is free for others only after the copy
        self._waiting = [*(kept for kept in self._waiting if kept() is not None), ref(ticket)]
        return ticket

    def take(self, kept: "Ticket | Tensor") -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if kept.fetched is None:
            self._fetch(kept)
        while self._waiting and self._waiting.pop()() is not kept:
            pass
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(kept.arrived)
            following = self._waiting[-1]() if self._waiting else None
            if following is not None:
                self._fetch(following)
        back, kept.fetched = kept.fetched, None
        assert back is not None
        return back

    def _fetch(self, ticket: Ticket) -> None:
        """Begin to copy it back."""
        ticket.fetched = torch.empty_like(ticket.like, device=self._device)
        place = ticket.host[: ticket.like.numel()].view(ticket.like.shape)
        if self._stream is None:
            ticket.fetched.copy_(place)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # who had this memory before may still write
        with torch.cuda.stream(self._stream):
            ticket.fetched.copy_(place, non_blocking=True)
            ticket.arrived = self._stream.record_event()
        ticket.fetched.record_stream(self._stream)

    def _buffer(self, t: Tensor) -> Tensor:
        """A free buffer that is large enough, or a new one in the place of a free one that is not."""
        fitting = [i for i, b in enumerate(self._pool) if b.dtype == t.dtype and b.numel() >= t.numel()]
        if fitting:
            return self._pool.pop(fitting[0])
        if self._pool:
            old = self._pool.pop()
            self.peak_bytes -= old.numel() * old.element_size()
        new = torch.empty(t.numel(), dtype=t.dtype, pin_memory=self._stream is not None)
        self.peak_bytes += new.numel() * new.element_size()
        return new
