"""A search against a dense grid, the throughput of a bank of arms, and its memory.

    python benchmarks/sweep.py grid  --case gsm8k|tickets [--gsm8k FILE] --work DIR    # once; goes on where it ended
    python benchmarks/sweep.py defaults --case gsm8k|tickets [--gsm8k FILE] --work DIR    # into the grid's result
    python benchmarks/sweep.py sweep --case gsm8k|tickets [--gsm8k FILE] --work DIR
    python benchmarks/sweep.py bank  [--arms 1,2,4,8]
    python benchmarks/sweep.py cells                                          # computes no run: reads lr_law.jsonl

**grid**: one bank trains seven rates around the advice, a factor of √2 apart, each to its end, and judges all of them
at every rung: with running averages, as a search does, and with the weights as they are. **defaults**: the same for the
defaults of other tools. **sweep**: what `welltuned sweep` finds on the same rows, the tokens that it takes, and its
regret: the held-out loss of its choice against the lowest of the grid's. The grid's rows also replay searches whose
arms are the grid's. **bank**: tokens a second, and peak memory, of K arms at once against the same K runs one after
another, in turn (A B A B), each in a process of its own. **cells**: paired errors and the curve through the rates of
lr_law.jsonl.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, describe_machine, write_result

from welltuned.data.formats import to_conversations
from welltuned.data.render import render_all
from welltuned.data.source import read_rows
from welltuned.facts.machine import Device
from welltuned.models.load import load_tokenizer
from welltuned.models.lora import AdapterBank
from welltuned.models.packed import packed_model
from welltuned.models.resolve import DEMO_ALIAS
from welltuned.recipe import load_recipe
from welltuned.search.arms import Question, question_of
from welltuned.search.curve import Point, Prior, fit
from welltuned.search.halving import STEP
from welltuned.search.items import Share, SupervisedItems, gradients
from welltuned.search.sweep import SweepResult, is_sweep, resume_sweep, sweep
from welltuned.training.monitor.robust import difference
from welltuned.training.optimizer import FlatAdamW, clip_
from welltuned.training.prepare import Prepared, prepare
from welltuned.training.process import memory_used
from welltuned.training.run import make_ready
from welltuned.training.settings import adamw_settings
from welltuned.training.step import accumulate_gradient

LONGEST, HELD_OUT = 140, 64
STEPS = (-3, -2, -1, 0, 1, 2, 3)  # of √2
DEFAULTS = {"TRL": 2e-5, "LLaMA-Factory": 5e-5, "ms-swift": 1e-4, "Unsloth, Axolotl": 2e-4}


def case_options(case: str, model: str, gsm8k: str, work: Path) -> dict[str, Any]:
    """The recipe of a case; GSM8K's short rows are written to files of their own."""
    if case == "tickets":
        with as_file(files("welltuned").joinpath("demo_data")) as folder:
            return {
                "model": model,
                "data": str(folder / "train.jsonl"),
                "eval_data": str(folder / "heldout.jsonl"),
                "num_train_epochs": 1.0,
            }
    train, held_out = work / "gsm8k-train.jsonl", work / "gsm8k-heldout.jsonl"
    if not held_out.exists():
        tokenizer = load_tokenizer(model)
        examples = render_all(to_conversations(read_rows(gsm8k)).items, tokenizer).examples
        lines = [line for line in Path(gsm8k).read_text(encoding="utf-8").splitlines() if line.strip()]
        short = [line for line, e in zip(lines, examples, strict=True) if len(e.ids) <= LONGEST]
        train.write_text("\n".join(short[HELD_OUT:]) + "\n", encoding="utf-8")
        held_out.write_text("\n".join(short[:HELD_OUT]) + "\n", encoding="utf-8")
    shape = {"max_steps": 40, "effective_batch_size": 4, "r": 16, "lora_alpha": 16.0}
    return {"model": model, "data": str(train), "eval_data": str(held_out), **shape}


def prepared_of(arguments: argparse.Namespace) -> Prepared:
    arguments.work.mkdir(parents=True, exist_ok=True)
    options = case_options(arguments.case, arguments.model, arguments.gsm8k, arguments.work)
    if arguments.dtype:
        options["dtype"] = arguments.dtype
    if arguments.rate:
        options["learning_rate"] = arguments.rate
    return prepare(load_recipe(None, {**options, "save_steps": 10}))


def case_of(arguments: argparse.Namespace) -> str:
    """The name of a case's results: with the number format where one was asked for."""
    return f"{arguments.case}_{arguments.dtype}" if arguments.dtype else str(arguments.case)


