"""Held-out loss against learning rate, number of updates, batch size and rank: what the law for short runs rests on.

    python benchmarks/lr_law.py [--grid cpu|whole] [--device cpu|cuda] [--gsm8k FILE] [--minutes M] [--only PATTERN]
    python benchmarks/lr_law_fit.py        # the fit, its test on cells left out, the plot

A **cell** is a dataset, a number of updates, a batch size, a rank, an alpha and a seed. All its runs see the same rows
in the same order, start from the same A, and are judged on the same held-out rows; only the rate differs, by factors of
two in alpha · rate. Warm-up, decay, AdamW and clipping are what `welltuned plan` chooses for that number of updates.
Every finished run is a line of results/lr_law.jsonl at once, and a line that is there is not run again.

`--grid cpu`: SmolLM2-135M on short rows, the cells where a core learns most in an hour. Rates are tried outward from a
guess until the best has a worse neighbour on both sides. `--grid whole`: every cell of {30, 120, 480} updates × {4, 16,
64} rows × r {8, 64} on both datasets, for a GPU (bf16). There all rates of a cell train at once, as adapters of one
bank on one base: from the lowest of `WHOLE_RATES` to the highest, at which runs diverge.

A run whose loss is not finite, or ends above where it started, has diverged and says so.
"""

import argparse
import fnmatch
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, describe_machine
from lr_law_cells import CPU_CELLS, WHOLE_CELLS, Cell

from welltuned.advice.learning_rate import RateSetting, lora_rate
from welltuned.advice.rules import number, rule
from welltuned.advice.schedule import choose_warmup
from welltuned.data.formats import to_conversations
from welltuned.data.mix import Mixture
from welltuned.data.packing import pack
from welltuned.data.render import Example, render_all
from welltuned.data.source import read_rows
from welltuned.facts.model import read_model_facts
from welltuned.kernels.token_loss import Head
from welltuned.models.fuse import find_head, fuse
from welltuned.models.load import load_model, load_tokenizer
from welltuned.models.lora import AdapterBank, LoraSettings, attach
from welltuned.models.packed import packed_model
from welltuned.models.resolve import DEMO_ALIAS
from welltuned.objectives.supervised import collate, loss, supervised_tokens
from welltuned.training.optimizer import AdamWSettings, FlatAdamW, Schedule, Scheduler, clip_

RUNS = RESULTS / "lr_law.jsonl"
UNIT = 1e-3  # alpha · rate of step 0 of every cell's grid; step k is UNIT · 2^k
WHOLE_RATES = range(1, 10)  # 0.002 to 0.51
PEER = math.log2(6.4)  # 2e-4 at alpha 32, the highest of the common defaults: run beside every bracket
MOST_EPOCHS = 5.0  # a cell that would see its rows more often than this is another question, and left out
LONGEST = {"cpu": 140, "whole": 256}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Rows:
    train: Sequence[Example]
    held_out: Sequence[Example]


