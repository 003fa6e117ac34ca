"""A search against a dense grid, the throughput of a bank of arms, and its memory.

    python benchmarks/sweep.py grid  --case gsm8k|tickets [--gsm8k FILE] --work DIR    # once; goes on where it ended
    python benchmarks/sweep.py sweep --case gsm8k|tickets [--gsm8k FILE] --work DIR
    python benchmarks/sweep.py bank  [--arms 1,2,4,8]

**grid**: one bank trains seven rates around the advice, a factor of √2 apart, and the defaults of other tools, each to
its end, and judges all of them at every rung: with running averages, as a search does, and with the weights as they
are. **sweep**: what `welltuned sweep` finds on the same rows, the tokens that it takes, and its regret: the held-out
loss of its choice against the lowest of the grid's. The grid's rows also replay searches whose arms are the grid's.
**bank**: tokens a second, and peak memory, of K arms at once against the same K runs one after another, in turn
(A B A B), each in a process of its own.
"""

import argparse
import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from common import describe_machine, write_result

from welltuned.data.formats import to_conversations
from welltuned.data.render import render_all
from welltuned.data.source import read_rows
from welltuned.models.load import load_tokenizer
from welltuned.models.resolve import DEMO_ALIAS
from welltuned.recipe import load_recipe
from welltuned.search.arms import Question
from welltuned.search.sweep import SweepResult, is_sweep, resume_sweep, sweep
from welltuned.training.prepare import Prepared, prepare

LONGEST, HELD_OUT = 140, 100
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
    shape = {"max_steps": 80, "effective_batch_size": 4, "r": 16, "lora_alpha": 16.0}
    return {"model": model, "data": str(train), "eval_data": str(held_out), **shape}


def prepared_of(arguments: argparse.Namespace) -> Prepared:
    arguments.work.mkdir(parents=True, exist_ok=True)
    options = case_options(arguments.case, arguments.model, arguments.gsm8k, arguments.work)
    return prepare(load_recipe(None, {**options, "save_steps": 10}))


def searched(arguments: argparse.Namespace, question: Question, name: str, *, grid: bool) -> SweepResult:
    """Begin, or go on."""
    out, started = arguments.work / f"{arguments.case}-{name}", time.time()

    def tell(event: object) -> None:
        kind = type(event).__name__
        if kind != "ArmUpdated":
            print(f"{time.time() - started:7.0f} s  {event}", flush=True)

    if is_sweep(out):
        return resume_sweep(out, tell)
    return sweep(prepared_of(arguments), question, out, tell, grid=grid)


def run_grid(arguments: argparse.Namespace) -> None:
    advised = prepared_of(arguments).plan.value("learning_rate")
    rates = [float(f"{advised * 2 ** (k / 2):.2e}") for k in STEPS]
    question = Question(3, (("learning_rate", (*rates, *DEFAULTS.values())),))
    found = searched(arguments, question, "grid", grid=True)
    arms = [
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
    result = {
        "machine": describe_machine(),
        "case": arguments.case,
        "advised": advised,
        "updates": found.found.rows[0].total_updates,
        "seconds": round(found.run.seconds, 1),
        "tokens_per_second": round(found.run.tokens_per_second, 1),
        "weights": found.weights,
        "start_loss": None if found.run.before is None else found.run.before.loss,
        "arms": arms,
    }
    print(write_result(f"sweep_grid_{arguments.case}", result))


def rounded(losses: tuple[float, ...]) -> list[float]:
    return [round(x, 6) for x in losses]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("grid", "sweep", "bank"))
    parser.add_argument("--case", choices=("gsm8k", "tickets"), default="tickets")
    parser.add_argument("--model", default=DEMO_ALIAS, help="SmolLM2-135M-Instruct, or a folder with it")
    parser.add_argument("--gsm8k", default="gsm8k_train.jsonl", help="GSM8K's training rows, as JSONL")
    parser.add_argument("--work", type=Path, default=Path("sweep-work"))
    parser.add_argument("--arms", default="1,2,4,8")
    arguments = parser.parse_args()
    if arguments.what == "grid":
        run_grid(arguments)


if __name__ == "__main__":
    main()
