"""What the GPU benchmark compares: one random model, and the two systems that train adapters on it.

A system is a context manager that puts adapters on the model, yields something to run updates with, and leaves the
model as it was, so that systems take turns on the same weights.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import peft
import torch
from gpu_scale import RANK
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from welltuned.data.render import Example
from welltuned.kernels.nf4 import NF4Weight
from welltuned.models.compiled import WarmUp, compile_layers, warm_up
from welltuned.models.four_bit import forget_dense, make_room
from welltuned.models.frozen import NF4Linear
from welltuned.models.fuse import find_head, fuse
from welltuned.models.lora import LoraSettings, attach
from welltuned.models.packed import packed_model
from welltuned.models.recompute import HostCheckpoints, checkpoint_layers
from welltuned.models.static import MULTIPLE
from welltuned.training.optimizer import AdamWSettings, FlatAdamW, clip_
from welltuned.training.step import Engine, accumulate_gradient

ALPHA = 32
LEARNING_RATE, MAX_NORM = 1e-4, 1.0


@dataclass(frozen=True, slots=True)
class Running:
    """A system with its adapters on the model and its examples at hand.

    Attributes:
        gradient: from zero, the gradient of the mean loss over all supervised tokens; gives that loss.
        gradient_of: the same of other examples.
        step: clip the gradient and let AdamW make one update.
        adapter, grads: the adapter's tensors and gradients by name ("model.layers.0.mlp.up_proj.lora_A").
    """

    gradient: Callable[[], float]
    step: Callable[[], None]
    adapter: dict[str, Tensor]
    grads: Callable[[], dict[str, Tensor]]
    gradient_of: Callable[[Sequence[Example]], float]

    def update(self) -> float:
        loss = self.gradient()
        self.step()
        return loss


def build_model(shape: dict[str, Any], dtype: torch.dtype, device: str, *, nf4: bool, seed: int = 0) -> PreTrainedModel:
    """A Llama of random weights, filled on the device module by module: the host never holds any of it.

    Zeros would be quicker to make, but products of zeros run faster too. With `nf4` each projection is quantised as
    soon as it is filled, so that no more than one is ever dense.
    """
    config = LlamaConfig(**shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.requires_grad_(False)
    head, generator = model.get_output_embeddings(), torch.Generator(device).manual_seed(seed)
    for parent in list(model.modules()):
        for leaf, module in list(parent.named_children()):
            _fill(module, device, generator)
            if nf4 and isinstance(module, nn.Linear) and module is not head:
                parent.register_module(leaf, NF4Linear(NF4Weight.quantize(module.weight), None))
    rotary = model.base_model.rotary_emb  # computed, not drawn: its frequencies are lost on the meta device
    model.base_model.rotary_emb = type(rotary)(config).to(device)
    return model.eval()


def _fill(module: nn.Module, device: str, generator: torch.Generator) -> None:
    """Draw the module's own parameters: matrices so that outputs have about unit variance, gains around 1."""
    module.to_empty(device=device, recurse=False)
    for p in module.parameters(recurse=False):
        if p.dim() == 1:
            p.data.normal_(1.0, 0.1, generator=generator)
        else:
            p.data.normal_(0.0, p.shape[-1] ** -0.5, generator=generator)


def dense_copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights, dequantised where they were quantised, in another precision."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for leaf, module in list(parent.named_children()):
            if isinstance(module, NF4Linear):
                linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                linear.weight = nn.Parameter(module.frozen.dense(model.dtype), requires_grad=False)
                parent.register_module(leaf, linear)
    return twin.to(dtype=dtype)


