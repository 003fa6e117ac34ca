"""One GPU: tokens per second and peak memory beside PEFT, TRL and Unsloth, as a share of the floor.

    PYTHONPATH=src python benchmarks/gpu_speed.py [--tune lora qlora] [--rank 16 64] [--minutes 9]
        [--trl-python ENV/bin/python] [--unsloth-python ENV/bin/python]
    PYTHONPATH=src python benchmarks/gpu_speed.py --toy       the same code at toy size on the CPU

Systems in this process take turns (A B C A B C), the largest micro-batch that fits each; the floor is the FLOPs that an
update needs at the rate of a large matrix product of the same minutes. TRL and Unsloth are child processes of the
pythons that are given (gpu_peers.py), without which their column says so. gpu.py runs a part of this beside its others.
"""

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from common import describe_machine
from gpu_parity import check_attention, fastest_kernel
from gpu_peers import Peers, peer_options
from gpu_scale import (
    FAILED,
    GPU,
    NO_TIME,
    RANK,
    Deadline,
    Scale,
    flops_per_token,
    free_memory,
    long_rows,
    matrix_ceiling,
    ragged_rows,
    sentence,
    short_rows,
    start,
    time_once,
    tunes_here,
    usual_options,
)
from gpu_systems import Running, build_model, engine, peft_sdpa
from torch.nn.attention import SDPBackend
from transformers import PreTrainedModel

from welltuned.data.render import Example
from welltuned.facts.machine import Device
from welltuned.training.process import memory_used

ROUNDS = 2
RANKS = (RANK, 64)
GOAL = 18_000  # tokens/s of LoRA at rank 16 and S = 4096 on an H200, where its floor is 23,200
PEER_SHARE = 0.5  # of the time that is left when a tune's own cells are done, if there are peers

System = Callable[..., AbstractContextManager[Running]]