def grid_of(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"sweep_grid_{case_of(arguments)}.json").read_text(encoding="utf-8"))
    return found


def searched(arguments: argparse.Namespace, question: Question, name: str, *, grid: bool) -> SweepResult:
    """Begin, or go on."""
    out, started = arguments.work / f"{case_of(arguments)}-{name}", time.time()

    def tell(event: object) -> None:
        kind = type(event).__name__
        if kind != "ArmUpdated":
            print(f"{time.time() - started:7.0f} s  {event}", flush=True)

    if is_sweep(out):
        return resume_sweep(out, tell)
    return sweep(prepared_of(arguments), question, out, tell, grid=grid)


def run_grid(arguments: argparse.Namespace) -> None:
    advised = prepared_of(arguments).plan.value("learning_rate")
    found = to_the_end(arguments, "grid", [float(f"{advised * 2 ** (k / 2):.2e}") for k in STEPS])
    result = {
        "machine": describe_machine(),
        "case": arguments.case,
        "dtype": prepared_of(arguments).plan.value("dtype"),
        "advised": advised,
        "updates": found.found.rows[0].total_updates,
        "seconds": round(found.run.seconds, 1),
        "tokens_per_second": round(found.run.tokens_per_second, 1),
        "weights": found.weights,
        "start_loss": None if found.run.before is None else found.run.before.loss,
        "arms": arms_of(found),
    }
    print(write_result(f"sweep_grid_{case_of(arguments)}", result))


def run_defaults(arguments: argparse.Namespace) -> None:
    rates = sorted(DEFAULTS.values())
    grid = grid_of(arguments)
    others = [arm for arm in grid["arms"] if arm["learning_rate"] not in rates]
    found = arms_of(to_the_end(arguments, "defaults", rates))
    print(write_result(f"sweep_grid_{case_of(arguments)}", {**grid, "arms": [*others, *found]}))


def to_the_end(arguments: argparse.Namespace, name: str, rates: list[float]) -> SweepResult:
    return searched(arguments, Question(3, (("learning_rate", tuple(rates)),)), name, grid=True)


def arms_of(found: SweepResult) -> list[dict[str, Any]]:
    return [
        {
            "learning_rate": row.learning_rate,
            "status": row.status,
            "tokens": row.tokens,
            "updates": row.updates,
            "looks": [{"share": look.share, "loss_of_row": rounded(look.loss_of_row)} for look in state.looks],
            "plain": [{"share": look.share, "loss_of_row": rounded(look.loss_of_row)} for look in state.plain],
        }
        for row, state in zip(found.found.rows, found.state.arms, strict=True)
    ]


# ── the search beside the grid ───────────────────────────────────────────────────────────────────────────────────────


def run_sweep(arguments: argparse.Namespace) -> None:
    """A real search, judged on the same rows as the grid; and searches replayed on the grid's own recordings."""
    beside = f"_from_{arguments.rate:g}" if arguments.rate else ""
    out = arguments.work / f"{case_of(arguments)}-sweep{beside}"
    if not (out / "run.json").exists():
        searched(arguments, question_of(None, []), f"sweep{beside}", grid=False)
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    found = run["sweep"]
    grid = grid_of(arguments)
    weights = grid["weights"]
    whole = {arm["learning_rate"]: final(arm, weights) for arm in grid["arms"] if arm["status"] == "done"}
    best = min(whole, key=lambda rate: whole[rate])
    chosen = next(arm for arm in found["arms"] if arm["number"] == found["winner"])
    loss = chosen["looks"][-1]["loss"]
    low = min(whole[best], loss)
    names = ("advice", "best_rate", "best_rate_factor", "regret", "tokens", "runs_worth", "share_of_a_grid_of_seven")
    result = {
        "machine": describe_machine(),
        "case": arguments.case,
        "began_at": arguments.rate or grid["advised"],
        "updates": chosen["total_updates"],
        "grid": {f"{rate:g}": round(value, 5) for rate, value in sorted(whole.items())},
        "grid_best": {"learning_rate": best, "loss": round(whole[best], 5)},
        "chosen": {"learning_rate": chosen["learning_rate"], "loss": round(loss, 5)},
        "regret_against_the_grid": regret(loss, whole[best]),
        "regret_of_that_rate_in_the_grid": regret(whole.get(chosen["learning_rate"]), whole[best]),
        "regret_of_the_advice": regret(whole.get(grid["advised"]), low),
        "regret_of_defaults": {name: regret(whole.get(rate), low) for name, rate in DEFAULTS.items()},
        "seconds": run["seconds"],
        "found": {name: found[name] for name in names},
        "arms": [{name: arm[name] for name in ("learning_rate", "status", "updates", "why")} for arm in found["arms"]],
        "replayed": replay(grid),
    }
    print(write_result(f"sweep_{case_of(arguments)}{beside}", result))


