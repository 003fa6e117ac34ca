"""SFT, then DPO from its adapter, with the commands of the README: does the preference for the better answer rise?

    python benchmarks/two_step.py --data dpo_en_demo.json [--model MODEL] [--updates N] [--rate RATE]...

With several rates the second step is made with each of them, from one first step. Both steps hold out the same rows.
Of the held-out pairs the first evaluation of the second step is the start: margins of 0, since the model is its own
reference. Afterwards a pair counts where the chosen answer's log-probability has risen over the rejected one's.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import describe_machine, write_result

from welltuned.models.resolve import DEMO_ALIAS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="preference pairs")
    parser.add_argument("--model", default=DEMO_ALIAS, help="the base model (default: %(default)s)")
    parser.add_argument("--sft-updates", type=int, default=8, help="updates of the first step (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=24, help="updates of the second step (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="rows of an update (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=192, help="longest sequence (default: %(default)s)")
    parser.add_argument("--held-out", type=float, default=0.16, help="share of rows held out (default: %(default)s)")
    parser.add_argument("--rate", type=float, action="append", help="rate of the second step (default: 3e-4)")
    parser.add_argument("--no-result", action="store_true", help="print only, write no result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for result in two_steps(arguments, Path(folder)):
            print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=1), flush=True)
            if not arguments.no_result:
                print(write_result("two_step", result))


def two_steps(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The result, and again with every further rate."""
    common = [
        *("--model", arguments.model, "--data", arguments.data),
        *("--set", f"eval_fraction={arguments.held_out}", "--set", f"effective_batch_size={arguments.batch}"),
        *("--set", f"max_length={arguments.max_length}", "--set", "on_untrained=drop"),
    ]
    first = ["--set", f"max_steps={arguments.sft_updates}", "--set", "learning_rate=5e-4"]
    second = ["--method", "dpo", "--set", f"adapter={folder / 'sft'}", "--set", f"max_steps={arguments.updates}"]
    second += ["--set", "beta=0.1"]
    train(*common, *first, "--out", str(folder / "sft"))
    sft = read(folder / "sft")
    found = {}
    for rate in arguments.rate or [3e-4]:
        out = folder / f"dpo-{rate}"
        train(*common, *second, "--set", f"learning_rate={rate}", "--out", str(out))
        dpo = read(out)
        if not set(dpo["held_out"]["origins"]) <= set(sft["held_out"]["origins"]):
            raise SystemExit("the first step trained on rows that the second one holds out")
        found[f"{rate:g}"] = of_second_step(out, dpo)
        yield {
            "what": __doc__.splitlines()[0],
            "machine": describe_machine(),
            "arguments": {key: value for key, value in vars(arguments).items() if key not in ("data", "no_result")},
            "sft": {"before": sft["held_out"]["before"], "after": sft["held_out"]["after"], "seconds": sft["seconds"]},
            "dpo_by_rate": found,
        }


def of_second_step(out: Path, dpo: dict[str, Any]) -> dict[str, Any]:
    after, pairs = dpo["held_out"]["after"], dpo["held_out"]["rows"]
    accuracy = after["rewards/accuracies"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "held_out_pairs": pairs,
        "accuracy_at_the_start": 0.5,  # by definition: every margin is 0
        "accuracy_after": accuracy,
        "accuracy_standard_error": math.sqrt(accuracy * (1 - accuracy) / pairs),
        "loss_before": dpo["held_out"]["before"]["loss"],
        "after": after,
        "seconds": dpo["seconds"],
        "findings": [line for line in lines if line.get("event") == "finding"],
        "training_accuracies": [line["rewards/accuracies"] for line in lines if "loss" in line],
        "training_losses": [line["loss"] for line in lines if "loss" in line],
    }


def read(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return found


def train(*arguments: str) -> None:
    command = [sys.executable, "-m", "welltuned", "train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    main()
