"""Two more parts of the GPU benchmark: compiled decoder layers beside plain ones, and prompts that answers share.

    PYTHONPATH=src python benchmarks/gpu_compile.py [--minutes 9] [--layers 32] [--out FOLDER]
    PYTHONPATH=src python benchmarks/gpu_compile.py --toy

compiled   an update on long and on ragged rows, in turns, and the warm-up that compiling took.
prefix     attention, forward and backward, of pairs and of groups: every answer with a prompt of its own; the prompt
           once, its keys copied for each answer; the prompt once, read where it lies (FlexAttention, CUDA only).
"""

import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import torch
from common import describe_machine
from gpu_parity import distance
from gpu_scale import Scale, free_memory, long_rows, ragged_rows, sentence, start, time_median, time_once, usual_options
from gpu_systems import build_model, engine
from torch import Tensor

from welltuned.data.packing import pack
from welltuned.kernels.attention import packed_attention
from welltuned.kernels.flex import block_mask, flex, prove
from welltuned.models import compiled
from welltuned.models.static import padded_share, static_lengths

TURNS = 5

# --- compiled layers ---


def check_compiled(scale: Scale) -> dict[str, Any]:
    """Seconds of an update of compiled and of plain layers, A B A B; compiled code that is not used is a failure."""
    budget = scale.budgets[0]
    found: dict[str, Any] = {"budget": budget, "rows": [], "passed": True}
    if not scale.cuda:
        compiled.BACKEND = "aot_eager"  # at toy size torch traces, and runs what it traced
    for kind, examples in (("long", long_rows(scale)), ("ragged", ragged_rows(scale))):
        sizes = [sum(len(examples[i].ids) for i in bin_) for bin_ in pack([len(e.ids) for e in examples], budget)]
        lengths = static_lengths(sizes, 2)
        told: dict[str, Any] = {"rows": kind, "padded_share": padded_share(sizes, lengths)}
        try:
            told |= _in_turns(scale, examples, budget, lengths)
        except Exception as error:
            traceback.print_exc()
            told["problem"] = sentence(error)
        found["passed"] &= told.get("problem") is None
        found["rows"].append(told)
        free_memory(scale)
    return found