@dataclass(slots=True, kw_only=True)
class Cell:
    """One system on one kind of rows.

    Attributes:
        tokens: real tokens of one update.
        budget: tokens of a micro-batch.
        loss: before the first update, where adapters add nothing yet: all systems must agree.
        seconds: of each timed update.
        problem: why there is no number, or none from the later rounds.
        flags: how another tool was set up.
    """

    tune: str
    rank: int
    rows: str
    checkpointing: bool
    system: str
    tokens: int
    flops_per_token: float
    budget: int | None = None
    loss: float | None = None
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    ceilings: list[float] = field(default_factory=list)
    problem: str | None = None
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / median(self.seconds)

    @property
    def floor(self) -> float:
        """Tokens/s if all the arithmetic ran at the rate of a large matrix product."""
        return median(self.ceilings) / self.flops_per_token

    @property
    def share_of_floor(self) -> float:
        return self.tokens_per_second / self.floor

    def to_json(self) -> dict[str, Any]:
        numbers: dict[str, float] = {"floor_tokens_per_second": self.floor} if self.ceilings else {}
        if self.seconds:
            numbers |= {"tokens_per_second": self.tokens_per_second, "share_of_floor": self.share_of_floor}
        return asdict(self) | numbers


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which groups of cells: every tune at every rank, without checkpointing and with it."""

    tunes: Sequence[str]
    ranks: Sequence[int]
    checkpointing: Sequence[bool]

    def groups(self, tune: str) -> Iterator[tuple[int, bool]]:
        """(rank, checkpointing) of one tune, what matters most first."""
        yield from ((rank, again) for again in self.checkpointing for rank in self.ranks)

    def visits(self, kernel: SDPBackend | None, kinds: int) -> int:
        several = ((tune, again) for tune in self.tunes for _, again in self.groups(tune))
        return sum(len(systems(kernel, tune, again)) for tune, again in several) * kinds * ROUNDS


def systems(kernel: SDPBackend | None, tune: str, checkpointing: bool) -> dict[str, System]:
    """What takes turns: the engine, its other way to make room, and PEFT."""
    other: dict[str, System] = {}
    if checkpointing:
        other["welltuned, inputs on the host"] = partial(engine, offload=True)
    elif tune == "qlora":
        other["welltuned, dense base"] = partial(engine, dense_base=True)
    return {
        "welltuned": engine,
        **other,
        "PEFT, adapters bf16": partial(peft_sdpa, adapters=torch.bfloat16, backend=kernel),
        "PEFT, adapters fp32": partial(peft_sdpa, adapters=torch.float32, backend=kernel),
    }


def rows_by_kind(scale: Scale) -> dict[str, list[Example]]:
    short = scale.long // 8
    return {f"S = {scale.long}": long_rows(scale), "ragged": ragged_rows(scale), f"S = {short}": short_rows(scale)}


def measure_speed(
    scale: Scale, wanted: Wanted, kernel: SDPBackend | None, deadline: Deadline, peers: Peers
) -> Iterator[list[Cell]]:
    """Groups of cells that are compared with each other, each as soon as it is measured; the main one comes first."""
    rows = rows_by_kind(scale)
    for at, tune in enumerate(wanted.tunes):
        model = build_model(scale.shape, scale.dtype, scale.device, nf4=tune == "qlora")
        own = deadline.left / (len(wanted.tunes) - at)
        after = deadline.left - own  # what the other tunes will have
        share = Deadline.after(own * (1 - PEER_SHARE * peers.given) / 60)
        clock = Clock(share, Wanted([tune], wanted.ranks, wanted.checkpointing).visits(kernel, len(rows)))
        for rank, again in wanted.groups(tune):
            for kind, examples in rows.items():
                cells = _group(scale, model, kernel, clock, tune, rank, again, kind, examples)
                peers.remember(cells)
                yield cells
        if peers.given:
            peers.save_model(scale, model if tune == "lora" else None)
        del model
        free_memory(scale)
        for done, rank in enumerate(wanted.ranks):
            cells = [_cell(scale, tune, rank, kind, False, "", e) for kind, e in rows.items()]
            left = (deadline.left - after) / (len(wanted.ranks) - done)
            yield from peers.measure(scale, tune, rank, rows, cells, left)


def _group(
    scale: Scale,
    model: PreTrainedModel,
    kernel: SDPBackend | None,
    clock: "Clock",
    tune: str,
    rank: int,
    again: bool,
    kind: str,
    examples: list[Example],
) -> list[Cell]:
    names = systems(kernel, tune, again)
    cells = [_cell(scale, tune, rank, kind, again, name, examples) for name in names]
    ways = [partial(system, model, examples, checkpointing=again, rank=rank) for system in names.values()]
    take_turns(scale, cells, ways, clock)
    return cells


def _cell(scale: Scale, tune: str, rank: int, kind: str, again: bool, name: str, examples: list[Example]) -> Cell:
    return Cell(
        tune=tune,
        rank=rank,
        rows=kind,
        checkpointing=again,
        system=name,
        tokens=sum(len(e.ids) for e in examples),
        flops_per_token=flops_per_token(scale.shape, examples, again, rank),
    )


@dataclass(slots=True)
class Clock:
    """Shares what is left of the time among the visits that are left."""

    deadline: Deadline
    visits: int

    def slice(self) -> float:
        self.visits -= 1
        return self.deadline.left / (self.visits + 1)


def take_turns(scale: Scale, cells: list[Cell], ways: Sequence[System], clock: Clock) -> None:
    """A B C A B C: what drifts, drifts for all."""
    for _ in range(ROUNDS):
        ceiling = matrix_ceiling(scale)
        for cell, way in zip(cells, ways, strict=True):
            cell.ceilings.append(ceiling)
            visit(scale, cell, way, clock.slice())


def visit(scale: Scale, cell: Cell, system: System, seconds: float) -> None:
    """Measure one system with the largest micro-batch that fits; whatever happens, the next one has its turn."""
    if seconds == 0.0:
        cell.problem = cell.problem or NO_TIME
        return
    for budget in scale.budgets if cell.budget is None else (cell.budget,):
        try:
            _time_updates(scale, cell, system(budget=budget), seconds)
            cell.budget, cell.problem = budget, None
        except torch.OutOfMemoryError:
            cell.problem = f"out of memory at {budget:,} tokens a micro-batch"
        except Exception as error:
            traceback.print_exc()
            cell.problem = f"{FAILED}: {sentence(error)}"
        free_memory(scale)
        if cell.problem is None or cell.problem.startswith(FAILED):
            return


def _time_updates(scale: Scale, cell: Cell, system: AbstractContextManager[Running], seconds: float) -> None:
    if scale.cuda:
        torch.cuda.reset_peak_memory_stats()
    started, times = time.perf_counter(), []
    with system as running:
        loss = running.update()  # warms up: allocator, library handles, the optimizer's state
        while not times or (len(times) < scale.updates and time.perf_counter() - started < seconds):
            times.append(time_once(running.update, scale))
    cell.loss = loss if cell.loss is None else cell.loss
    cell.seconds += times
    cell.peak_bytes = max(cell.peak_bytes, memory_used(Device(scale.device)).peak)


def losses_agree(cells: list[Cell]) -> bool:
    """Within a group all systems start from the same loss: parity at full size, to 1 %."""
    losses = [cell.loss for cell in cells if cell.loss is not None]
    return not losses or max(losses) - min(losses) < 0.01 * min(losses)


def sound(cells: Sequence[Cell]) -> bool:
    """Nothing of this process failed, and where losses are known they agree. Another tool's failure is its own."""
    ours = [cell for cell in cells if not cell.flags]
    return losses_agree(list(cells)) and not any((cell.problem or "").startswith(FAILED) for cell in ours)