def final(arm: dict[str, Any], weights: list[int]) -> float:
    losses = arm["looks"][-1]["loss_of_row"]
    return math.fsum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)


def regret(loss: float | None, best: float) -> float | None:
    """Relative; None where a rate was not in the grid, or diverged."""
    return None if loss is None else round(loss / best - 1, 5)


def replay(grid: dict[str, Any]) -> dict[str, Any]:
    """How well the order of the arms at each rung is that of the end: with running averages, and without them."""
    weights, found = grid["weights"], {}
    arms = [arm for arm in grid["arms"] if arm["status"] == "done" and arm["learning_rate"] not in DEFAULTS.values()]
    ends = [final(arm, weights) for arm in arms]
    for kind in ("looks", "plain"):
        for i, look in enumerate(arms[0][kind]):
            if look["share"] < 1:
                now = [final({"looks": [arm[kind][i]]}, weights) for arm in arms]
                picked = ends[now.index(min(now))]
                found[f"{'average' if kind == 'looks' else 'weights'} at {look['share']:.0%}"] = {
                    "best_rate_then": arms[now.index(min(now))]["learning_rate"],
                    "regret_of_picking_it": regret(picked, min(ends)),
                    "rank_correlation": round(rank_correlation(now, ends), 3),
                }
    return found


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's."""
    ranks = [[sorted(x).index(value) for value in x] for x in (a, b)]
    n = len(a)
    return 1 - 6 * sum((p - q) ** 2 for p, q in zip(*ranks, strict=True)) / (n * (n * n - 1))


def run_cells() -> None:
    """What three rates of a finished cell say of the best one, and how sure they are."""
    found = []
    cells: dict[str, dict[int, dict[str, Any]]] = {}
    for run in (json.loads(line) for line in (RESULTS / "lr_law.jsonl").read_text(encoding="utf-8").splitlines()):
        if "cell" in run and not run["diverged"] and run["step"] == int(run["step"]):
            cells.setdefault(run["cell"], {})[int(run["step"])] = run
    for name, runs in cells.items():
        if len(runs) < 3:
            continue
        best = min(runs, key=lambda k: runs[k]["loss"])
        weights = runs[best]["held_out_tokens"]
        rows = {k: [s / w for s, w in zip(r["held_out_sums"], weights, strict=True)] for k, r in runs.items()}
        gaps = {k: difference(rows[k], rows[best], weights) for k in runs if k != best}
        curve = fit([Point(k * STEP, rows[k]) for k in runs], weights, Prior(best * STEP, 0.5))
        found.append(
            {
                "cell": name,
                "best_step": best,
                "lowest_step": round(curve.x / STEP, 3),
                "lowest_step_error": round(curve.x_error / STEP, 3),
                "curve": round(curve.curve, 4),
                "regret_of_best_step": round(curve.regret(best * STEP), 5),
                "above_best": {k: round(gap.mean / runs[best]["loss"], 5) for k, gap in gaps.items()},
                "paired_error": {k: round((gap.error or 0.0) / runs[best]["loss"], 5) for k, gap in gaps.items()},
                "unpaired_error": round(runs[best]["standard_error"] / runs[best]["loss"], 5),
            }
        )
    print(write_result("sweep_cells", {"machine": describe_machine(), "cells": found}))


# ── many arms at once ────────────────────────────────────────────────────────────────────────────────────────────────


def run_bank(arguments: argparse.Namespace) -> None:
    """K arms at once and single runs, in turn, each in a process of its own."""
    kept = RESULTS / "sweep_bank.json"
    measured = json.loads(kept.read_text(encoding="utf-8"))["measured"] if arguments.more else []
    for _, arms in itertools.product(range(arguments.rounds), (int(k) for k in arguments.arms.split(","))):
        for mode in ("alone", "bank"):
            command = [sys.executable, __file__, mode, "--arms", str(arms), "--model", arguments.model]
            child = subprocess.run(
                [*command, "--seconds", str(arguments.seconds), "--work", str(arguments.work)],
                capture_output=True,
                text=True,
                check=True,
            )
            measured.append(json.loads(child.stdout.splitlines()[-1]))
            print(measured[-1], flush=True)
    print(write_result("sweep_bank", {"machine": describe_machine(), **in_short(measured), "measured": measured}))


