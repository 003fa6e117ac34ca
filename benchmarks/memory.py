"""The memory forecast against what is measured on the CPU: every tensor at the peak, and the process as a whole.

    python benchmarks/memory.py [--only NAME] [--compute] [--twice] [--resident]

Each configuration runs one update of one model with the engine's own parts. Its optimizer has made its first step
before, so that a second update adds nothing (`--twice` shows it). Allocated bytes are those of the tensors that are
alive before the update plus torch's own record of every allocation and release in it. Memory does not depend on the
numbers, so weights are random and matrix products are given their results' memory and not computed, which makes a
case take seconds; `--compute` computes them, as full fine-tuning always does: autograd adds gradients in place only
where nothing stands between it and torch. `--resident` runs the cases that say so in processes of their own and reads
the kernel's figure; the forecast's overhead (interpreter, libraries, allocator) belongs to that one only. `--again`
compares what was measured with today's forecast.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import RESULTS, describe_machine, write_result

SMOL, WIDE, DEEP, VOCABULARY, EXPERTS, CAPPED = (
    "smollm2-135m",
    "wide-190m",
    "deep-360m",
    "vocabulary-100m",
    "moe",
    "gemma",
)
SHAPES: dict[str, dict[str, Any]] = {
    SMOL: {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
           "num_key_value_heads": 3, "vocab_size": 49152},
    WIDE: {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 3, "num_attention_heads": 12,
           "num_key_value_heads": 4, "vocab_size": 49152},
    DEEP: {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
           "num_key_value_heads": 5, "vocab_size": 49152},
    VOCABULARY: {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8,
                 "num_key_value_heads": 8, "vocab_size": 151936},
    EXPERTS: {"model_type": "qwen3_moe", "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 384,
              "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
              "num_experts": 16, "num_experts_per_tok": 4, "vocab_size": 32000},
    CAPPED: {"model_type": "gemma2", "hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 8,
             "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 80, "vocab_size": 64000,
             "attn_logit_softcapping": 50.0},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One update: rows of these lengths, in micro-batches of at most `budget` tokens."""

    model: str
    tune: str
    rows: tuple[int, ...]
    budget: int = 4096
    checkpointing: bool = False
    r: int = 16
    targets: tuple[str, ...] | None = None
    whole_process: bool = False

    @property
    def name(self) -> str:
        again = " checkpointed" if self.checkpointing else ""
        on = f" on {'+'.join(self.targets)}" if self.targets else ""
        rank = "" if self.tune == "full" else f" r{self.r}"
        rows = f"{len(self.rows)} x {min(self.rows)}" + f" to {max(self.rows)}" * (min(self.rows) < max(self.rows))
        return f"{self.model} {self.tune}{rank}{on}, {rows} tokens{again}"

    @property
    def micro_tokens(self) -> int:
        return max(max(self.rows), min(self.budget, sum(self.rows)))


CASES = (
    Case(SMOL, "lora", (250, 250), whole_process=True),
    Case(SMOL, "lora", (700,)),
    Case(SMOL, "lora", (60, 90, 140, 200, 250, 250, 180, 120), budget=512),
    Case(SMOL, "lora", (250,) * 3, checkpointing=True),
    Case(SMOL, "lora", (250, 250), r=128),
    Case(SMOL, "qlora", (250, 250)),
    Case(SMOL, "full", (250, 250), whole_process=True),
    Case(SMOL, "full", (250,), checkpointing=True),
    Case(WIDE, "lora", (120,) * 5),
    Case(WIDE, "qlora", (240, 240)),
    Case(WIDE, "full", (240,)),
    Case(DEEP, "lora", (250,)),
    Case(DEEP, "qlora", (150, 150), checkpointing=True),
    Case(VOCABULARY, "lora", (250,) * 4, whole_process=True),
    Case(VOCABULARY, "full", (250,)),
    Case(VOCABULARY, "lora", (600, 600)),
    Case(EXPERTS, "lora", (250, 250)),
    Case(EXPERTS, "lora", (250, 250), targets=("all-linear", "experts")),
    Case(EXPERTS, "qlora", (250, 250)),
    Case(CAPPED, "lora", (300, 300)),
    Case(SMOL, "lora", (250, 250), targets=("q_proj", "v_proj")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the cases whose name holds this text, and write nothing")
    parser.add_argument("--compute", action="store_true", help="compute matrix products")
    parser.add_argument("--twice", action="store_true", help="two updates within the record")
    parser.add_argument("--resident", action="store_true", help="measure whole processes too")
    parser.add_argument("--again", action="store_true", help="forecast again what was measured")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)  # what a process of its own is told
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measure(CASES[arguments.case], recorded=False)))
        return
    found = recorded_cases(arguments.resident) if arguments.again else []
    for index, case in enumerate(CASES):
        if arguments.again or arguments.only not in case.name:
            continue
        run = measure(case, updates=1 + arguments.twice, compute=arguments.compute)
        if arguments.resident and case.whole_process:
            run |= in_a_process(index)
        found.append(compared(case, run))
        print(sentence(found[-1]), file=sys.stderr, flush=True)
    if not arguments.only:
        print(write_result("memory", result_of(found)))


