"""Decoder layers compiled by torch, one code for all of them and for each of a few static lengths, or for any length.

Only the layer is compiled, not the model: attention, LoRA projections, gated MLPs and experts are nodes
(kernels/nodes.py), and what is left between them (rotations, norms, residual sums, type changes) is fused. Compiled
code is proven on the model in hand before it is used: same hidden states and same gradients as without it.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from welltuned.kernels.ledger import ledger_of
from welltuned.kernels.lora import Rows
from welltuned.models.experts import LoraExperts, NF4Experts
from welltuned.models.frozen import NF4Linear
from welltuned.models.full import FullParameters
from welltuned.models.fuse import Fused, fused_mlp_of
from welltuned.models.lora import AdapterBank, LoraLinear, shared_rows
from welltuned.models.packed import UNCOMPILED, Packed, hidden_states, packed_model, packs
from welltuned.models.parts import decoder_layers
from welltuned.models.static import Static, set_static

LAYER = "compiled layer"
BACKEND = "inductor"
KINDS = 4  # kinds of layers that a model may have (windows, norms, mixtures): each is compiled for each length
_DROPPED = ("packed_lengths", "packed_branches", "packed_seen")  # numbers in Python, which the ledger holds
_NEAR = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@dataclass(frozen=True, slots=True)
class WarmUp:
    """How compiling went.

    Attributes:
        seconds: until everything was compiled and proven. graphs: pieces of code, a length and kind of layer each.
        lengths: what it is compiled for; none where it is for any.
        error: largest difference of hidden states and gradients, of their length.
        problem: why the layers run as without it; None where they are compiled.
    """

    seconds: float
    lengths: tuple[int, ...]
    graphs: int
    error: float | None
    problem: str | None = None


def compile_layers(model: PreTrainedModel, fused: Fused) -> Static:
    """Let the decoder layers run compiled once `warm_up` has given them lengths; before that nothing changes."""
    static, rows = Static(), shared_rows(model)
    reason = refusal(model)
    if reason is not None:
        static.give_up(reason)
        return static
    layers, compiled = decoder_layers(model), {}
    for layer in layers:
        for module in layer.modules():
            mlp = fused_mlp_of(module)
            if isinstance(module, (LoraLinear, LoraExperts, NF4Linear, NF4Experts)):
                module.as_node()
            elif mlp is not None:
                mlp.as_node()
        kind = type(layer)
        if kind not in compiled:
            backend = partial(_counted, static)
            compiled[kind] = torch.compile(kind.forward, backend=backend, dynamic=False, fullgraph=True)
        fused.replace(layer, partial(_layer, static, rows, layer, compiled[kind], layer.forward), LAYER)
    set_static(model, static)
    return static


def refusal(model: PreTrainedModel) -> str | None:
    """Why this model's layers cannot be compiled, as far as that shows without trying."""
    layers = decoder_layers(model)
    if not layers:
        return "no list of decoder layers was found"
    if any("forward" in layer.__dict__ for layer in layers):
        return "its decoder layers run in another way already"
    if not packs(model):
        return "its examples run one at a time"
    if any(isinstance(m, LoraLinear) and m.magnitude_KO is not None for m in model.modules()):
        return "DoRA takes the norms of its rows anew in each pass"
    return None


