"""Kill a run again and again, at random moments, resume it each time, and compare its result with an undisturbed one's.

    python benchmarks/faults.py [--kills 200] [--kills-a-run 10] [--jobs 2] [--seed 0]

A tiny model on the CPU, so that the time goes into kills; dropout, packing and evaluation on, LoRA and full
fine-tuning in turn. SIGKILL comes from another process when the victim has used a random amount of processor time,
whatever it is doing. Lost is a run that cannot be resumed, or whose metrics, weights or moments differ by a bit.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch

UPDATES, SAVE_STEPS, TUNES = 24, 2, ["lora", "full"]
TIMES = ("tokens_per_second", "memory_bytes")  # what differs between two runs of one recipe


def main() -> None:
    from common import describe_machine, write_result

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="how many in all (default: %(default)s)")
    parser.add_argument("--kills-a-run", type=int, default=10, help="of one run (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at work at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WELLTUNED_CACHE"] = str(Path(folder) / "cache")
        model, data = made_up(Path(folder))
        asked = (arguments.kills, arguments.kills_a_run, arguments.seed, arguments.jobs)
        found = {**soak(Path(folder), model, data, *asked), **describe_machine()}
    print(json.dumps(found, indent=1))
    print(write_result("faults", found))
    sys.exit(1 if found["lost"] else 0)


def made_up(folder: Path) -> tuple[str, str]:
    """A Llama of two layers with a tokenizer of its own, and 80 rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *characters]
    raw = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens(names[:3])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(names), max_position_embeddings=256, eos_token_id=2, pad_token_id=0, **shape)
    config.initializer_range, config.tie_word_embeddings = 0.2, True
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"{i} times", "completion": " ".join([f"word{i % 7}"] * (1 + i % 5))} for i in range(80)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / "model"), str(folder / "rows.jsonl")


def options(tune: str, model: str, data: str) -> dict[str, Any]:
    of_tune = {"lora": dict(r=4, lora_dropout=0.1, learning_rate=2e-2), "full": dict(learning_rate=5e-3)}[tune]
    return {
        **dict(model=model, data=data, tune=tune, effective_batch_size=8, max_steps=UPDATES, token_budget=200),
        **dict(packing=True, eval_steps=10, save_steps=SAVE_STEPS, save_total_limit=2, early_stopping_patience=0),
        **of_tune,
    }