def recorded_cases(resident: bool) -> list[dict[str, Any]]:
    """The cases as they were measured, with today's forecast; `resident` measures whole processes anew."""
    before = json.loads((RESULTS / "memory.json").read_text(encoding="utf-8"))["cases"]
    by_name, again = {case.name: case for case in CASES}, []
    for run in before:
        case = by_name[run["name"]]
        process = in_a_process(CASES.index(case)) if resident and case.whole_process else {}
        again.append(compared(case, {key: run[key] for key in MEASURED if key in run} | process))
        print(sentence(again[-1]), file=sys.stderr, flush=True)
    return again


def result_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    resident = [abs(run["resident_error"]) for run in found if "resident_error" in run]
    return {
        "what": __doc__.splitlines()[0],
        "machine": describe_machine(),
        "largest_allocated_error": max(abs(run["allocated_error"]) for run in found),
        "largest_resident_error": max(resident, default=None),
        "cases": found,
    }


def in_a_process(index: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", str(index)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{CASES[index].name} failed:\n{done.stderr[-3000:]}")
    run: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return run


MEASURED = ("allocated", "alive_before", "computed", "resident", "resident_before_model")
STATE = ("weights", "quantisation_state", "adapters", "gradients", "optimizer")


def compared(case: Case, run: dict[str, Any]) -> dict[str, Any]:
    """What was measured, the forecast by part, and the forecast's errors as shares of what was measured."""
    parts = forecast_parts(case)
    whole, state = sum(parts.values()), sum(parts.get(name, 0) for name in STATE)
    found = {
        **{"name": case.name, **asdict(case), **run, "parts": parts, "forecast": whole - parts["overhead"]},
        "allocated_error": round((whole - parts["overhead"]) / run["allocated"] - 1, 4),
        "state_error": round(state / run["alive_before"] - 1, 4),
    }
    if "resident" in run:
        found |= {"forecast_with_overhead": whole, "resident_error": round(whole / run["resident"] - 1, 4)}
    return found


def sentence(run: dict[str, Any]) -> str:
    text = f"{run['name']}: allocated {run['allocated'] / 1e9:.3f} GB, forecast {run['forecast'] / 1e9:.3f} "
    text += f"({run['allocated_error']:+.1%}; state {run['state_error']:+.1%})"
    if "resident" in run:
        text += f"; resident {run['resident'] / 1e9:.3f} GB, forecast {run['forecast_with_overhead'] / 1e9:.3f} "
        text += f"({run['resident_error']:+.1%}), before the model {run['resident_before_model'] / 1e9:.3f}"
    return text


def measure(case: Case, *, recorded: bool = True, updates: int = 1, compute: bool = False) -> dict[str, Any]:
    """The peak of one case in bytes: of all tensors where allocations are recorded, else of the process."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from welltuned.facts.machine import Device
    from welltuned.models.packed import packed_model
    from welltuned.training.process import allocator_keeps_memory

    torch.manual_seed(0)
    computed = compute or case.tune == "full"
    with ExitStack() as stack:
        stack.enter_context(allocator_keeps_memory(Device.CPU))
        before_model = most_resident()
        engine, update = made_ready(case)
        alive = alive_bytes()
        record = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        stack.enter_context(packed_model(engine.model))
        if recorded:
            stack.enter_context(record)
        if not computed:
            stack.enter_context(without_products())
        for _ in range(updates):
            update()
        resident = most_resident()
    if not recorded:
        return {"resident": resident, "resident_before_model": before_model}
    return {"allocated": alive + peak_of(record), "alive_before": alive, "computed": computed}


@contextmanager
def configuration(case: Case) -> Iterator[str]:
    """A folder with the model's configuration, and nothing else."""
    config = {"model_type": "llama", "tie_word_embeddings": True, "max_position_embeddings": 4096}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**config, **SHAPES[case.model]}))
        yield folder


