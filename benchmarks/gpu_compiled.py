"""A part of the GPU benchmark: compiled decoder layers beside plain ones, and how long compiling takes.

Plain, compiled, plain: compiling takes longer than all updates here, so there is one visit of it. At toy size what was
traced is run as it is, since a CPU's compiler takes minutes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from gpu_scale import RANK, Deadline, Scale, flops_per_token, matrix_ceiling
from gpu_speed import Cell, losses_agree, rows_by_kind, visit
from gpu_systems import Running, engine
from transformers import PreTrainedModel

from welltuned.data.render import Example
from welltuned.models import compiled
from welltuned.models.compiled import WarmUp


def measure_compiled(scale: Scale, model: PreTrainedModel, tune: str, deadline: Deadline) -> dict[str, Any]:
    """Tokens a second both ways for long and for ragged rows; seconds of compiling, and how far apart numbers are."""
    rows = rows_by_kind(scale)
    kinds = {kind: rows[kind] for kind in (f"S = {scale.long}", "ragged")}
    groups = []
    with _backend(compiled.BACKEND if scale.cuda else "aot_eager"):
        for done, (kind, examples) in enumerate(kinds.items()):
            groups.append(_group(scale, model, tune, kind, examples, deadline.left / (len(kinds) - done)))
    return {"tune": tune, "rank": RANK, "groups": groups, "passed": all(group["ok"] for group in groups)}


@contextmanager
def _backend(name: str) -> Iterator[None]:
    before, compiled.BACKEND = compiled.BACKEND, name
    try:
        yield
    finally:
        compiled.BACKEND = before


def _group(
    scale: Scale, model: PreTrainedModel, tune: str, kind: str, examples: list[Example], left: float
) -> dict[str, Any]:
    torch._dynamo.reset()
    tokens, flops = sum(len(e.ids) for e in examples), flops_per_token(scale.shape, examples, False)
    plain, other = (
        Cell(tune=tune, rank=RANK, rows=kind, checkpointing=False, system=name, tokens=tokens, flops_per_token=flops)
        for name in ("plain", "compiled")
    )
    told: list[WarmUp] = []
    ways = {"plain": partial(engine, model, examples), "compiled": partial(_told, model, examples, told.append)}
    for cell in (plain, other, plain):
        cell.ceilings.append(matrix_ceiling(scale))
        visit(scale, cell, ways[cell.system], left / 3)
    group: dict[str, Any] = {"rows": kind, "cells": [plain.to_json(), other.to_json()]}
    group |= {"warm_up": asdict(told[0]) if told else None, "ok": losses_agree([plain, other])}
    if plain.seconds and other.seconds:
        group["gain"] = other.tokens_per_second / plain.tokens_per_second - 1
    return group


@contextmanager
def _told(
    model: PreTrainedModel, examples: Sequence[Example], tell: Callable[[WarmUp], None], *, budget: int
) -> Iterator[Running]:
    with engine(model, examples, budget=budget, compiled=True) as running:
        assert running.warm_up is not None
        tell(running.warm_up)
        yield running


def print_compiled(found: dict[str, Any]) -> None:
    print(f"\ncompiled layers, {found['tune']} r {found['rank']}")
    for group in found["groups"]:
        for cell in group["cells"]:
            told = f"{cell['tokens_per_second']:10,.0f} tokens/s" if cell["seconds"] else cell["problem"]
            print(f"  {group['rows']:10} {cell['system']:10} {told}  peak {cell['peak_bytes'] / 1e9:.1f} GB")
        warm = group["warm_up"]
        if warm is not None and "gain" in group:
            said = f"compiled in {warm['seconds']:.1f} s ({warm['graphs']} pieces), {warm['error']:.1e} apart"
            print(f"  {group['rows']:10} {group['gain']:+.1%} tokens a second; {said}")
    print(f"  losses {'agree' if found['passed'] else 'DIFFER'}", flush=True)
