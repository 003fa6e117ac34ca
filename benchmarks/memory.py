"""The memory forecast against what is measured on the CPU: allocated tensors, and the process as a whole.

    python benchmarks/memory.py [--only NAME]

Each configuration runs two updates, twice, in processes of their own. Allocated bytes are those of the tensors that are
alive before the first update plus torch's own record of every allocation after it; resident bytes are the kernel's, of
a run without that record. The forecast's overhead (the interpreter, libraries) belongs to the process only.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import describe_machine, write_result

from welltuned.models.resolve import DEMO_ALIAS

SMOL, WIDE, DEEP, VOCABULARY = "smollm2-135m", "wide-190m", "deep-360m", "vocabulary-100m"
# Random models with SmolLM2's tokenizer: memory does not depend on the numbers.
SHAPES: dict[str, dict[str, Any]] = {
    WIDE: {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 3, "num_attention_heads": 12,
           "num_key_value_heads": 4, "vocab_size": 49152},
    DEEP: {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
           "num_key_value_heads": 5, "vocab_size": 49152},
    VOCABULARY: {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8,
                 "num_key_value_heads": 8, "vocab_size": 151936},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One run: `row` tokens in each of `batch` examples, micro-batches of `budget` tokens."""

    model: str
    tune: str
    row: int
    batch: int
    budget: int
    checkpointing: bool = False
    r: int = 16

    @property
    def name(self) -> str:
        again = " checkpointed" if self.checkpointing else ""
        return f"{self.model} {self.tune} r{self.r} {self.batch}x{self.row} budget {self.budget}{again}"


CASES = (
    Case(SMOL, "lora", 250, 8, 2048),
    Case(SMOL, "lora", 250, 8, 512),
    Case(SMOL, "lora", 2000, 1, 2048),
    Case(SMOL, "lora", 250, 8, 2048, checkpointing=True),
    Case(SMOL, "lora", 250, 4, 1024, r=128),
    Case(SMOL, "qlora", 250, 8, 1024),
    Case(SMOL, "full", 250, 4, 512),
    Case(SMOL, "full", 500, 4, 2048, checkpointing=True),
    Case(WIDE, "lora", 120, 16, 2048),
    Case(WIDE, "qlora", 480, 4, 2048),
    Case(WIDE, "full", 240, 4, 1024),
    Case(DEEP, "lora", 250, 4, 1024),
    Case(DEEP, "qlora", 250, 4, 1024, checkpointing=True),
    Case(VOCABULARY, "lora", 250, 8, 2048),
    Case(VOCABULARY, "full", 250, 8, 2048),
    Case(VOCABULARY, "lora", 1000, 2, 1024),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the cases whose name holds this text")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)  # what a process of its own is told
    parser.add_argument("--recorded", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measure(CASES[arguments.case], arguments.recorded)))
        return
    found = []
    for index, case in enumerate(CASES):
        if arguments.only in case.name:
            found.append(compared(CASES[index], in_a_process(index, "--recorded"), in_a_process(index)))
            print(f"{case.name}: {sentence(found[-1])}", file=sys.stderr)
    errors = [abs(run["allocated_error"]) for run in found]
    resident = [abs(run["resident_error"]) for run in found]
    result = {
        "what": __doc__.splitlines()[0],
        "machine": describe_machine(),
        "largest_allocated_error": round(max(errors), 3),
        "largest_resident_error": round(max(resident), 3),
        "cases": found,
    }
    if not arguments.only:
        print(write_result("memory", result))


def in_a_process(index: int, *flags: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", str(index), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{CASES[index].name} failed:\n{done.stderr[-3000:]}")
    run: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return run


