"""One GPU: does the engine learn as much as PEFT does at equal settings, with LoRA and with QLoRA?

    PYTHONPATH=src python benchmarks/gpu_quality.py [--seeds 3] [--rank 16] [--minutes 9] [--out FOLDER]
    PYTHONPATH=src python benchmarks/gpu_quality.py --toy       the same code at toy size on the CPU, in seconds

Needs what gpu.py needs, and no network. A small Llama is first trained in full on one language: a random walk in which
each token has four successors. Adapters then learn another in which half of the successors changed. What cannot be
learned is known: the walk's entropy. Every system starts from the same adapter and sees the same rows in the same
order, at the same rate, so that runs are paired by seed, and what is compared is the loss on held-out rows. A seed for
which no time is left is left out, and the result says so.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from common import describe_machine
from gpu_scale import NO_TIME, RANK, Deadline, Scale, free_memory, start, tunes_here, usual_options
from gpu_systems import Running, build_model, engine, peft_sdpa
from transformers import PreTrainedModel

from welltuned.data.render import Example
from welltuned.models.four_bit import keep_dense
from welltuned.models.frozen import quantize_linears

TOKENS, SUCCESSORS = 64, 4
NEAR = 0.01  # of what PEFT learns: a difference that would not matter to anyone
SYSTEMS: dict[str, Callable[..., Any]] = {
    "welltuned": engine,
    "PEFT, adapters fp32": partial(peft_sdpa, adapters=torch.float32),
    "PEFT, adapters bf16": partial(peft_sdpa, adapters=torch.bfloat16),
}
OURS, THEIRS = "welltuned", "PEFT, adapters fp32"


@dataclass(frozen=True, slots=True)
class Work:
    """How much is learned."""

    length: int
    rows: int  # of an update
    pretraining: int  # updates
    updates: int
    heldout: int
    rate: float
    pretraining_rate: float


ON_GPU = Work(length=512, rows=16, pretraining=300, updates=200, heldout=64, rate=5e-4, pretraining_rate=5e-4)
TOY = Work(length=48, rows=8, pretraining=60, updates=30, heldout=16, rate=5e-3, pretraining_rate=5e-3)


@dataclass(frozen=True, slots=True)
class Learned:
    """One system's run: held-out loss before and after."""

    tune: str
    system: str
    seed: int
    before: float
    after: float


# ── two languages ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Walk:
    """next_TS: successors of each token; p_S their probabilities, the same for all."""

    next_TS: np.ndarray
    p_S: np.ndarray

    @property
    def entropy(self) -> float:
        """Nats a token: the least loss that a model can have once it knows where the walk is."""
        return float(-(self.p_S * np.log(self.p_S)).sum())

    def changed(self, seed: int) -> "Walk":
        """Half of the tokens get other successors."""
        draw = np.random.default_rng(seed)
        other = walk(seed).next_TS
        keep = draw.permutation(TOKENS) < TOKENS // 2
        return replace(self, next_TS=np.where(keep[:, None], self.next_TS, other))

    def row(self, length: int, seed: int) -> Example:
        draw = np.random.default_rng(seed)
        ids = np.empty(length, dtype=np.int32)
        ids[0] = draw.integers(TOKENS)
        for i in range(1, length):
            ids[i] = self.next_TS[ids[i - 1], draw.choice(SUCCESSORS, p=self.p_S)]
        return Example(ids, np.arange(length) > 0, f"walk:{seed}")


def walk(seed: int) -> Walk:
    draw = np.random.default_rng(seed)
    successors = np.stack([draw.permutation(TOKENS)[:SUCCESSORS] for _ in range(TOKENS)])
    return Walk(successors, np.array([0.6, 0.2, 0.15, 0.05]))


# ── learning ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def pretrain(scale: Scale, work: Work, language: Walk) -> PreTrainedModel:
    """The base: trained in full on the first language, in float32, then in the scale's own precision."""
    torch.manual_seed(0)
    model = build_model(scale.parity_shape, torch.float32, scale.device, nf4=False)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=work.pretraining_rate, weight_decay=0.0)
    for step in range(work.pretraining):
        rows = [language.row(work.length, 10**6 + step * work.rows + i) for i in range(work.rows)]
        ids = torch.from_numpy(np.stack([row.ids for row in rows])).long().to(scale.device)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.requires_grad_(False).to(scale.dtype).eval()