def made_ready(case: Case) -> tuple[Any, Any]:
    """The engine on a random model, and one update of it; the optimizer's state is there."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from welltuned.models.experts import quantize_experts
    from welltuned.models.frozen import quantize_linears
    from welltuned.models.full import FullParameters
    from welltuned.models.fuse import find_head, fuse
    from welltuned.models.lora import AdapterBank, LoraSettings, attach
    from welltuned.models.packed import packed_model
    from welltuned.models.recompute import checkpoint_layers
    from welltuned.training.optimizer import AdamWSettings, FlatAdamW, clip_
    from welltuned.training.step import Engine, accumulate_gradient

    with configuration(case) as folder, no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    model.tie_weights()  # left out where nothing is initialised
    noise = torch.randn(99_991) * 0.02  # repeated: cheaper than drawing every weight, and no proof sees a difference
    for parameter in model.parameters():
        n = parameter.numel()
        parameter.data.copy_(noise.repeat(-(-n // len(noise)))[:n].view(parameter.shape))
        if parameter.dim() == 1:
            parameter.data.add_(1.0)
    if case.tune == "qlora":
        quantize_linears(model)
        quantize_experts(model)
    settings = LoraSettings(r=case.r, target_modules=case.targets or "all-linear")
    trained: Any = FullParameters(model) if case.tune == "full" else attach(model, settings)
    fused = fuse(model, trained if isinstance(trained, AdapterBank) else None)
    engine = Engine(model, trained, find_head(model), case.budget)
    if case.checkpointing:
        checkpoint_layers(model, fused)
    with packed_model(model):  # asks once whether rows can be packed: an answer that needs true products
        pass
    trained.claim_gradients()
    optimizer = FlatAdamW(trained.flat_KP, trained.grad_KP, trained.decayed, AdamWSettings())
    optimizer.zero_grad()
    optimizer.step([0.0])
    rows: Any = [
        SimpleNamespace(ids=np.arange(n) % 1000 + 5, mask=np.arange(n) >= n // 2, origin=f"row {i}")
        for i, n in enumerate(case.rows)
    ]

    def update() -> None:
        optimizer.zero_grad()
        accumulate_gradient(engine, rows, list(range(len(rows))))
        clip_(trained.grad_KP, 1.0)
        optimizer.step([1e-4])

    return engine, update


def forecast_parts(case: Case) -> dict[str, int]:
    from welltuned.advice.activations import MemorySetting
    from welltuned.advice.memory import forecast_memory
    from welltuned.facts.machine import Device
    from welltuned.facts.model import read_model_facts
    from welltuned.recipe import Tune

    setting = MemorySetting(
        tune=Tune(case.tune),
        dtype="float32",
        device=Device.CPU,
        micro_tokens=case.micro_tokens,
        checkpointing=case.checkpointing,
        r=0 if case.tune == "full" else case.r,
        targets=case.targets,
        lengths=case.rows,
    )
    with configuration(case) as folder:
        return dict(forecast_memory(read_model_facts(folder, weights_needed=False), setting).parts)


def most_resident() -> int:
    """The kernel's highest figure for this process; `ru_maxrss` would be its parent's where that was larger."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def without_products() -> Any:
    """Within the block matrix products give zeros: their memory is asked for as ever, their arithmetic left out."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten

    class WithoutProducts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func in (aten.mm.default, aten.addmm.default):
                a, b = args[-2:]
                return a.new_zeros(a.shape[0], b.shape[1])
            if func is aten.bmm.default:
                return args[0].new_zeros(args[0].shape[0], args[0].shape[1], args[1].shape[2])
            if func is aten.mm.out:
                return kwargs["out"].zero_()
            if func in (aten.addmm_.default, aten.baddbmm_.default):
                return args[0]
            return func(*args, **kwargs)

    return WithoutProducts()


def alive_bytes() -> int:
    """Bytes of all tensors' storages, each counted once."""
    import torch

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
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