def compared(case: Case, recorded: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    parts, allocated, resident = recorded["parts"], recorded["allocated"], plain["resident"]
    forecast = sum(parts.values())
    tensors = forecast - parts["overhead"]
    return {
        **asdict(case),
        "parts": parts,
        "allocated": allocated,
        "resident": resident,
        "forecast": forecast,
        "forecast_without_overhead": tensors,
        "allocated_error": round(tensors / allocated - 1, 4),
        "resident_error": round(forecast / resident - 1, 4),
    }


def sentence(run: dict[str, Any]) -> str:
    return (
        f"allocated {run['allocated'] / 1e9:.3f} GB, forecast {run['forecast_without_overhead'] / 1e9:.3f} "
        f"({run['allocated_error']:+.1%}); resident {run['resident'] / 1e9:.3f} GB, forecast "
        f"{run['forecast'] / 1e9:.3f} ({run['resident_error']:+.1%})"
    )


def measure(case: Case, recorded: bool) -> dict[str, Any]:
    """Forecast by part, and the peak of one case, in bytes; allocations are counted where they are recorded."""
    from torch.profiler import ProfilerActivity, profile

    from welltuned.models.packed import packed_model
    from welltuned.recipe import load_recipe
    from welltuned.training.optimizer import FlatAdamW
    from welltuned.training.prepare import prepare
    from welltuned.training.process import allocator_keeps_memory
    from welltuned.training.run import adamw_settings, make_ready

    with tempfile.TemporaryDirectory() as folder, allocator_keeps_memory(_cpu()):
        prepared = prepare(load_recipe(None, options(case, Path(folder))))
        plan = prepared.plan
        ready = make_ready(plan)
        trained = ready.engine.trained
        trained.claim_gradients()
        optimizer = FlatAdamW(trained.flat_KP, trained.grad_KP, trained.decayed, adamw_settings(plan))
        alive = alive_bytes()
        examples = [prepared.train[i] for i in range(case.batch)]
        record = profile(activities=[ProfilerActivity.CPU], profile_memory=True) if recorded else nullcontext()
        with packed_model(ready.model), record:
            for _ in range(2):
                update(ready.engine, examples, optimizer, plan.value("max_grad_norm"))
    return {
        "parts": dict(plan.memory.parts),
        "allocated": alive + peak_of(record) if recorded else None,
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _cpu() -> Any:
    from welltuned.facts.machine import Device

    return Device.CPU


def update(engine: Any, examples: list[Any], optimizer: Any, max_grad_norm: float) -> None:
    from welltuned.training.optimizer import clip_
    from welltuned.training.step import accumulate_gradient

    optimizer.zero_grad()
    accumulate_gradient(engine, examples, list(range(len(examples))))
    clip_(engine.trained.grad_KP, max_grad_norm)
    optimizer.step([1e-4])


def options(case: Case, folder: Path) -> dict[str, Any]:
    """A recipe whose rows have the case's length."""
    from welltuned.models.load import load_tokenizer

    tokenizer = load_tokenizer(DEMO_ALIAS)
    data = folder / "rows.jsonl"
    word = " hat"
    data.write_text("".join(json.dumps(row(tokenizer, case.row, word, i)) + "\n" for i in range(2 * case.batch)))
    model = DEMO_ALIAS if case.model == SMOL else str(random_model(folder / "model", SHAPES[case.model], tokenizer))
    found: dict[str, Any] = {
        "model": model,
        "data": str(data),
        "tune": case.tune,
        "eval_fraction": 0.5,
        "effective_batch_size": case.batch,
        "token_budget": case.budget,
        "gradient_checkpointing": case.checkpointing,
        "max_steps": 2,
        "dtype": "float32",
    }
    return found if case.tune == "full" else {**found, "r": case.r}


def row(tokenizer: Any, tokens: int, word: str, index: int) -> dict[str, str]:
    """A question and an answer of `tokens` tokens in all (the template's few included), half of them the answer's."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    few = len(tokenizer.apply_chat_template(turns)["input_ids"])
    half = (tokens - few) // 2
    return {"prompt": f"{index}" + word * half, "completion": word.strip() + word * half}


def random_model(folder: Path, shape: dict[str, Any], tokenizer: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=4096)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gc.collect()
    return folder


def alive_bytes() -> int:
    """Bytes of all tensors' storages, each counted once."""
    import torch

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_of(record: Any) -> int:
    """The highest sum of allocations and releases since the record began, in bytes."""
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


if __name__ == "__main__":
    main()