def print_cells(cells: list[Cell], scale: Scale) -> None:
    first = cells[0]
    main = first.tune == "lora" and first.rank == RANK and first.rows == f"S = {GPU.long}" and not first.checkpointing
    print(f"\n{first.tune} r {first.rank}, {first.rows}, {'with' if first.checkpointing else 'without'} checkpointing")
    ceiling = f"ceiling {median(first.ceilings) / 1e12:.3g} TFLOP/s" if first.ceilings else "ceiling not measured"
    floor = f", floor {first.floor:,.0f} tokens/s" if first.ceilings else ""
    print(f"  {first.flops_per_token / 1e9:.3g} GFLOP a token, {ceiling}{floor}")
    for cell in cells:
        told = cell.problem or ""
        if cell.seconds:
            told = (
                f"{cell.tokens_per_second:10,.0f} tokens/s  {cell.share_of_floor:5.2f} of floor  "
                f"peak {cell.peak_bytes / 1e9:6.1f} GB  micro-batch {cell.budget:,}  {len(cell.seconds)} updates {told}"
            )
        print(f"  {cell.system:20} {told}")
    if scale is GPU and main:
        print(f"  {'goal on an H200':20} {GOAL:10,} tokens/s  (floor there 23,200)")
    if not losses_agree(cells):
        print(f"  THE LOSSES DIFFER: {[cell.loss for cell in cells]}")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    parser = usual_options(__doc__)
    parser.add_argument("--tune", nargs="+", choices=["lora", "qlora"], help="default: both")
    parser.add_argument("--rank", nargs="+", type=int, default=list(RANKS), help="default: 16 64")
    parser.add_argument("--checkpointing", choices=["off", "on", "both"], default="both")
    peer_options(parser)
    options = parser.parse_args(arguments)
    started = start("gpu-speed", options)
    scale, here = started.scale, tunes_here()
    tunes = [tune for tune in options.tune or here if tune in here]
    wanted = Wanted(tunes, options.rank, {"off": (False,), "on": (True,), "both": (False, True)}[options.checkpointing])
    result: dict[str, Any] = {"benchmark": "gpu-speed", "toy": not scale.cuda, "machine": describe_machine()}
    result |= {"layers": scale.shape["num_hidden_layers"], "ok": bool(tunes), "cells": []}
    kernel = fastest_kernel(check_attention(scale), scale)
    with Peers.of(options) as peers:
        for cells in measure_speed(scale, wanted, kernel, started.deadline, peers):
            print_cells(cells, scale)
            result["cells"] += [cell.to_json() for cell in cells]
            result["ok"] &= sound(cells)
            started.save(result)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
