"""Full fine-tuning with AdamW's moments in 8 bits beside fp32: held-out loss after as many updates, and bytes of state.

    python benchmarks/adamw_8bit.py [--updates N] [--only NAME]...

SmolLM2-135M in float32 on the demo's tickets; all see the same rows in the same order, and are judged on the same
held-out rows, whose differences are paired. Beside our two: embeddings' moments in fp32, as the paper has them; nearest
codes for the second moment, as bitsandbytes has them on a GPU; and bitsandbytes' own AdamW8bit on this processor. One
process can make some of the runs and another the rest: the result keeps what it has.
"""

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from common import RESULTS, describe_machine, write_result
from lr_law import rows_of, standard_error
from torch import Tensor

from welltuned.advice.rules import number
from welltuned.data.mix import Mixture
from welltuned.kernels import adamw_8bit as op
from welltuned.models.full import FullParameters
from welltuned.models.fuse import find_head, fuse
from welltuned.models.load import load_model
from welltuned.models.packed import packed_model
from welltuned.models.resolve import DEMO_ALIAS
from welltuned.objectives.supervised import collate, loss, supervised_tokens
from welltuned.training.optimizer import AdamWSettings, FlatAdamW, Schedule, Scheduler, clip_
from welltuned.training.optimizer_8bit import FlatAdamW8bit
from welltuned.training.step import Engine, accumulate_gradient

SETTINGS = AdamWSettings(weight_decay=0.01)
Step = Callable[[float], None]
Made = tuple[Step, Callable[[], int]]  # makes an update at a rate; bytes of its state


def fp32(full: FullParameters) -> Made:
    optimizer = FlatAdamW(full.flat_KP, full.grad_KP, full.decayed, SETTINGS)
    return lambda rate: optimizer.step([rate]), lambda: optimizer.exp_avg_KP.nbytes + optimizer.exp_avg_sq_KP.nbytes


def eight_bit(full: FullParameters, first: int = 0) -> Made:
    """From column `first` on; the columns before it in fp32."""
    coded = FlatAdamW8bit(full.flat_KP[:, first:], full.grad_KP[:, first:], full.decayed - first, SETTINGS)
    wide = FlatAdamW(full.flat_KP[:, :first], full.grad_KP[:, :first], first, SETTINGS) if first else None

    def step(rate: float) -> None:
        coded.step([rate])
        if wide is not None:
            wide.step([rate])

    def size() -> int:
        kept = [coded.exp_avg_KP, coded.exp_avg_sq_KP, *coded.codes.values()]
        kept += [wide.exp_avg_KP, wide.exp_avg_sq_KP] if wide is not None else []
        return sum(t.nbytes for t in kept)

    return step, size


def embeddings_fp32(full: FullParameters) -> Made:
    assert "embed" in full.slots[0].name, full.slots[0]
    return eight_bit(full, full.slots[0].size)


def nearest(full: FullParameters) -> Made:
    """Second moments by the nearest code, zero among them."""
    edges_of = op.edges_of

    def plain_edges(signed: bool) -> Tensor:
        values = op.dynamic_map(signed)
        return edges_of(signed) if signed else (values[:-1] + values[1:]) / 2

    op.edges_of = plain_edges
    return eight_bit(full)


def bitsandbytes(full: FullParameters) -> Made:
    import bitsandbytes as bnb

    groups = [
        {"params": [p for p in full._parameters if (p.dim() > 1) is matrix], "weight_decay": decay}
        for matrix, decay in ((True, SETTINGS.weight_decay), (False, 0.0))
    ]
    optimizer = bnb.optim.AdamW8bit(groups, lr=0.0, betas=(SETTINGS.beta1, SETTINGS.beta2), eps=SETTINGS.eps)

    def step(rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()

    def size() -> int:
        held = {id(t): t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)}
        return sum(t.nbytes for t in held.values())

    return step, size


