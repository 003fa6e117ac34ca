"""A part of the GPU benchmark: K adapters in one bank against K runs of one, on the same frozen base.

Each adapter sees the same rows, at a rate of its own. In the bank a micro-batch holds equal parts of all of them, so
that the base's weights are read once for all, and adapters' products are batched ones.
"""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from gpu_parity import distance, settled
from gpu_scale import RANK, Deadline, Scale, flops_per_token, sentence
from gpu_speed import Cell, Clock, System, rows_by_kind, take_turns
from gpu_systems import ALPHA, LEARNING_RATE, MAX_NORM, Running, engine
from transformers import PreTrainedModel

from welltuned.data.render import Example
from welltuned.models.four_bit import forget_dense, make_room
from welltuned.models.fuse import find_head, fuse
from welltuned.models.lora import LoraSettings, attach
from welltuned.models.packed import packed_model
from welltuned.search.items import Share, SupervisedItems, gradients
from welltuned.training.optimizer import AdamWSettings, FlatAdamW, clip_
from welltuned.training.step import Engine

ADAPTERS = 4


@contextmanager
def bank_of(
    model: PreTrainedModel, examples: Sequence[Example], *, adapters: int, budget: int, rank: int = RANK, **_: Any
) -> Iterator[Running]:
    """As `engine`, for K adapters whose updates are made together; adapter 0 is the one that is shown."""
    with ExitStack() as undo:
        undo.callback(forget_dense, model)
        make_room(model, dense=False)
        bank = attach(model, [LoraSettings(r=rank, lora_alpha=ALPHA)] * adapters)
        undo.callback(bank.detach)
        fused = fuse(model, bank)
        undo.callback(fused.undo)
        optimizer = FlatAdamW(bank.flat_KP, bank.grad_KP, bank.decayed, AdamWSettings())
        bank.claim_gradients()
        ready = Engine(model=model, trained=bank, head=find_head(model), token_budget=budget)
        rates = [LEARNING_RATE * 2**k for k in range(adapters)]

        def gradient_of(rows: Sequence[Example]) -> float:
            optimizer.zero_grad()
            shares = [Share(k, rows, range(len(rows))) for k in range(adapters)]
            return gradients(ready, SupervisedItems(), shares)[0].loss

        def step() -> None:
            clip_(bank.grad_KP, MAX_NORM)
            optimizer.step(rates)

        def grads() -> dict[str, torch.Tensor]:
            return {s.name: bank.grad_KP[0, s.start : s.start + s.size].view(s.shape) for s in bank.slots}

        undo.enter_context(packed_model(model))
        yield Running(partial(gradient_of, examples), step, bank.tensors(), grads, gradient_of)


def measure_bank(scale: Scale, model: PreTrainedModel, tune: str, deadline: Deadline) -> dict[str, Any]:
    """Tokens of all adapters a second, both ways, and how far apart an adapter's gradient is."""
    rows = rows_by_kind(scale)
    kinds = {"ragged": rows["ragged"], f"S = {scale.long // 8}": rows[f"S = {scale.long // 8}"]}
    found: dict[str, Any] = {"tune": tune, "adapters": ADAPTERS, "rank": RANK, "cells": []}
    clock = Clock(deadline, 2 * 2 * len(kinds))
    for kind, examples in kinds.items():
        tokens = sum(len(e.ids) for e in examples)
        flops = flops_per_token(scale.shape, examples, False)
        shape = dict(tune=tune, rank=RANK, rows=kind, checkpointing=False, flops_per_token=flops)
        cells = [Cell(system="one run", tokens=tokens, **shape)]  # type: ignore[arg-type]
        cells += [Cell(system=f"bank of {ADAPTERS}", tokens=ADAPTERS * tokens, **shape)]  # type: ignore[arg-type]
        ways: list[System] = [partial(engine, model, examples), partial(bank_of, model, examples, adapters=ADAPTERS)]
        take_turns(scale, cells, ways, clock)
        gain = {}
        if all(cell.seconds for cell in cells):
            gain = {"speed_ratio": cells[1].tokens_per_second / cells[0].tokens_per_second}
        found["cells"].append({"rows": kind, **gain, "of": [cell.to_json() for cell in cells]})
    try:
        found["gradient_apart"] = _apart(model, kinds["ragged"], scale.budgets[-1])
    except Exception as error:  # the speeds are still worth writing
        traceback.print_exc()
        found["problem"] = sentence(error)
    limit = 1e-5 if scale.dtype is torch.float32 else 0.05  # rows are cut and summed in another order
    found["passed"] = found.get("gradient_apart", 1.0) < limit
    return found


def _apart(model: PreTrainedModel, examples: Sequence[Example], budget: int) -> float:
    """The bank's gradient of one adapter beside that of a run of one, with the same A and B."""
    made = []
    for way in (partial(engine, model, examples), partial(bank_of, model, examples, adapters=ADAPTERS)):
        with way(budget=budget) as running:
            settled(running.adapter)
            running.gradient()
            made.append(torch.cat([g.detach().double().flatten().cpu() for _, g in sorted(running.grads().items())]))
    return distance(made[1], made[0])


def print_bank(found: dict[str, Any]) -> None:
    print(f"\nbank of {found['adapters']} adapters, {found['tune']} r {found['rank']}")
    for group in found["cells"]:
        for cell in group["of"]:
            told = f"{cell['tokens_per_second']:10,.0f} tokens/s" if cell["seconds"] else cell["problem"]
            print(f"  {group['rows']:10} {cell['system']:12} {told}  peak {cell['peak_bytes'] / 1e9:.1f} GB")
        if "speed_ratio" in group:
            print(f"  {group['rows']:10} {group['speed_ratio']:.2f} times the tokens a second of one run after another")
    apart = found.get("gradient_apart")
    told = found.get("problem") if apart is None else f"an adapter's gradient is {apart:.1e} from its own run's"
    print(f"  {told}: {'passed' if found['passed'] else 'FAILED'}", flush=True)
