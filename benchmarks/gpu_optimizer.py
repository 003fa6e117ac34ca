"""A part of the GPU benchmark: AdamW's update in fp32 and in 8 bits, compiled too, beside bitsandbytes' kernel.

By how many bytes an update moves it should take: 28 a number in fp32 (weight and two moments read and written, the
gradient read), 16 in 8 bits; plain torch moves more in 8 bits, since its pieces pass through memory between operations.
"""

import traceback
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from gpu_parity import distance
from gpu_scale import Scale, free_memory, sentence, time_median

from welltuned.kernels.adamw_8bit import BLOCK, CHUNK, Moment, Update, Workspace, adamw_8bit_, dynamic_map
from welltuned.training.optimizer import AdamWSettings, FlatAdamW
from welltuned.training.optimizer_8bit import FlatAdamW8bit

NUMBERS = {"cuda": 2**30, "cpu": 2**16}
USUAL = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)


def check_optimizer(scale: Scale) -> dict[str, Any]:
    """Seconds and bytes of state of each; of 8 bits how far one update is from bitsandbytes' on the same state."""
    n = NUMBERS[scale.device]
    found: dict[str, Any] = {"numbers": n, "ways": []}
    ways: dict[str, Callable[[int], Callable[[], None]]] = {
        "AdamW, fp32": partial(_flat, scale, FlatAdamW),
        "AdamW, 8 bits": partial(_flat, scale, FlatAdamW8bit),
    }
    if scale.cuda:
        ways["AdamW, 8 bits, compiled"] = partial(_compiled, scale)
        if find_spec("bitsandbytes") is not None:
            ways["bitsandbytes, 8 bits"] = partial(_bitsandbytes, scale)
    for name, make in ways.items():
        result: dict[str, Any] = {"way": name}
        try:
            result["seconds"] = time_median(make(n), scale)
            result["nanoseconds_a_number"] = 1e9 * result["seconds"] / n
        except Exception as error:
            traceback.print_exc()
            result["problem"] = sentence(error)
        found["ways"].append(result)
        free_memory(scale)
    found["passed"] = all("problem" not in way for way in found["ways"][:2])
    if scale.cuda and find_spec("bitsandbytes") is not None:
        found["beside_bitsandbytes"] = beside_bitsandbytes(scale)
        found["passed"] &= found["beside_bitsandbytes"]["passed"]
    return found


def _numbers(scale: Scale, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator(scale.device).manual_seed(0)
    made = (torch.randn(1, n, generator=draw, device=scale.device) for _ in range(2))
    weight_KP, grad_KP = made
    return weight_KP, grad_KP.mul_(1e-3)


def _flat(scale: Scale, kind: type[FlatAdamW] | type[FlatAdamW8bit], n: int) -> Callable[[], None]:
    optimizer = kind(*_numbers(scale, n), n, AdamWSettings(weight_decay=0.01))
    return lambda: optimizer.step([1e-4])


def _moments(n: int, device: str) -> tuple[Moment, Moment]:
    made = []
    for signed in (True, False):
        codes = torch.empty(n, dtype=torch.uint8, device=device)
        made.append(Moment(codes, torch.empty(n // BLOCK, device=device), signed))
        made[-1].clear()
    return made[0], made[1]


def _compiled(scale: Scale, n: int) -> Callable[[], None]:
    """The same function as the compiler makes it, on pieces of the whole: is fusing worth a kernel of its own?"""
    (p, g), (m, v) = _numbers(scale, n), _moments(n, scale.device)
    room = Workspace.of(n, p.device)
    update, at = torch.compile(adamw_8bit_, dynamic=False), Update(rate=1e-4, step=1, **USUAL)

    def step() -> None:  # piece by piece, so that one is compiled and not a hundred
        for start in range(0, n, CHUNK[scale.device]):
            numbers = slice(start, start + CHUNK[scale.device])
            blocks = slice(numbers.start // BLOCK, numbers.stop // BLOCK)
            some = (Moment(x.codes_n[numbers], x.largest_B[blocks], x.signed) for x in (m, v))
            update(p[0, numbers], g[0, numbers], *some, at, room)

    return step


def _bitsandbytes(scale: Scale, n: int) -> Callable[[], None]:
    (p, g), (m, v) = _numbers(scale, n), _moments(n, scale.device)
    return lambda: their_update(p[0], g[0], m, v, 1)


def their_update(p: torch.Tensor, g: torch.Tensor, m: Moment, v: Moment, step: int) -> None:
    """bitsandbytes' own kernel on our state."""
    import bitsandbytes.functional as bnb

    maps = [dynamic_map(signed).to(p.device) for signed in (True, False)]
    bnb.optimizer_update_8bit_blockwise(
        "adam", g, p, m.codes_n, v.codes_n, 0.9, 0.999, 0.0, 0.0, 1e-8, step, 1e-4, *maps, m.largest_B, v.largest_B,
        weight_decay=0.01,
    )  # fmt: skip


def beside_bitsandbytes(scale: Scale, n: int = 2**20) -> dict[str, Any]:
    """Five updates from the same state each: weights to rounding, codes but for ties and the code of zero."""
    (p, g), (m, v) = _numbers(scale, n), _moments(n, scale.device)
    room, worst, other = Workspace.of(n, p.device), 0.0, 0.0
    for step in range(1, 6):
        twin = p[0].clone()
        tm, tv = (Moment(x.codes_n.clone(), x.largest_B.clone(), x.signed) for x in (m, v))
        their_update(twin, g[0], tm, tv, step)
        before = p[0].clone()
        adamw_8bit_(p[0], g[0], m, v, Update(rate=1e-4, step=step, **USUAL), room)
        worst = max(worst, distance(p[0] - before, twin - before))
        apart = [(a.codes_n != b.codes_n).float().mean() for a, b in ((m, tm), (v, tv))]
        other = max(other, *(float(share) for share in apart))
        g = g.mul(1.3).roll(1, 1)
    return {"update_apart": worst, "codes_that_differ": other, "passed": worst < 1e-3 and other < 1e-2}


def print_optimizer(found: dict[str, Any]) -> None:
    print(f"\noptimizer, {found['numbers']:,} numbers")
    for way in found["ways"]:
        told = way.get("problem") or f"{1e3 * way['seconds']:9.3f} ms, {way['nanoseconds_a_number']:.4f} ns a number"
        print(f"  {way['way']:25} {told}")
    if "beside_bitsandbytes" in found:
        b = found["beside_bitsandbytes"]
        told = f"updates {b['update_apart']:.1e} apart, {b['codes_that_differ']:.2%} of codes"
        print(f"  beside bitsandbytes' kernel: {told}: {'passed' if b['passed'] else 'FAILED'}", flush=True)