def _in_turns(scale: Scale, examples: list[Any], budget: int, lengths: tuple[int, ...]) -> dict[str, Any]:
    sides: dict[str, Any] = {}
    warm: list[compiled.WarmUp] = []
    with ExitStack() as both:
        for name, of in (("plain", ()), ("compiled", lengths)):
            model = build_model(scale.shape, scale.dtype, scale.device, nf4=False)
            way = engine(model, examples, budget=budget, compiled=of, warmed=warm.append)
            sides[name] = both.enter_context(way)
        losses = {name: side.update() for name, side in sides.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(TURNS if scale.cuda else 1):
            for name, side in sides.items():
                seconds[name].append(time_once(side.update, scale))
    told = {"seconds": {name: median(each) for name, each in seconds.items()}, "losses": losses}
    apart = abs(losses["plain"] - losses["compiled"]) / losses["plain"]
    problem = warm[0].problem or (None if apart < 0.01 else f"the losses are {apart:.1%} apart")
    return told | {"warm_up": asdict(warm[0])} | ({} if problem is None else {"problem": problem})


def print_compiled(found: dict[str, Any]) -> None:
    print("\ncompiled decoder layers")
    for row in found["rows"]:
        told = row.get("problem")
        if "seconds" in row:
            s, warm = row["seconds"], row["warm_up"]
            told = f"{1e3 * s['plain']:9.1f} ms plain, {1e3 * s['compiled']:9.1f} ms compiled"
            told += f" ({row['padded_share']:.1%} padding, warm-up {warm['seconds']:.0f} s) {row.get('problem', '')}"
        print(f"  {row['rows']:7} {told}", flush=True)


# --- shared prompts ---


def check_prefix(scale: Scale) -> dict[str, Any]:
    """Milliseconds of attention by each way, and how far the ways are apart; the first two must run."""
    heads, groups = scale.shape["num_attention_heads"], scale.shape["num_key_value_heads"]
    width = scale.shape["head_dim"]
    problem = prove(heads, groups, width, scale.dtype, torch.empty(0, device=scale.device).device)
    found: dict[str, Any] = {"flex_attention": problem or "used", "rows": [], "passed": True}
    unit = 512 // scale.shrink**2
    layouts = {
        "pairs": [(unit, (unit // 2, unit // 2))] * 4,
        "groups of 8": [(unit, (unit // 4,) * 8)] * 2,
        "groups of 16, long prompt": [(4 * unit, (unit // 4,) * 16)],
    }
    for kind, layout in layouts.items():
        told: dict[str, Any] = {"rows": kind, "tokens": sum(prompt + sum(own) for prompt, own in layout)}
        try:
            told |= _prefix_ways(scale, layout, heads, groups, width, with_flex=problem is None)
        except Exception as error:
            traceback.print_exc()
            told["problem"], found["passed"] = sentence(error), False
        found["rows"].append(told)
        free_memory(scale)
    found["passed"] &= all(max(row["apart"].values()) < (2e-2 if scale.cuda else 1e-4) for row in found["rows"])
    return found


def _prefix_ways(
    scale: Scale, layout: list[tuple[int, tuple[int, ...]]], heads: int, groups: int, width: int, *, with_flex: bool
) -> dict[str, Any]:
    lengths, branches = [prompt + sum(own) for prompt, own in layout], [own for _, own in layout]
    draw, n, by = torch.Generator().manual_seed(0), sum(lengths), width**-0.5
    q, k, v = (
        torch.randn(h, n, width, generator=draw).to(scale.device, scale.dtype).requires_grad_()
        for h in (heads, groups, groups)
    )
    g = torch.randn(n, heads, width, generator=draw).to(scale.device, scale.dtype)
    rows, alone, own = _alone(layout)
    wide = [t.detach()[:, rows.to(scale.device)].requires_grad_() for t in (q, k, v)]
    g_wide = torch.zeros(len(rows), heads, width, device=scale.device, dtype=scale.dtype)
    g_wide[own.to(scale.device)] = g[rows[own].to(scale.device)]
    shared = partial(packed_attention, q, k, v, lengths, by, branches=branches)
    ways: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "own prompt each": partial(_both, partial(packed_attention, *wide, alone, by), wide, g_wide),
        "shared, keys copied": partial(_both, shared, (q, k, v), g),
    }
    if with_flex:
        mask = block_mask(lengths, branches, q.device)
        ways["shared, FlexAttention"] = partial(_both, lambda: flex(q, k, v, mask, by), (q, k, v), g)
    made = {name: way() for name, way in ways.items()}
    known = made["shared, keys copied"]
    apart = {"own prompt each": distance(made["own prompt each"][0][own], known[0][rows[own]])}
    if with_flex:
        flexed = made["shared, FlexAttention"]
        apart["FlexAttention"] = max(distance(a, b) for a, b in zip(flexed, known, strict=True))
    return {"seconds": {name: time_median(way, scale) for name, way in ways.items()}, "apart": apart}


def _both(attend: Callable[[], Tensor], leaves: Any, g: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients."""
    out = attend()
    return (out.detach(), *torch.autograd.grad(out, tuple(leaves), g))


def _alone(layout: list[tuple[int, tuple[int, ...]]]) -> tuple[Tensor, list[int], Tensor]:
    """Where each answer has a prompt of its own: the shared row of each row, lengths, and which rows count.

    A prompt counts once, with its first answer.
    """
    rows, lengths, counts, start_at = [], [], [], 0
    for prompt, own in layout:
        trunk, at = torch.arange(start_at, start_at + prompt), start_at + prompt
        for i, n in enumerate(own):
            rows += [trunk, torch.arange(at, at + n)]
            counts += [torch.full((prompt,), i == 0), torch.ones(n, dtype=torch.bool)]
            lengths.append(prompt + n)
            at += n
        start_at = at
    return torch.cat(rows), lengths, torch.cat(counts).nonzero()[:, 0]


def print_prefix(found: dict[str, Any]) -> None:
    print(f"\nshared prompts, attention forward + backward (FlexAttention: {found['flex_attention']})")
    for row in found["rows"]:
        each = [f"{name} {1e3 * s:.3f} ms" for name, s in row.get("seconds", {}).items()]
        print(f"  {row['rows']:26} {row.get('problem') or ', '.join(each)}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    started = start("gpu-compile", usual_options(__doc__).parse_args(arguments))
    result: dict[str, Any] = {"benchmark": "gpu-compile", "toy": not started.scale.cuda, "machine": describe_machine()}
    for name, part, show in (
        ("prefix", check_prefix, print_prefix),
        ("compiled", check_compiled, print_compiled),
    ):
        result[name] = part(started.scale)
        show(result[name])
        started.save(result)
    return 0 if result["prefix"]["passed"] and result["compiled"]["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
