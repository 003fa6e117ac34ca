"""What the peers' scripts of the GPU benchmark share: updates timed by a callback, micro-batches tried, one result.

It is run by the peers' own pythons and imports nothing of this project.
"""

import resource
import tempfile
import time
from importlib.metadata import version
from statistics import median

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

PRODUCTS = 10  # of two large square matrices: the ceiling of the same minutes


class Clock(TrainerCallback):
    """Seconds of each update, from before its first micro-batch to after the optimizer; the first one warms up."""

    def __init__(self, cuda, seconds):
        self.cuda, self.left, self.times = cuda, seconds, []
        self.started = time.perf_counter()

    def _now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **_):
        self.began = self._now()

    def on_step_end(self, args, state, control, **_):
        now = self._now()
        self.times.append(now - self.began)
        if now - self.started > self.left and len(self.times) > 1:
            control.should_training_stop = True


def ceiling(spec):
    """FLOP/s of a large square product of random matrices."""
    n, device = spec["product"], spec["device"]
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, spec["dtype"])) for _ in range(2))
    times = []
    for _ in range(PRODUCTS):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / median(times[2:])


def micro_batch(lengths, budget):
    """Rows of a micro-batch: the largest power of two that divides their number and stays within the budget."""
    rows = 1
    while len(lengths) % (2 * rows) == 0 and 2 * rows * sum(lengths) / len(lengths) <= budget:
        rows *= 2
    return rows


def measure(spec, load, make_trainer, done, flags, packages):
    """Every job of the spec with the largest micro-batch that fits; what goes wrong in one is said.

    `done` gives back the model for the next job, its adapter as new or gone.
    """
    cuda = spec["device"] == "cuda"
    if not cuda:
        torch.set_num_threads(spec["threads"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    model = load(spec)
    ceilings, found = [ceiling(spec)], []
    for job in spec["jobs"]:
        result = {"rows": job["rows"], "seconds": [], "loss": None, "peak_bytes": 0, "problem": None}
        for budget in spec["budgets"]:
            try:
                model = done(run_job(spec, job, budget, model, tokenizer, make_trainer, result))
                result["budget"], result["problem"] = budget, None
                break
            except torch.OutOfMemoryError:
                result["problem"] = f"out of memory at {budget:,} tokens a micro-batch"
            except Exception as error:
                lines = str(error).strip().splitlines()
                result["problem"] = f"failed: {type(error).__name__}: {lines[0] if lines else 'no message'}"
                break
            if cuda:
                torch.cuda.empty_cache()
        found.append(result)
    ceilings.append(ceiling(spec))
    versions = {name: version(name) for name in packages}
    return {"jobs": found, "ceilings": ceilings, "flags": flags, "versions": versions}


def run_job(spec, job, budget, model, tokenizer, make_trainer, result):
    """Train on the job's rows with micro-batches of so many tokens; the trained model."""
    cuda = spec["device"] == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    lengths = [len(ids) for ids in job["ids"]]
    batch = micro_batch(lengths, budget)
    dataset = Dataset.from_dict({"input_ids": job["ids"], "labels": job["labels"]})
    clock = Clock(cuda, spec["seconds"])
    with tempfile.TemporaryDirectory() as out:
        steps = spec["updates"] + 1
        trainer = make_trainer(spec, model, tokenizer, dataset, batch, steps, len(lengths) // batch, out, clock)
        trainer.train()
    result["seconds"] = clock.times[1:]
    result["loss"] = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    own = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result["peak_bytes"] = own
    return trainer.model