@contextmanager
def engine(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    checkpointing: bool = False,
    budget: int,
    rate: float = LEARNING_RATE,
    rank: int = RANK,
    offload: bool = False,
    dense_base: bool = False,
    compiled: tuple[int, ...] = (),
    warmed: Callable[[WarmUp], None] = lambda _: None,
) -> Iterator[Running]:
    """welltuned: packed rows, fused projections, gated MLPs and norms, loss on labelled rows only, flat AdamW.

    Args:
        offload: what goes into checkpointed layers waits on the host. dense_base: 4-bit weights are expanded once.
        compiled: lengths of packed rows that the layers are compiled for; `warmed` is told how that went.
    """
    with ExitStack() as undo:
        undo.callback(forget_dense, model)
        make_room(model, dense=dense_base)
        bank = attach(model, LoraSettings(r=rank, lora_alpha=ALPHA))
        undo.callback(bank.detach)
        fused = fuse(model, bank)
        undo.callback(fused.undo)
        head = find_head(model)
        if head is None or fused.plain:
            raise RuntimeError(f"parts of a plain Llama were not fused: {fused.sentences()}, head {head}")
        static = compile_layers(model, fused) if compiled else None
        if checkpointing:
            checkpoint_layers(model, fused, host=HostCheckpoints(model.device) if offload else None)
        optimizer = FlatAdamW(bank.flat_KP, bank.grad_KP, bank.decayed, AdamWSettings())
        ready = Engine(model=model, trained=bank, head=head, token_budget=budget)

        def gradient_of(rows: Sequence[Example]) -> float:
            optimizer.zero_grad()
            return accumulate_gradient(ready, rows, range(len(rows))).loss

        def step() -> None:
            clip_(bank.grad_KP, MAX_NORM)
            optimizer.step([rate])

        def grads() -> dict[str, Tensor]:
            return {s.name: bank.grad_KP[0, s.start : s.start + s.size].view(s.shape) for s in bank.slots}

        if static is not None:
            longest = max(len(e.ids) for e in examples)
            warmed(warm_up(model, bank, static, compiled, -(-longest // MULTIPLE) * MULTIPLE))
        undo.enter_context(packed_model(model))
        yield Running(partial(gradient_of, examples), step, bank.tensors(), grads, gradient_of)


@contextmanager
def peft_sdpa(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    adapters: torch.dtype,
    checkpointing: bool = False,
    budget: int,
    backend: SDPBackend | None = None,
    rate: float = LEARNING_RATE,
    rank: int = RANK,
) -> Iterator[Running]:
    """Plain transformers + PEFT at its best: bf16 base, no autocast, flash attention without a mask, fused AdamW.

    Its rows are sorted by length, padded on the right (where causal attention needs no mask), and lie on the device
    before the clock starts. Non-reentrant checkpointing keeps no random state.
    """
    with _as_bitsandbytes(model), _preferring(backend):
        twin = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules="all-linear"))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        try:
            yield _peft_running(twin, adapters, examples, budget, rate)
        finally:
            twin.unload()
            model.gradient_checkpointing_disable()
            model.eval()


def _peft_running(
    twin: peft.PeftModel, adapters: torch.dtype, examples: Sequence[Example], budget: int, rate: float
) -> Running:
    trained = {_our_name(name): p for name, p in twin.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data = p.data.to(adapters)
    twin.train()  # transformers checkpoints in training mode only; nothing here has dropout
    optimizer = torch.optim.AdamW(trained.values(), lr=rate, weight_decay=0.0, fused=True)
    laid_out = _laid_out(examples, budget, twin.device)

    def gradient_of(rows: Sequence[Example]) -> float:
        return gradient(_laid_out(rows, budget, twin.device))

    def gradient(batches: list[tuple[Tensor, Tensor]]) -> float:
        labels = sum(int((wanted[:, 1:] != -100).sum()) for _, wanted in batches)
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for ids, wanted in batches:
            loss = twin(input_ids=ids, labels=wanted, num_items_in_batch=labels, use_cache=False).loss
            loss.backward()
            losses.append(loss.detach())
        return float(torch.stack(losses).sum())

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(trained.values(), MAX_NORM)
        optimizer.step()

    adapter = {name: p.data for name, p in trained.items()}
    grads = lambda: {name: p.grad for name, p in trained.items()}  # noqa: E731
    return Running(partial(gradient, laid_out), step, adapter, grads, gradient_of)


def _our_name(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".default.weight")


def _preferring(backend: SDPBackend | None) -> Any:
    """This kind of attention where it can be had, else the next best."""
    if backend is None:
        return nullcontext()
    rest = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel([backend, *(b for b in rest if b is not backend)], set_priority=True)


@contextmanager
def _as_bitsandbytes(model: PreTrainedModel) -> Iterator[None]:
    """Within the block bitsandbytes' own 4-bit layers, on the same codes, stand where ours stood."""
    ours = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    for name, module in ours.items():
        _put(model, name, _bitsandbytes_linear(module, model.dtype))
    model.is_loaded_in_4bit = bool(ours)  # how PEFT tells
    try:
        yield
    finally:
        for name, module in ours.items():
            _put(model, name, module)
        model.is_loaded_in_4bit = False


def _bitsandbytes_linear(ours: NF4Linear, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    linear = bnb.nn.Linear4bit(
        ours.in_features, ours.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    linear.weight = bnb.nn.Params4bit(
        ours.frozen.packed, quant_state=ours.frozen.state, quant_type="nf4", module=linear, bnb_quantized=True
    )
    linear.quant_state = ours.frozen.state
    return linear


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent).register_module(leaf, module)


def batches_of(examples: Sequence[Example], budget: int) -> list[list[Example]]:
    """Examples sorted by length and cut so that no batch, padding included, has more than `budget` tokens."""
    batches: list[list[Example]] = []
    for example in sorted(examples, key=lambda e: -len(e.ids)):
        if batches and len(batches[-1][0].ids) * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(example)
        else:
            batches.append([example])
    return batches


def _laid_out(examples: Sequence[Example], budget: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    return [_padded(rows, device) for rows in batches_of(examples, budget)]


def _padded(rows: list[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, labels) of one batch, padded on the right to its longest row."""
    ids = np.zeros((len(rows), len(rows[0].ids)), dtype=np.int64)
    labels = np.full_like(ids, -100)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
        labels[i, : len(row.ids)] = np.where(row.mask, row.ids, -100)
    return torch.from_numpy(ids).to(device), torch.from_numpy(labels).to(device)
