"""Part 3 of the GPU benchmark: how fast, in turns, and how far from the floor?"""

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from gpu_scale import (
    Scale,
    flops_per_token,
    free_memory,
    long_rows,
    matrix_ceiling,
    ragged_rows,
    sentence,
    short_rows,
    time_once,
)
from gpu_systems import Running, build_model, engine, peft_sdpa
from torch.nn.attention import SDPBackend

from welltuned.facts.machine import Device
from welltuned.training.process import memory_used

ROUNDS = 2
NO_TIME, FAILED = "no time left", "failed"

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
    """

    tune: str
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


@dataclass(slots=True)
class Clock:
    """Shares what is left of the time among the visits that are left."""

    deadline: float
    visits: int

    def slice(self) -> float:
        left = self.deadline - time.perf_counter()
        self.visits -= 1
        return max(0.0, left / (self.visits + 1))


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


def measure_speed(scale: Scale, tunes: list[str], kernel: SDPBackend | None, deadline: float) -> Iterator[list[Cell]]:
    """Groups of cells that are compared with each other, each as soon as it is measured; the main one comes first."""
    short = scale.long // 8
    rows = {f"S = {scale.long}": long_rows(scale), "ragged": ragged_rows(scale), f"S = {short}": short_rows(scale)}
    visits = sum(len(systems(kernel, t, c)) for t in tunes for c in (False, True)) * len(rows) * ROUNDS
    clock = Clock(deadline, visits)
    for tune in tunes:
        model = build_model(scale.shape, scale.dtype, scale.device, nf4=tune == "qlora")
        for checkpointing in (False, True):
            names = systems(kernel, tune, checkpointing)
            for kind, examples in rows.items():
                given: dict[str, Any] = dict(
                    tune=tune, rows=kind, checkpointing=checkpointing, tokens=sum(len(e.ids) for e in examples),
                    flops_per_token=flops_per_token(scale.shape, examples, checkpointing),
                )  # fmt: skip
                cells = [Cell(system=name, **given) for name in names]
                ways = [partial(s, model, examples, checkpointing=checkpointing) for s in names.values()]
                _take_turns(scale, cells, ways, clock)
                yield cells
        del model, ways
        free_memory(scale)


def _take_turns(scale: Scale, cells: list[Cell], ways: list[System], clock: Clock) -> None:
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
