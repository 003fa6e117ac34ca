"""One LoRA DPO run of welltuned on the CPU; prints one JSON line. Called by preference_cpu.py.

python welltuned_dpo.py MODEL_DIR DATA.jsonl PAIRS BATCH MAX_LENGTH shared|unshared DTYPE
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import welltuned
from welltuned.training import preference
from welltuned.training.events import Updated

model, data, pairs, batch, length, layout, dtype = sys.argv[1:]
if layout == "unshared":
    preference.shares = lambda model: False
with tempfile.TemporaryDirectory() as folder:
    os.environ["WELLTUNED_CACHE"] = folder  # the reference is computed in every run: it is part of the work
    lines = Path(data).read_text(encoding="utf-8").splitlines(keepends=True)
    train, held_out = Path(folder) / "train.jsonl", Path(folder) / "held_out.jsonl"
    train.write_text("".join(lines[: int(pairs)]), encoding="utf-8")
    held_out.write_text(lines[int(pairs)], encoding="utf-8")
    marks: list[float] = []

    def watch(event: object) -> None:
        if not marks and not isinstance(event, Updated):
            marks.extend((time.perf_counter(), time.process_time()))

    result = welltuned.train(
        model=model,
        data=str(train),
        eval_data=str(held_out),
        out=Path(folder) / "run",
        observer=watch,
        method="dpo",
        num_train_epochs=1.0,
        effective_batch_size=int(batch),
        max_length=int(length),
        eval_steps=10**6,
        r=16,
        lora_alpha=16.0,
        learning_rate=1e-5,
        dtype=dtype,
    )
    # From the reference on: loading is not counted.
    seconds, cpu = time.perf_counter() - marks[0], time.process_time() - marks[1]
    metrics = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
updates = [line for line in metrics if "loss" in line]
print(
    json.dumps(
        {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "tokens_laid": sum(line["tokens"] for line in updates),
            "losses": [round(line["loss"], 5) for line in updates],
            "margins": [round(line["rewards/margins"], 5) for line in updates],
            "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        }
    )
)
