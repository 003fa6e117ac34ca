"""One batch of 16 cut as 16x1, 8x2, 4x4, 2x8 and 1x16: the five loss curves, and the one that averages means.

    python benchmarks/accumulation.py [--updates 6]

SmolLM2-135M, LoRA r 16, fp32, on tickets of which 1 to 36 labels are trained.
The last curve is what trainers long did: each micro-batch's mean loss, averaged over micro-batches.
"""

import argparse
import json
import random
from collections.abc import Sequence
from importlib.resources import files

import numpy as np
import torch
from common import describe_machine, write_result

from welltuned.data.formats import to_conversations
from welltuned.data.render import Example, render_all
from welltuned.data.source import read_rows
from welltuned.facts.machine import Device
from welltuned.models.fuse import find_head, fuse
from welltuned.models.load import load_model, load_tokenizer
from welltuned.models.lora import LoraSettings, attach
from welltuned.models.packed import packed_model
from welltuned.models.resolve import DEMO_ALIAS
from welltuned.objectives.supervised import collate, loss, supervised_tokens
from welltuned.training.optimizer import AdamWSettings, FlatAdamW
from welltuned.training.process import allocator_keeps_memory
from welltuned.training.step import Engine, accumulate_gradient

BATCH, RATE = 16, 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=6)
    updates = parser.parse_args().updates
    rows = ragged_rows(updates * BATCH)
    curves: dict[str, list[float]] = {}
    with allocator_keeps_memory(Device.CPU):
        for size in (1, 2, 4, 8, 16):
            curves[f"{BATCH // size}x{size}"] = curve(rows, updates, size)
        curves["mean of means, 8x2"] = curve(rows, updates, 2, mean_of_means=True)
    straight = curves["1x16"]

    def apart(name: str) -> float:
        return max(abs(a - b) / b for a, b in zip(curves[name], straight, strict=True))

    difference = {name: apart(name) for name in curves}
    print(json.dumps({"curves": curves, "largest relative difference from 1x16": difference}, indent=1))
    print(
        write_result(
            "accumulation",
            {"machine": describe_machine(), "curves": curves, "largest_relative_difference_from_1x16": difference},
        )
    )


def ragged_rows(count: int) -> list[Example]:
    """Tickets of which the last 1, 3, 10 or all labels are trained, so that micro-batches differ in their number."""
    path = str(files("welltuned").joinpath("demo_data", "train.jsonl"))
    conversations = to_conversations(read_rows(path)[:count]).items
    examples = render_all(conversations, load_tokenizer(DEMO_ALIAS)).examples
    order = random.Random(0)
    return [shortened(e, order.choice((1, 3, 10, 1000))) for e in examples]


def shortened(example: Example, labels: int) -> Example:
    """The same example with only its last `labels` labels trained."""
    mask = np.zeros_like(example.mask)
    mask[np.flatnonzero(example.mask)[-labels:]] = True
    return Example(example.ids, mask, example.origin)


def curve(rows: Sequence[Example], updates: int, size: int, mean_of_means: bool = False) -> list[float]:
    """Loss of every update from the same start; the honest loss is reported also where means are averaged."""
    model = load_model(DEMO_ALIAS, dtype=torch.float32)
    bank = attach(model, LoraSettings(r=16, lora_alpha=16))
    fuse(model, bank)
    longest = max(len(e.ids) for e in rows)
    engine = Engine(model, bank, find_head(model), 1 if size == 1 else size * longest)
    optimizer = FlatAdamW(bank.flat_KP, bank.grad_KP, bank.decayed, AdamWSettings())
    losses = []
    with packed_model(model):
        for step in range(updates):
            batch = rows[step * BATCH : (step + 1) * BATCH]
            optimizer.zero_grad()
            if mean_of_means:
                losses.append(averaged_means(engine, batch, size))
            else:
                losses.append(accumulate_gradient(engine, batch, list(range(BATCH))).loss)
            optimizer.step([RATE])
    return losses


def averaged_means(engine: Engine, batch: Sequence[Example], size: int) -> float:
    """The fault: the gradient of the mean over micro-batches of their mean losses."""
    total = 0.0
    for start in range(0, BATCH, size):
        some = batch[start : start + size]
        made = collate(some)
        labels = sum(supervised_tokens(e) for e in some)
        weight_M = torch.full((labels,), size / BATCH / labels)
        value, nll_M = loss(engine.model, engine.head, made, weight_M)
        value.backward()
        total += float(nll_M.sum())
    return total / sum(supervised_tokens(e) for e in batch)


if __name__ == "__main__":
    main()