def in_short(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of tokens a second and memory; a bank's speed is compared with the single run just before it."""
    pairs = list(zip(measured[::2], measured[1::2], strict=True))  # alone, then the bank

    def of(runs: list[dict[str, Any]]) -> dict[str, Any]:
        speed, memory = (statistics.median(run[key] for run in runs) for key in ("tokens_per_second", "peak_bytes"))
        return {"tokens_per_second": round(speed, 1), "peak_gb": round(memory / 1e9, 2)}

    alone, banks = of([single for single, _ in pairs]), {}
    for k in sorted({bank["arms"] for _, bank in pairs}):
        chosen = [(single, bank) for single, bank in pairs if bank["arms"] == k]
        ratios = [bank["tokens_per_second"] / single["tokens_per_second"] for single, bank in chosen]
        found = of([bank for _, bank in chosen])
        memory = found["peak_gb"] / (k * alone["peak_gb"])
        banks[k] = {**found, "speed_ratio": round(statistics.median(ratios), 2), "memory_of_k_runs": round(memory, 2)}
    return {"alone": alone, "bank": banks}


def measure(arguments: argparse.Namespace) -> None:
    """Tokens a second over whole updates, at the best of three token budgets, and the most memory that was resident."""
    arms = int(arguments.arms)
    prepared = prepare(load_recipe(None, case_options("tickets", arguments.model, "", arguments.work)))
    plan, bank_of = prepared.plan, arms if arguments.what == "bank" else 1
    ready = make_ready(plan, [plan] * bank_of)
    trained = ready.engine.trained
    assert isinstance(trained, AdapterBank)
    optimizer = FlatAdamW(trained.flat_KP, trained.grad_KP, trained.decayed, adamw_settings(plan))
    trained.claim_gradients()
    loaded, best = memory_used(Device.CPU).now, {}
    with packed_model(ready.model):
        for budget in (1024, 2048, 4096):
            engine, tokens, started, step = replace(ready.engine, token_budget=budget), 0, 0.0, 0
            while step < 2 or time.perf_counter() - started < arguments.seconds:
                chosen = prepared.mixture.update(plan.value("effective_batch_size"), step)
                rows = [prepared.train[i] for i in chosen]
                optimizer.zero_grad()
                if arguments.what == "bank":
                    shares = [Share(k, rows, chosen) for k in range(bank_of)]
                    made = sum(g.tokens for g in gradients(engine, SupervisedItems(), shares))
                else:
                    made = accumulate_gradient(engine, rows, chosen).tokens
                clip_(trained.grad_KP, 1.0)
                optimizer.step([1e-4] * bank_of)
                step += 1
                if step == 1:  # warm
                    started = time.perf_counter()
                else:
                    tokens += made
            best[budget] = round(tokens / (time.perf_counter() - started), 1)
    fastest = max(best, key=lambda b: best[b])
    peak = memory_used(Device.CPU).peak
    print(
        json.dumps(
            {
                "what": arguments.what,
                "arms": arms,
                "tokens_per_second": best[fastest],
                "token_budget": fastest,
                "by_budget": best,
                "resident_bytes_before": loaded,
                "peak_bytes": peak,
                "dtype": plan.value("dtype"),
                "rows_of_update": plan.value("effective_batch_size"),
                "threads": torch.get_num_threads(),
            }
        )
    )


def rounded(losses: tuple[float, ...]) -> list[float]:
    return [round(x, 6) for x in losses]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("grid", "defaults", "sweep", "bank", "alone", "cells"))
    parser.add_argument("--case", choices=("gsm8k", "tickets"), default="tickets")
    parser.add_argument("--model", default=DEMO_ALIAS, help="SmolLM2-135M-Instruct, or a folder with it")
    parser.add_argument("--gsm8k", default="gsm8k_train.jsonl", help="GSM8K's training rows, as JSONL")
    parser.add_argument("--rate", type=float, help="of a sweep: the rate to begin at, where not the advice")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="where not the plan's own")
    parser.add_argument("--work", type=Path, default=Path("sweep-work"))
    parser.add_argument("--arms", default="1,2,4,8")
    parser.add_argument("--seconds", type=float, default=6.0, help="of measuring, for each token budget")
    parser.add_argument("--rounds", type=int, default=1, help="of the bank's comparison")
    parser.add_argument("--more", action="store_true", help="add them to those of the last result")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.what == "grid":
        run_grid(arguments)
    elif arguments.what == "defaults":
        run_defaults(arguments)
    elif arguments.what == "cells":
        run_cells()
    elif arguments.what == "sweep":
        run_sweep(arguments)
    elif "," in arguments.arms:
        run_bank(arguments)
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