def soak(folder: Path, model: str, data: str, kills: int, kills_a_run: int, seed: int, jobs: int = 1) -> dict[str, Any]:
    """Kill, resume and compare until so many kills were made, in several processes at once."""
    import welltuned

    started = time.time()
    straight, seconds = {}, {}
    for tune in TUNES:
        before = time.process_time()
        straight[tune] = folder / f"straight-{tune}"
        welltuned.train(out=straight[tune], **options(tune, model, data))
        seconds[tune] = time.process_time() - before
    shares = [kills // jobs + (job < kills % jobs) for job in range(jobs)]
    work = [(folder / f"job{job}", model, data, share, kills_a_run, seed + job) for job, share in enumerate(shares)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        parts = list(pool.map(partial(share_of, straight=straight, seconds=seconds), *zip(*work, strict=True)))
    runs = [run for part in parts for run in part]
    setting = {"updates": UPDATES, "save_steps": SAVE_STEPS, "tune": TUNES, "seed": seed, "jobs": jobs}
    return {**summary(runs), "setting": setting, "seconds": round(time.time() - started)}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Tried, survived, lost: kills of a run whose result differs are all lost."""
    found = sum((Counter(run["found"]) for run in runs), Counter())
    tried = sum(run["kills"] for run in runs)
    lost = sum(run["kills"] for run in runs if not run["survived"])
    return {
        "what": "random SIGKILLs of runs, each resumed; the result compared bit by bit with an undisturbed run's",
        "tried": tried,
        "survived": tried - lost,
        "lost": lost,
        "runs": len(runs),
        "runs_that_differ": sum(not run["survived"] for run in runs),
        "resumes": sum(run["resumes"] for run in runs),
        "found_after_a_kill": dict(found.most_common()),
    }


def share_of(
    folder: Path,
    model: str,
    data: str,
    kills: int,
    kills_a_run: int,
    seed: int,
    straight: dict[str, Path],
    seconds: dict[str, float],
) -> list[dict[str, Any]]:
    """One process's kills: of one run after the other."""
    folder.mkdir()
    draw, runs = random.Random(seed), []
    while (left := kills - sum(run["kills"] for run in runs)) > 0:
        tune, place = TUNES[len(runs) % 2], folder / "run"
        run = one_run(place, tune, model, data, min(kills_a_run, left), draw, 0.5 * seconds[tune])
        run["survived"] = (place / "run.json").exists() and same(place, straight[tune])
        runs.append(run)
        print(json.dumps(run), file=sys.stderr, flush=True)
        if not run["survived"]:
            shutil.copytree(place, Path(tempfile.mkdtemp(prefix="lost-")) / "run")
        shutil.rmtree(place)
    return runs


def one_run(
    place: Path, tune: str, model: str, data: str, kills: int, draw: random.Random, longest: float
) -> dict[str, Any]:
    """Start a run, kill it up to so many times, each after at most `longest` seconds of work, and go on to its end."""
    made, resumes, found = 0, 0, Counter[str]()
    while not (place / "run.json").exists():
        first = not (place / "recipe.yaml").exists()
        work = _start(place, tune, model, data) if first else _go_on(place)
        code = killed_after(work, draw.uniform(0.0, longest) if made < kills else None)
        if code == -signal.SIGKILL:
            made += 1
            found[moment(place)] += 1
        elif code != 0:
            break
        resumes += not first
    return {"tune": tune, "kills": made, "resumes": resumes, "found": dict(found)}


def _start(place: Path, tune: str, model: str, data: str) -> Callable[[], object]:
    import welltuned

    return lambda: welltuned.train(out=place, **options(tune, model, data))


def _go_on(place: Path) -> Callable[[], object]:
    import welltuned

    return lambda: welltuned.resume(place)


def killed_after(work: Callable[[], object], processor_seconds: float | None) -> int:
    """Run `work` in a process of its own and kill it once it has used so much processor time; its exit code."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    process = psutil.Process(child)
    while processor_seconds is not None and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        used = process.cpu_times()
        left = processor_seconds - used.user - used.system
        if left <= 0:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(max(0.002, left))  # it cannot have used them up before
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def moment(place: Path) -> str:
    """What the run was doing when it was killed, by what it left."""
    if not (place / "started.json").exists():
        return "before the plan was written"
    if (place / "run.json").exists():
        return "after the end"
    if any(place.glob("adapter*")) or any(place.glob("model*")):
        return "while the result was written"
    checkpoints = place / "checkpoints"
    if any(checkpoints.glob("*.old")):
        return "while an old checkpoint was removed"
    if any(checkpoints.glob("*.tmp")):
        return "while a checkpoint was written"
    if not any(checkpoints.glob("step-*")):
        return "before the first checkpoint"
    return "between two saves"


def same(run: Path, straight: Path) -> bool:
    """Metrics but for times, weights, moments and the held-out losses, to the bit."""
    pairs = [(sorted(p.relative_to(place) for p in place.rglob("*.safetensors")), place) for place in (run, straight)]
    if pairs[0][0] != pairs[1][0]:
        return False
    equal = all((run / name).read_bytes() == (straight / name).read_bytes() for name in pairs[0][0])
    summaries = [json.loads((place / "run.json").read_text()) for place in (run, straight)]
    return equal and _lines(run) == _lines(straight) and summaries[0]["held_out"] == summaries[1]["held_out"]


def _lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found if line.get("event") != "note"]


if __name__ == "__main__":
    main()
