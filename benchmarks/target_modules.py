"""QLoRA on all linear layers, on the MLPs alone and on attention alone, at equal budget: held-out loss and its error.

    python benchmarks/target_modules.py [--dataset tickets|gsm8k] [--updates N] [--batch B] [--minutes M] [--report]

SmolLM2-135M in NF4. Every arm gets the same updates on the same rows in the same order. Once at an equal rank (16, so
that the arms differ in size), once at an equal number of trained parameters (ranks chosen to match). The rates of an
arm train at once, as adapters of one bank: half, once and twice the law's, and further out where the best lies at an
end, so that each arm is judged at a rate that suits it. Two seeds: other starts of A and another order of the rows.
Losses of two arms are compared row by row, since the rows differ more than the arms do.

Each finished run is a line of results/target_modules.jsonl at once, and is not run again; the comparison goes to
target_modules.json and target_modules.svg.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import RESULTS, describe_machine, write_result
from lr_law import Trainee, append, rows_of, standard_error, train_cell
from lr_law_cells import Cell
from target_modules_plot import Arm, draw

from welltuned.advice.learning_rate import RateSetting, lora_rate
from welltuned.facts.model import read_model_facts
from welltuned.models.fuse import find_head, fuse
from welltuned.models.load import load_model
from welltuned.models.lora import LoraSettings, attach
from welltuned.models.packed import packed_model
from welltuned.models.resolve import DEMO_ALIAS
from welltuned.objectives.supervised import supervised_tokens

RUNS, ALPHA, RANK, SEEDS = RESULTS / "target_modules.jsonl", 16.0, 16, (3407, 1)
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TARGETS = {"all": (*ATTENTION, *MLP), "mlp": MLP, "attention": ATTENTION}
FURTHER = 2  # factors of two beyond the grid of three


@dataclass(frozen=True, slots=True)
class Choice:
    """One arm at one rank."""

    targets: str
    r: int

    @property
    def name(self) -> str:
        return f"{self.targets} r{self.r}"


def parameters(targets: str, r: int) -> int:
    return read_model_facts(DEMO_ALIAS).lora_parameters(r, TARGETS[targets])


def equal_size(targets: str) -> int:
    """The rank at which these targets have as many parameters as all have at RANK, as nearly as a rank allows."""
    return round(parameters("all", RANK) / parameters(targets, 1))


def choices() -> list[Choice]:
    return [
        *(Choice(name, RANK) for name in TARGETS),
        *(Choice(name, equal_size(name)) for name in TARGETS if name != "all"),
    ]


class Runner:
    """The quantised model, and the cells that are done."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.model = load_model(DEMO_ALIAS, dtype=torch.float32, device="cpu", nf4=True)
        self.head = find_head(self.model)
        self.rows = rows_of(arguments.dataset, arguments.gsm8k, arguments.longest, arguments.held_out)

    def run(self, choice: Choice, seed: int, factors: list[float]) -> None:
        given, started = self.arguments, time.time()
        cell = Cell(given.dataset, given.updates, given.batch, choice.r, ALPHA, seed)
        settings = LoraSettings(r=choice.r, lora_alpha=ALPHA, seed=seed, target_modules=TARGETS[choice.targets])
        bank = attach(self.model, [settings] * len(factors))
        fused = fuse(self.model, bank)
        trainee = Trainee(bank, self.head, 2048)
        rates = [advised(given, choice) * factor for factor in factors]
        try:
            with packed_model(self.model):
                sums, tokens = train_cell(trainee, self.rows, cell, rates)
        finally:
            fused.undo()
            bank.detach()
        supervised = [supervised_tokens(e) for e in self.rows.held_out]
        for factor, rate, row in zip(factors, rates, sums.tolist(), strict=True):
            mean = sum(row) / sum(supervised)
            append(
                RUNS,
                {
                    **setting(given),
                    **asdict(choice),
                    "seed": seed,
                    "factor": factor,
                    "learning_rate": rate,
                    "alpha_rate": round(rate * ALPHA, 6),
                    "parameters": parameters(choice.targets, choice.r),
                    "loss": round(mean, 5) if math.isfinite(mean) else None,
                    "standard_error": standard_error(row, supervised),
                    "tokens": tokens,
                    "seconds": round((time.time() - started) / len(factors), 1),
                    "held_out_sums": [round(s, 3) for s in row],
                    "held_out_tokens": supervised,
                },
            )


def setting(given: argparse.Namespace) -> dict[str, Any]:
    return {"dataset": given.dataset, "updates": given.updates, "batch": given.batch}


def advised(given: argparse.Namespace, choice: Choice) -> float:
    """The law's rate for this run."""
    law = RateSetting(
        family="llama",
        parameters=read_model_facts(DEMO_ALIAS).parameters,
        batch=given.batch,
        updates=given.updates,
        r=choice.r,
        alpha=ALPHA,
    )
    return float(lora_rate(law).value)


