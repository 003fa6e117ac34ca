"""LoRA SFT of SmolLM2-135M on GSM8K, fp32 on the CPU: tokens per second, peak memory and share of the GEMM floor.

    python benchmarks/sft_cpu.py [--data gsm8k.jsonl] [--trl-python ENV/bin/python] [--unsloth-python ENV/bin/python]

The systems run in turn (A B C A B C ...), each in a process of its own, the floor measured around each run; medians are
quoted. Tokens are real ones, without padding. Let nothing else run meanwhile.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import describe_machine, write_result
from gemm_floor import gemm_floor

from welltuned.data.source import read_rows
from welltuned.facts.model import read_model_facts
from welltuned.models.resolve import DEMO_ALIAS

PEERS = Path(__file__).parent / "peers"
R, BATCH = 16, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="GSM8K's training rows as JSONL (question, answer); unset: from the hub")
    parser.add_argument("--rows", type=int, default=64, help="rows of a run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each system (default: %(default)s)")
    parser.add_argument("--trl-python", help="python of an environment with TRL and PEFT")
    parser.add_argument("--unsloth-python", help="python of an environment with Unsloth")
    arguments = parser.parse_args()
    pythons = {"welltuned": sys.executable, "trl": arguments.trl_python, "unsloth": arguments.unsloth_python}
    systems = {name: python for name, python in pythons.items() if python}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    with tempfile.TemporaryDirectory() as folder:
        arguments.data = str(Path(arguments.data).resolve()) if arguments.data else downloaded_gsm8k(Path(folder))
        model = saved_model(Path(folder) / "model")
        for turn in range(arguments.rounds):
            for name, python in systems.items():
                runs[name].append(one_run(name, python, model, arguments))
                print(f"round {turn + 1}: {name} {json.dumps(runs[name][-1])}", file=sys.stderr)
    result = summary(runs, arguments)
    print(json.dumps(result["median"], indent=1))
    print(write_result("sft_cpu", result))


def downloaded_gsm8k(folder: Path) -> str:
    path = folder / "gsm8k_train.jsonl"
    rows = read_rows("openai/gsm8k", "main", "train")
    path.write_text("".join(json.dumps(row.record) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def saved_model(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a folder of safetensors, which every system loads."""
    import torch

    from welltuned.models.load import load_model, load_tokenizer

    load_model(DEMO_ALIAS, dtype=torch.float32).save_pretrained(folder)
    load_tokenizer(DEMO_ALIAS).save_pretrained(folder)
    return folder


def one_run(name: str, python: str, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One process; its last line of output is its result. The floor is the better of before and after."""
    before = gemm_floor()
    command = [python, str(PEERS / f"{name}_sft.py"), str(model), arguments.data, str(arguments.rows), str(BATCH)]
    with tempfile.TemporaryDirectory() as folder:  # Unsloth writes a cache where it stands
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "floor_gflops": max(before, gemm_floor())}


def flops_per_token(share: float, length: float) -> float:
    """4N + 4fVh + 7LSd + 6P: LoRA without recomputation, the head on labelled rows, causal attention.

    Args:
        share: labelled tokens over all tokens.
        length: mean over tokens of the length of the token's example.
    """
    facts = read_model_facts(DEMO_ALIAS)
    return (
        4 * facts.trunk_linear_parameters
        + 4 * share * facts.head_parameters
        + 7 * facts.layers * length * facts.attention_width
        + 6 * facts.lora_parameters(R)
    )


def summary(runs: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> dict[str, Any]:
    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[name])

    own = runs["welltuned"][0]
    per_token = flops_per_token(own["supervised_tokens"] / own["tokens"], token_mean_length(arguments))
    shares = [run["tokens_per_s"] * per_token / 1e9 / run["floor_gflops"] for run in runs["welltuned"]]
    medians: dict[str, Any] = {
        name: {"tokens_per_s": round(median(name, "tokens_per_s"), 1), "peak_gb": round(median(name, "peak_rss_gb"), 2)}
        for name in runs
    }
    medians["welltuned"]["share_of_gemm_floor"] = round(statistics.median(shares), 3)
    for name in runs:
        if name != "welltuned":
            pairs = zip(runs["welltuned"], runs[name], strict=True)
            medians[name]["welltuned_speed_ratio"] = round(
                statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs), 2
            )
            medians[name]["welltuned_memory_ratio"] = round(
                median("welltuned", "peak_rss_gb") / median(name, "peak_rss_gb"), 2
            )
    return {
        "what": __doc__.splitlines()[0],
        "machine": describe_machine(),
        "rows": arguments.rows,
        "effective_batch_size": BATCH,
        "r": R,
        "flops_per_token": per_token,
        "median": medians,
        "shares_of_gemm_floor": [round(share, 3) for share in shares],
        "runs": runs,
    }


def token_mean_length(arguments: argparse.Namespace) -> float:
    from welltuned.data.formats import to_conversations
    from welltuned.data.render import render_all
    from welltuned.models.load import load_tokenizer

    rows = read_rows(arguments.data)[: arguments.rows]
    lengths = [len(e.ids) for e in render_all(to_conversations(rows).items, load_tokenizer(DEMO_ALIAS)).examples]
    return sum(n * n for n in lengths) / sum(lengths)


if __name__ == "__main__":
    main()