SYSTEMS = {
    "adamw": fp32,
    "adamw_8bit": eight_bit,
    "adamw_8bit, embeddings fp32": embeddings_fp32,
    "adamw_8bit, nearest": nearest,
    "bitsandbytes": bitsandbytes,
}


def run(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """All updates of one optimizer, and the held-out sums before and after."""
    rows = rows_of("tickets", "", given.longest, given.held_out)
    model = load_model(DEMO_ALIAS, dtype=torch.float32)
    full = FullParameters(model)
    fuse(model, full)
    step, size = SYSTEMS[name](full)
    engine = Engine(model=model, trained=full, head=find_head(model), token_budget=2048)
    schedule = Schedule(kind=Scheduler.LINEAR, peak=given.rate, warmup_steps=2, total_steps=given.updates)
    order, losses = Mixture((len(rows.train),), (len(rows.train),), 0), []
    with packed_model(model):
        before = held_out_sums(engine, rows.held_out)
        for at in range(given.updates):
            full.grad_KP.zero_()
            chosen = [rows.train[i] for i in order.update(given.batch, at)]
            losses.append(accumulate_gradient(engine, chosen, range(len(chosen))).loss)
            clip_(full.grad_KP, number("clip"))
            step(schedule.rate(at))
            print(name, at + 1, round(losses[-1], 4), flush=True)
        after = held_out_sums(engine, rows.held_out)
    tokens = [supervised_tokens(e) for e in rows.held_out]
    return {
        "losses": [round(value, 5) for value in losses],
        "held_out_before": round(sum(before) / sum(tokens), 5),
        "held_out": round(sum(after) / sum(tokens), 5),
        "held_out_sums": [round(value, 4) for value in after],
        "held_out_tokens": tokens,
        "parameters": full.flat_KP.numel(),
        "state_bytes": size(),
        "bytes_a_parameter": round(size() / full.flat_KP.numel(), 4),
    }


@torch.no_grad()
def held_out_sums(engine: Engine, rows: Any) -> list[float]:
    """Summed loss of each row."""
    found = []
    for row in rows:
        batch = collate([row], engine.model.device)
        value, _ = loss(engine.model, engine.head, batch, torch.ones(len(batch.target_M)))
        found.append(float(value))
    return found


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each beside fp32: the difference of held-out losses with its paired error, and as a share of what is learned."""
    exact, found = runs["adamw"], {}
    for name, one in runs.items():
        apart = [a - b for a, b in zip(one["held_out_sums"], exact["held_out_sums"], strict=True)]
        mean = sum(apart) / sum(exact["held_out_tokens"])
        found[name] = {
            "held_out": one["held_out"],
            "difference": round(mean, 5),
            "paired_error": standard_error(apart, exact["held_out_tokens"]),
            "share_of_what_is_learned": round(mean / (exact["held_out_before"] - exact["held_out"]), 5),
            "bytes_a_parameter": one["bytes_a_parameter"],
            "share_of_state": round(one["state_bytes"] / exact["state_bytes"], 4),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--longest", type=int, default=140, help="most tokens of a row")
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", action="append", choices=SYSTEMS, help="these runs (default: all)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    asked = {key: getattr(given, key) for key in ("updates", "batch", "rate", "longest", "held_out")}
    path, runs = RESULTS / "adamw_8bit.json", {}
    if path.exists() and (kept := json.loads(path.read_text(encoding="utf-8")))["asked"] == asked:
        runs = kept["runs"]
    for name in given.only or SYSTEMS:
        runs[name] = run(name, given)
        ordered = {system: runs[system] for system in SYSTEMS if system in runs}
        document = {"what": __doc__.splitlines()[0], "machine": describe_machine(), "asked": asked, "runs": ordered}
        compared = summary(ordered) if "adamw" in ordered else {}
        assert all(math.isfinite(one["difference"]) for one in compared.values())
        write_result("adamw_8bit", {**document, "compared": compared})
        print(json.dumps(compared.get(name), indent=1), flush=True)


if __name__ == "__main__":
    main()