def done(given: argparse.Namespace, choice: Choice, seed: int) -> dict[float, dict[str, Any]]:
    """Finished runs of an arm and a seed, by factor."""
    wanted = {**setting(given), **asdict(choice), "seed": seed}
    lines = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    return {run["factor"]: run for run in lines if all(run.get(key) == value for key, value in wanted.items())}


def missing(runs: dict[float, dict[str, Any]]) -> list[float]:
    """Factors of the advised rate that are still to be tried; none once the best has a worse neighbour on each side."""
    if not runs:
        return [0.5, 1.0, 2.0]
    best = best_of(runs)["factor"]
    wanted = [f for f in (best / 2, best * 2) if f not in runs and 2.0**-FURTHER / 2 <= f <= 2.0**FURTHER * 2]
    return wanted[:1]


def best_of(runs: dict[float, dict[str, Any]]) -> dict[str, Any]:
    return min(runs.values(), key=lambda run: math.inf if run["loss"] is None else run["loss"])


def report(given: argparse.Namespace) -> None:
    """The comparison against all linear layers, of the seeds that every arm has."""
    seeds = [seed for seed in SEEDS if all(done(given, choice, seed) for choice in choices())]
    if not seeds:
        return
    arms = {choice.name: [done(given, choice, seed) for seed in seeds] for choice in choices()}
    best = {name: [best_of(runs) for runs in by_seed] for name, by_seed in arms.items()}
    base = best[f"all r{RANK}"]
    found = [compared(name, runs, base) for name, runs in best.items()]
    document = {
        "machine": describe_machine(),
        "model": "SmolLM2-135M-Instruct, NF4",
        **setting(given),
        "alpha": ALPHA,
        "seeds": seeds,
        "held_out_rows": len(base[0]["held_out_sums"]),
        "arms": found,
    }
    path = write_result(f"target_modules_{given.dataset}", document)
    curves = [
        Arm(one["arm"], one["parameters"], curve(arms[one["arm"]]), one["loss"], one["standard_error_of_difference"])
        for one in found
    ]
    path.with_suffix(".svg").write_text(draw(curves, f"{given.dataset}, {given.updates} updates of {given.batch}"))
    for one in found:
        print(one)


def compared(name: str, runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """An arm at its best rates beside all linear layers, the mean of its seeds, row by row."""
    difference = [
        sum(a["held_out_sums"][i] - b["held_out_sums"][i] for a, b in zip(runs, base, strict=True)) / len(runs)
        for i in range(len(base[0]["held_out_sums"]))
    ]
    tokens = base[0]["held_out_tokens"]
    by_seed = [a["loss"] - b["loss"] for a, b in zip(runs, base, strict=True)]
    return {
        "arm": name,
        "parameters": runs[0]["parameters"],
        "learning_rate": [run["learning_rate"] for run in runs],
        "factor_of_the_law": [run["factor"] for run in runs],
        "loss_by_seed": [run["loss"] for run in runs],
        "loss": round(sum(run["loss"] for run in runs) / len(runs), 5),
        "less_all": round(sum(difference) / sum(tokens), 5),
        "standard_error_of_difference": standard_error(difference, tokens),
        "less_all_by_seed": [round(d, 5) for d in by_seed],
    }


def curve(seeds: list[dict[float, dict[str, Any]]]) -> list[tuple[float, float]]:
    """(alpha · rate, loss) where both seeds have the rate and are finite: the mean of both."""
    shared = sorted(set.intersection(*(set(runs) for runs in seeds)))
    points = [(seeds[0][f]["alpha_rate"], [runs[f]["loss"] for runs in seeds]) for f in shared]
    return [(x, sum(ys) / len(ys)) for x, ys in points if all(y is not None for y in ys)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=("tickets", "gsm8k"), default="tickets")
    parser.add_argument("--gsm8k", default="openai/gsm8k", help="GSM8K's training rows (default: from the hub)")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--longest", type=int, default=140, help="most tokens of a row")
    parser.add_argument("--held-out", type=int, default=48, help="held-out rows, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this many")
    parser.add_argument("--report", action="store_true", help="only compare what is done")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    started = time.time()
    runner: Runner | None = None
    cells = [(choice, seed) for seed in SEEDS for choice in choices()] if not given.report else []
    for choice, seed in cells:
        while (factors := missing(done(given, choice, seed))) and time.time() - started < 60 * given.minutes:
            runner = runner or Runner(given)
            runner.run(choice, seed, factors)
            print(choice.name, seed, {f: r["loss"] for f, r in done(given, choice, seed).items()}, flush=True)
    report(given)


if __name__ == "__main__":
    main()
