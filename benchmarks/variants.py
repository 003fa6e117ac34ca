"""Variants of LoRA beside LoRA, each at its own best rate: is one worth more than the rate?

    python benchmarks/variants.py [--updates N] [--batch B] [--minutes M] [--report]

SmolLM2-135M (4-bit GGUF, computed in float32) on the demo's tickets, every linear layer at rank 16, alpha 16. All arms
see the same rows in the same order and are judged on the same held-out rows; each has the law's rate, half and twice of
it, and further out where its best lies at an end. For LoRA+ the law speaks of B's rate. A difference to LoRA is that of
the rows, paired. LoftQ needs a 4-bit base: it is compared with plain QLoRA, and the error of its base before and after
is printed. Finished runs are lines of results/variants.jsonl; the comparison goes to variants.json.
"""

import argparse
import json
import math
import time
from typing import Any

import torch
from common import RESULTS, describe_machine, write_result
from lr_law import Trainee, adamw, append, rows_of, standard_error
from target_modules import Choice as Arm
from target_modules import advised, best_of, compared, missing

from welltuned.advice.rules import rule
from welltuned.advice.schedule import choose_warmup
from welltuned.data.mix import Mixture
from welltuned.models.fuse import find_head, fuse
from welltuned.models.load import load_model
from welltuned.models.lora import AdapterBank, attach, start_loftq
from welltuned.models.lora_settings import Init, LoraSettings
from welltuned.models.packed import packed_model
from welltuned.models.resolve import DEMO_ALIAS
from welltuned.objectives.supervised import supervised_tokens
from welltuned.training.optimizer import FlatAdamW, Schedule, Scheduler, Span, clip_

RUNS, ALPHA, RANK = RESULTS / "variants.jsonl", 16.0, 16
ARMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init": Init.PISSA},
    "olora": {"init": Init.OLORA},
    "lora+ 16": {},
    "qlora": {},
    "loftq": {"init": Init.LOFTQ},
}
RATIO = {"lora+ 16": 16.0}
QUANTISED = ("qlora", "loftq")


def train(given: argparse.Namespace, name: str, seed: int, rates: list[float]) -> tuple[list[list[float]], str]:
    """Held-out losses by rate and example, summed; and what LoftQ says."""
    nf4 = name in QUANTISED
    model = load_model(DEMO_ALIAS, dtype=torch.float32, nf4=nf4)
    rows = rows_of("tickets", "", given.longest, 48)
    settings = LoraSettings(r=RANK, lora_alpha=ALPHA, seed=seed, **ARMS[name])
    said, found = "", []
    bank = attach(model, settings)
    if settings.init is Init.LOFTQ:
        said = start_loftq(bank, load_model(DEMO_ALIAS, dtype=torch.float32)).sentence()
    fuse(model, bank)
    head = find_head(model)
    with packed_model(model):
        for rate in rates:
            bank.flat_KP.copy_(bank.start_KP)
            one_run(given, Trainee(bank, head, 2048), rows.train, seed, rate, RATIO.get(name, 1.0))
            found.append(Trainee(bank, head, 2048).evaluate(rows.held_out)[0].tolist())
    return found, said


def one_run(given: argparse.Namespace, trainee: Trainee, train_rows: Any, seed: int, rate: float, ratio: float) -> None:
    """All updates of one run at one rate; B's is `ratio` times A's."""
    bank: AdapterBank = trainee.bank
    warmup = choose_warmup(given.updates, "linear").value
    schedule = Schedule(kind=Scheduler.LINEAR, peak=rate, warmup_steps=warmup, total_steps=given.updates)
    factor = {"lora_B": ratio, "lora_magnitude_vector": ratio}
    spans = [Span(s.start, s.start + s.size, factor.get(s.name.rpartition(".")[2], 1.0)) for s in bank.slots]
    optimizer = FlatAdamW(bank.flat_KP, bank.grad_KP, bank.decayed, adamw(), spans)
    bank.claim_gradients()
    order = Mixture((len(train_rows),), (len(train_rows),), seed)
    for step in range(given.updates):
        chosen = [train_rows[i] for i in order.update(given.batch, step)]
        optimizer.zero_grad()
        for value, _ in trainee.losses(chosen, 1.0 / sum(supervised_tokens(e) for e in chosen)):
            value.backward()
        clip_(bank.grad_KP, rule("clip").value)
        optimizer.step([schedule.rate(step)])


def done(given: argparse.Namespace, name: str) -> dict[float, dict[str, Any]]:
    lines = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    wanted = {"arm": name, "updates": given.updates, "batch": given.batch, "seed": given.seed}
    return {run["factor"]: run for run in lines if all(run[key] == value for key, value in wanted.items())}


def run(given: argparse.Namespace, name: str, factors: list[float]) -> None:
    started, law = time.time(), advised(given, Arm("all", RANK)) / RATIO.get(name, 1.0)
    supervised = [supervised_tokens(e) for e in rows_of("tickets", "", given.longest, 48).held_out]
    sums, said = train(given, name, given.seed, [law * factor for factor in factors])
    for factor, row in zip(factors, sums, strict=True):
        mean = sum(row) / sum(supervised)
        line = {
            "arm": name,
            "updates": given.updates,
            "batch": given.batch,
            "seed": given.seed,
            "factor": factor,
            "learning_rate": law * factor,
            "parameters": 0,
            "loss": round(mean, 5) if math.isfinite(mean) else None,
            "standard_error": standard_error(row, supervised),
            "seconds": round((time.time() - started) / len(factors), 1),
            "held_out_sums": [round(s, 3) for s in row],
            "held_out_tokens": supervised,
            "loftq": said,
        }
        append(RUNS, line)


def report(given: argparse.Namespace) -> None:
    """Each arm at its best rate beside LoRA (QLoRA for LoftQ); written where all are there."""
    best = {name: best_of(runs) for name in ARMS if (runs := done(given, name))}
    if best.keys() != ARMS.keys():
        return
    arms = [compared(name, [run], [best["qlora" if name in QUANTISED else "lora"]]) for name, run in best.items()]
    for one in arms:
        del one["parameters"]
        print(one)
    document = {"machine": describe_machine(), "updates": given.updates, "batch": given.batch, "seed": given.seed}
    write_result("variants", {**document, "alpha": ALPHA, "r": RANK, "arms": arms, "loftq": best["loftq"]["loftq"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=3407)
    parser.add_argument("--longest", type=int, default=140, help="most tokens of a row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this many")
    parser.add_argument("--report", action="store_true", help="only compare what is done")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    started = time.time()
    for name in ARMS if not given.report else ():
        while (factors := missing(done(given, name))) and time.time() - started < 60 * given.minutes:
            run(given, name, factors)
            print(name, {factor: one["loss"] for factor, one in done(given, name).items()}, flush=True)
    report(given)


if __name__ == "__main__":
    main()