@dataclass(frozen=True, slots=True)
class Bench:
    """What all runs share. `budget`: most tokens of a micro-batch, all adapters together."""

    arguments: argparse.Namespace
    dtype: torch.dtype
    budget: int
    runs: Path


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def rows_of(dataset: str, gsm8k: str, longest: int, held_out: int) -> Rows:
    """Training and held-out rows of at most `longest` tokens, in the file's order; GSM8K's held-out rows come first."""
    tokenizer = load_tokenizer(DEMO_ALIAS)

    def rendered(path: str) -> list[Example]:
        examples = render_all(to_conversations(read_rows(path)).items, tokenizer).examples
        return [e for e in examples if len(e.ids) <= longest]

    if dataset == "gsm8k":
        short = rendered(gsm8k)
        return Rows(short[held_out:], short[:held_out])
    with as_file(files("welltuned").joinpath("demo_data")) as folder:
        return Rows(rendered(str(folder / "train.jsonl")), rendered(str(folder / "heldout.jsonl"))[:held_out])


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Trainee:
    """A base with a bank of adapters on it, one for every rate."""

    bank: AdapterBank
    head: Head | None
    budget: int

    def losses(self, examples: Sequence[Example], weight: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """By micro-batch: the weighted loss summed over all adapters, and the plain sums [K, examples].

        Every adapter sees every example. The rows of one adapter are consecutive, as the bank wants them.
        """
        k = len(self.bank.settings)
        for bin_ in pack([len(e.ids) for e in examples], max(1, self.budget // k)):
            chosen = [examples[i] for i in bin_]
            batch = collate(chosen * k, self.bank.model.device)
            self.bank.use_rows((sum(len(e.ids) for e in chosen),) * k, ())
            weight_M = torch.full((len(batch.target_M),), weight, device=batch.target_M.device)
            value, nll_M = loss(self.bank.model, self.head, batch, weight_M)
            sums = torch.zeros(k * len(chosen), dtype=torch.float64, device=nll_M.device)
            sums.index_add_(0, batch.example_M, nll_M.double())
            out = torch.zeros(k, len(examples), dtype=torch.float64)
            out[:, torch.tensor(bin_)] = sums.view(k, -1).cpu()
            yield value, out

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example]) -> torch.Tensor:
        """Summed losses [K, examples]."""
        return torch.stack([sums for _, sums in self.losses(examples, 1.0)]).sum(0)


def train_cell(trainee: Trainee, rows: Rows, cell: Cell, rates: Sequence[float]) -> tuple[torch.Tensor, int]:
    """Train one adapter at each rate; held-out losses summed by example [K, examples], and tokens."""
    bank, total = trainee.bank, cell.updates
    bank.flat_KP.copy_(bank.start_KP)
    warmup = choose_warmup(total, "linear").value
    schedules = [Schedule(kind=Scheduler.LINEAR, peak=rate, warmup_steps=warmup, total_steps=total) for rate in rates]
    optimizer = FlatAdamW(bank.flat_KP, bank.grad_KP, bank.decayed, adamw())
    bank.claim_gradients()
    order = Mixture((len(rows.train),), (len(rows.train),), cell.seed)
    tokens = 0
    for step in range(total):
        chosen = [rows.train[i] for i in order.update(cell.batch, step)]
        optimizer.zero_grad()
        for value, _ in trainee.losses(chosen, 1.0 / sum(supervised_tokens(e) for e in chosen)):
            value.backward()
        clip_(bank.grad_KP, rule("clip").value)
        optimizer.step([schedule.rate(step) for schedule in schedules])
        tokens += sum(len(e.ids) for e in chosen)
    return trainee.evaluate(rows.held_out), tokens


def adamw() -> AdamWSettings:
    return AdamWSettings(
        beta1=number("adam_beta1"), beta2=number("adam_beta2"), weight_decay=rule("weight_decay").value
    )


class Runner:
    """Keeps the model between runs; adapters are changed where rank, alpha, seed or their number do."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.model = load_model(DEMO_ALIAS, dtype=bench.dtype, device=bench.arguments.device)
        self.head = find_head(self.model)
        self.settings: list[LoraSettings] = []
        self.start: dict[str, float] = {}

    def rows(self, cell: Cell) -> Rows:
        given = self.bench.arguments
        return rows_of(cell.dataset, given.gsm8k, given.longest, given.held_out)

    def trainee(self, cell: Cell, adapters: int) -> Trainee:
        wanted = [LoraSettings(r=cell.r, lora_alpha=cell.alpha, seed=cell.seed)] * adapters
        if wanted != self.settings:
            if self.settings:
                self.fused.undo()
                self.bank.detach()
            self.settings, self.bank = wanted, attach(self.model, wanted)
            self.fused = fuse(self.model, self.bank)
        return Trainee(self.bank, self.head, self.bench.budget)

    def run(self, cell: Cell, steps: Sequence[float]) -> None:
        """Train the cell at the rates of these grid steps, and write a line for each."""
        rows, started = self.rows(cell), time.time()
        supervised = [supervised_tokens(e) for e in rows.held_out]
        trainee = self.trainee(cell, len(steps))
        with packed_model(self.model):
            if cell.dataset not in self.start:
                trainee.bank.flat_KP.copy_(trainee.bank.start_KP)
                self.start[cell.dataset] = float(trainee.evaluate(rows.held_out)[0].sum()) / sum(supervised)
            found, tokens = train_cell(trainee, rows, cell, [UNIT * 2.0**k / cell.alpha for k in steps])
        for k, sums in zip(steps, found.tolist(), strict=True):
            mean = sum(sums) / sum(supervised)
            diverged = not math.isfinite(mean) or mean > self.start[cell.dataset]
            append(
                self.bench.runs,
                {
                    "cell": cell.name,
                    **asdict(cell),
                    "step": round(k, 3),
                    "alpha_rate": round(UNIT * 2.0**k, 6),
                    "loss": round(mean, 5) if math.isfinite(mean) else None,
                    "standard_error": standard_error(sums, supervised),
                    "start_loss": round(self.start[cell.dataset], 5),
                    "diverged": diverged,
                    "epochs": round(cell.updates * cell.batch / len(rows.train), 3),
                    "tokens": tokens,
                    "seconds": round((time.time() - started) / len(steps), 1),
                    "dtype": str(self.bench.dtype).removeprefix("torch."),
                    "device": self.bench.arguments.device,
                    "longest": self.bench.arguments.longest,
                    "held_out_sums": [round(s, 2) if math.isfinite(s) else None for s in sums],
                    "held_out_tokens": supervised,
                },
            )


def standard_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Of the mean loss over examples, as that of a ratio of sums (`training.step.Evaluation`)."""
    n, total = len(sums), sum(counts)
    mean = sum(sums) / total
    if not math.isfinite(mean):
        return None
    spread = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return round(math.sqrt(spread * n / (n - 1)) / total, 5)


# ── which runs ───────────────────────────────────────────────────────────────────────────────────────────────────────


def append(path: Path, line: dict[str, Any]) -> None:
    """One write of one whole line, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_runs(path: Path = RUNS) -> list[dict[str, Any]]:
    """Finished runs; a session's description of its machine is no run."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "cell" in line]


def losses_of(cell: Cell, path: Path) -> dict[float, float]:
    """Loss by grid step; a diverged run counts as infinite."""
    return {
        run["step"]: math.inf if run["diverged"] else run["loss"] for run in read_runs(path) if run["cell"] == cell.name
    }


def on_grid(losses: dict[float, float]) -> dict[int, float]:
    return {int(k): loss for k, loss in losses.items() if k == int(k)}


def next_step(found: dict[float, float], guess: int) -> int | None:
    """The next grid step to try; None once the best one has a worse neighbour on both sides."""
    losses = on_grid(found)
    if not losses:
        return guess
    if min(losses.values()) == math.inf:
        return min(losses) - 1
    best = min(losses, key=lambda k: losses[k])
    return next((k for k in (best + 1, best - 1) if k not in losses), None)


def guess(cell: Cell, path: Path) -> int:
    """The law's optimum as a grid step, less what it missed by in the nearest cell that is done."""
    done = [c for c in CPU_CELLS if c != cell and (found := losses_of(c, path)) and next_step(found, 0) is None]
    step = law_step(cell)
    if done:
        near = min(done, key=lambda c: distance(c, cell))
        found = on_grid(losses_of(near, path))
        step += min(found, key=lambda k: found[k]) - law_step(near)
    return round(step)


def law_step(cell: Cell) -> float:
    setting = RateSetting(
        family="llama",
        parameters=read_model_facts(DEMO_ALIAS).parameters,
        batch=cell.batch,
        updates=cell.updates,
        r=cell.r,
        alpha=cell.alpha,
    )
    return math.log2(lora_rate(setting).value * cell.alpha / UNIT)


def distance(a: Cell, b: Cell) -> float:
    numbers = [(a.updates, b.updates), (a.batch, b.batch), (a.r, b.r), (a.alpha, b.alpha)]
    return sum(abs(math.log(x / y)) for x, y in numbers) + (a.dataset != b.dataset)


def bracket(runner: Runner, cell: Cell) -> bool:
    """One more run towards a bracketed optimum; False where there is nothing left to do."""
    runs = runner.bench.runs
    step = next_step(losses_of(cell, runs), guess(cell, runs))
    if step is not None:
        runner.run(cell, [step])
    return step is not None


def beside(runner: Runner, cell: Cell) -> bool:
    """The run at the peers' rate, once."""
    missing = round(PEER, 3) not in losses_of(cell, runner.bench.runs)
    if missing:
        runner.run(cell, [PEER])
    return missing


def at_once(runner: Runner, cell: Cell) -> bool:
    """All rates of the cell together, those that diverge included."""
    done = losses_of(cell, runner.bench.runs)
    missing = [k for k in (*WHOLE_RATES, PEER) if round(k, 3) not in done]
    if missing:
        runner.run(cell, missing)
    return bool(missing)


def work(grid: str) -> Iterator[tuple[Callable[[Runner, Cell], bool], Cell]]:
    """What to do to which cell, the most telling first."""
    if grid == "whole":
        yield from ((at_once, cell) for cell in WHOLE_CELLS)
        return
    yield from ((bracket, cell) for cell in CPU_CELLS)
    yield from ((beside, cell) for cell in CPU_CELLS)


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    bench = Bench(
        arguments,
        {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(arguments.dtype, DTYPES[arguments.device]),
        2048 if arguments.device == "cpu" else 65536,
        arguments.runs,
    )
    runner, started = Runner(bench), time.time()
    append(bench.runs, {"session": describe_machine(), "threads": arguments.threads, "grid": arguments.grid})

    for step, cell in work(arguments.grid):
        if not fnmatch.fnmatch(cell.name, arguments.only):
            continue
        rows = len(runner.rows(cell).train)
        if cell.updates * cell.batch > MOST_EPOCHS * rows:
            print(f"{cell.name}: left out, more than {MOST_EPOCHS:g} epochs of {rows} rows")
            continue
        while time.time() - started < 60 * arguments.minutes and step(runner, cell):
            print(cell.name, losses_of(cell, bench.runs), flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", choices=("cpu", "whole"), default="cpu")
    parser.add_argument("--device", choices=tuple(DTYPES), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="unset: float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--gsm8k", default="openai/gsm8k", help="GSM8K's training rows (default: from the hub)")
    parser.add_argument("--longest", type=int, help="most tokens of a row (default: 140, or 256 for the whole grid)")
    parser.add_argument("--held-out", type=int, default=48, help="held-out rows (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this many")
    parser.add_argument("--only", default="*", help="cells whose name matches, such as 'gsm8k/u30/*'")
    parser.add_argument("--runs", type=Path, default=RUNS)
    arguments = parser.parse_args()
    arguments.longest = arguments.longest or LONGEST[arguments.grid]
    return arguments


if __name__ == "__main__":
    main()