def learn(
    model: PreTrainedModel, system: Callable[..., Any], work: Work, language: Walk, seed: int, rank: int = RANK
) -> list[float]:
    """Held-out loss before and after so many updates from a start that the seed alone decides."""
    held_out = [language.row(work.length, 10**7 + i) for i in range(work.heldout)]
    with system(model, held_out, budget=work.length * work.rows, rate=work.rate, rank=rank) as running:
        begin(running, seed)
        before = running.gradient()
        for step in range(work.updates):
            first = seed * work.updates * work.rows + step * work.rows
            running.gradient_of([language.row(work.length, first + i) for i in range(work.rows)])
            running.step()
        return [before, running.gradient()]


def begin(running: Running, seed: int) -> None:
    """The same A for every system, B zero."""
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(running.adapter.items()):
        drawn = torch.randn(tensor.shape, generator=draw) * tensor.shape[-1] ** -0.5
        tensor.copy_(drawn if name.endswith("lora_A") else torch.zeros(tensor.shape))


# ── what it came to ──────────────────────────────────────────────────────────────────────────────────────────────────


def compare(runs: Sequence[Learned], tune: str) -> dict[str, Any]:
    """Ours less theirs, paired by seed, as a share of what they learned. It `agrees` within noise or `NEAR`."""
    ours, theirs = ({r.seed: r for r in runs if r.tune == tune and r.system == s} for s in (OURS, THEIRS))
    shares = [(ours[s].after - theirs[s].after) / (theirs[s].before - theirs[s].after) for s in sorted(ours)]
    error = stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else 0.0
    worse = mean(shares)
    return {"tune": tune, "difference": worse, "standard_error": error, "agrees": worse <= max(NEAR, 2 * error)}


def all_learned(runs: Sequence[Learned], entropy: float) -> bool:
    """Each run came at least a quarter of the way to the entropy: else the comparison would say nothing."""
    return all(r.before - r.after > 0.25 * (r.before - entropy) > 0 for r in runs)


def run(
    scale: Scale, work: Work, seeds: int, rank: int, deadline: Deadline, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Every tune and system on every seed; `save` is called with all that is known so far."""
    first = walk(0)
    second = first.changed(1)
    result: dict[str, Any] = {"benchmark": "gpu_quality", "toy": not scale.cuda, "machine": describe_machine()}
    result |= {"work": asdict(work), "shape": scale.parity_shape, "entropy": second.entropy, "runs": [], "compared": []}
    result |= {"rank": rank, "left_out": []}
    model, runs, took = pretrain(scale, work, first), list[Learned](), 0.0
    tunes = tunes_here()
    for at, tune in enumerate(tunes):
        if tune == "qlora":
            quantize_linears(model)
        until = Deadline.after(deadline.left / (len(tunes) - at) / 60)
        for seed in range(seeds):
            if runs and until.left < took:  # what the seed before took
                result["left_out"].append({"tune": tune, "seed": seed, "problem": NO_TIME})
                print(f"{tune:6} seed {seed}: {NO_TIME}")
                continue
            began = deadline.left
            runs += one_seed(scale, work, model, second, tune, seed, rank)
            took = began - deadline.left
            result["runs"] = [asdict(r) for r in runs]
            save(result)
        if not any(r.tune == tune for r in runs):
            continue
        if tune == "qlora" and deadline.left > took / len(SYSTEMS):
            keep_dense(model)
            rebuilt = next(r for r in runs if (r.tune, r.system, r.seed) == (tune, OURS, 0))
            cached = learn(model, engine, work, second, 0, rank)[1]
            result["dense_base"] = {"rebuilt": rebuilt.after, "cached": cached}
        result["compared"].append(compare(runs, tune))
        save(result)
    result["ok"] = all(c["agrees"] for c in result["compared"]) and all_learned(runs, second.entropy)
    save(result)
    return result


def one_seed(
    scale: Scale, work: Work, model: PreTrainedModel, language: Walk, tune: str, seed: int, rank: int
) -> list[Learned]:
    """Every system from the same start."""
    found = []
    for name, system in SYSTEMS.items():
        found.append(Learned(tune, name, seed, *learn(model, system, work, language, seed, rank)))
        print(f"{tune:6} {name:22} seed {seed}: {found[-1].before:.4f} -> {found[-1].after:.4f}", flush=True)
        free_memory(scale)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = usual_options(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each system (default: 3)")
    parser.add_argument("--rank", type=int, default=RANK, help="default: %(default)s")
    options = parser.parse_args(arguments)
    started = start("gpu-quality", options)
    work = ON_GPU if started.scale.cuda else TOY
    result = run(started.scale, work, options.seeds, options.rank, started.deadline, started.save)
    for c in result["compared"]:
        said = f"{c['difference']:+.2%} of what is learned (± {c['standard_error']:.2%})"
        print(f"{c['tune']}: ours less theirs {said}: {'agree' if c['agrees'] else 'DIFFER'}")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