def _counted(static: Static, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    from torch._dynamo import lookup_backend

    static.graphs += 1
    compiled: Callable[..., Any] = lookup_backend(BACKEND)(graph, inputs)
    return compiled


def _layer(
    static: Static, rows: Rows, layer: nn.Module, compiled: Callable[..., Any], plain: Callable[..., Any],
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """A layer's forward: compiled where its rows have a static length and something flows back through it.

    The first layer on a frozen embedding has nothing to give back, which would be another code: it runs as it is.
    """
    ledger = kwargs.get("packed_ledger")
    hidden = args[0] if args else kwargs["hidden_states"]
    if ledger is None or not hidden.requires_grad or not torch.is_grad_enabled():
        return plain(*args, **kwargs)
    noted = static.noted  # layers of one micro-batch share it
    if noted is None or noted[0] is not rows.per_adapter or noted[1] is not rows.dropout:
        noted = static.noted = rows.per_adapter, rows.dropout, _dynamic(ledger_of(rows))
    rows.ledger = noted[2]
    seen = kwargs["packed_seen"]
    known: dict[str, Any] = {name: value for name, value in kwargs.items() if name not in _DROPPED}
    _dynamic(ledger)
    if static.any_length:
        for value in (hidden, *args[1:], *known.values()):
            _any_length(value, hidden.shape[1])
    if on_gpu(hidden):
        for bounds in (seen.query_B, seen.key_B, *(() if seen.rows_K is None else (seen.rows_K,))):
            _dynamic(bounds)
        known["packed_seen"] = replace(seen, longest=(static.longest, static.longest), whole=None)
    try:
        return compiled(layer, *args, **known)
    finally:
        rows.ledger = None


def _any_length(value: Any, rows: int) -> None:
    """[1, rows, ...] with a number of rows that is no part of the compiled code; also within tuples (rotations)."""
    if isinstance(value, tuple):
        for inner in value:
            _any_length(inner, rows)
    elif isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == rows:
        torch._dynamo.mark_dynamic(value, 1)


def on_gpu(hidden: Tensor) -> bool:
    """Whether attention takes its bounds on the device, and not from the ledger."""
    return hidden.is_cuda


def _dynamic(t: Tensor) -> Tensor:
    """A tensor whose length is no part of the compiled code."""
    torch._dynamo.mark_dynamic(t, 0)
    return t


def warm_up(
    model: PreTrainedModel,
    trained: AdapterBank | FullParameters,
    static: Static,
    lengths: Sequence[int],
    longest: int,
    *,
    any_length: bool = False,
) -> WarmUp:
    """Compile for each length, or once for all, and compare hidden states and gradients with those of plain layers.

    Adapters are given random numbers for it, since the half of a new one has no gradient; all is then as it was.
    What goes wrong, whatever it is, leaves the layers as they are without.
    """
    if static.problem is not None:
        return WarmUp(0.0, (), 0, None, static.problem)
    started, error = time.perf_counter(), math.nan
    try:
        _allow(KINDS * (len(lengths) + 1))
        with _random_adapters(trained), packed_model(model):
            error = max(_difference(model, trained, static, n, longest, any_length) for n in lengths)
    except Exception as problem:  # a compiler's faults are of every kind
        static.give_up(f"compiling failed ({_reason(problem)})")
    near = _NEAR[model.dtype]
    if static.problem is None and not error <= near:
        static.give_up(f"compiled layers give other numbers: {error:.1e} of their length apart, where {near:g} may be")
    codes = 1 if any_length else len(lengths)
    if static.problem is None and static.graphs > KINDS * codes:
        static.give_up(f"its layers were compiled {static.graphs} times, where {KINDS * codes} would be many")
    static.any_length = any_length and static.problem is None
    static.lengths = () if any_length or static.problem is not None else tuple(lengths)
    static.longest, static.most, static.tokens, static.padding = longest, static.graphs, 0, 0
    known = None if math.isnan(error) else error
    chosen = () if any_length else tuple(lengths)
    return WarmUp(time.perf_counter() - started, chosen, static.graphs, known, static.problem)


def _difference(
    model: PreTrainedModel,
    trained: AdapterBank | FullParameters,
    static: Static,
    length: int,
    longest: int,
    any_length: bool,
) -> float:
    """How far compiled and plain layers are apart on random rows that almost fill the length."""
    generator = torch.Generator().manual_seed(length)
    total = max(2, length - 1)
    most = min(longest, -(-total // 3))  # several rows, which must not see each other
    lengths = [most] * (total // most) + [total % most] * (total % most > 0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids_N = torch.randint(vocabulary, (total,), generator=generator).to(model.device)
    weight_NH = torch.randn(total, 1, generator=generator).to(model.device)
    found = []
    static.longest = longest
    for use in (False, True):
        static.lengths, static.any_length = (length,) if use else (), use and any_length
        trained.use_rows(None, tuple((n, i) for i, n in enumerate(lengths)))
        trained.grad_KP.zero_()
        out_NH = hidden_states(model, Packed(ids_N, lengths))
        (out_NH.float() * weight_NH).sum().backward()
        found.append((out_NH.detach(), trained.grad_KP.clone()))
    (plain_NH, plain_KP), (out_NH, grad_KP) = found
    return max(_apart(out_NH, plain_NH), _apart(grad_KP, plain_KP))


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).float().norm() / b.float().norm().clamp_min(1e-30))


@contextmanager
def _random_adapters(trained: AdapterBank | FullParameters) -> Iterator[None]:
    """Within the block adapters do something; weights, gradients and rows are as they were after it."""
    before_KP = trained.flat_KP.detach().clone()
    try:
        if isinstance(trained, AdapterBank):
            generator = torch.Generator(device=before_KP.device).manual_seed(0)
            trained.flat_KP.add_(torch.empty_like(before_KP).normal_(0.0, 0.02, generator=generator))
        yield
    finally:
        trained.flat_KP.copy_(before_KP)
        trained.grad_KP.zero_()
        trained.no_dropout()


def _allow(codes: int) -> None:
    """Let torch keep so many codes of one function in this process, which else gives up after eight."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, codes)


def _reason(error: BaseException) -> str:
    """In a line: what our own code refused, else the first of what the compiler says."""
    if UNCOMPILED in str(error):
        return UNCOMPILED
    if isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
        error = error.inner_exception
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
