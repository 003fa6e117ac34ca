"""One LoRA SFT run of welltuned, fp32 on the CPU; prints one JSON line. Called by sft_cpu.py.

python welltuned_sft.py MODEL_DIR DATA.jsonl ROWS BATCH
"""

import json
import resource
import sys
import tempfile
from pathlib import Path

import welltuned

model, data, rows, batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with tempfile.TemporaryDirectory() as folder:
    lines = Path(data).read_text(encoding="utf-8").splitlines(keepends=True)
    train, held_out = Path(folder) / "train.jsonl", Path(folder) / "held_out.jsonl"
    train.write_text("".join(lines[:rows]), encoding="utf-8")
    held_out.write_text(lines[rows], encoding="utf-8")
    result = welltuned.train(
        model=model,
        data=str(train),
        eval_data=str(held_out),
        out=Path(folder) / "run",
        num_train_epochs=1.0,
        effective_batch_size=batch,
        r=16,
        lora_alpha=16.0,
        learning_rate=2e-4,
        dtype="float32",
    )
    metrics = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
updates = [line for line in metrics if "loss" in line]
tokens = sum(line["tokens"] for line in updates)
print(
    json.dumps(
        {
            "tokens_per_s": result.tokens_per_second,
            "tokens": tokens,
            "supervised_tokens": sum(line["supervised_tokens"] for line in updates),
            "losses": [round(line["loss"], 4) for line in updates],
            "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        }
    )
)
