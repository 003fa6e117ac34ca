"""The same run with TRL and PEFT, in an environment of its own (torch, transformers, trl, peft, datasets).

python trl_dpo.py MODEL_DIR DATA.jsonl PAIRS BATCH MAX_LENGTH DTYPE
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

model_dir, data, pairs, batch, length = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()[:pairs]]
with tempfile.TemporaryDirectory() as folder:
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, sys.argv[6])),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=pairs // batch,
            max_length=length,
            learning_rate=1e-5,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
    )
    start, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
log = [line for line in trainer.state.log_history if "rewards/margins" in line]
print(
    json.dumps(
        {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "losses": [round(line["loss"], 5) for line in log],
            "margins": [round(line["rewards/margins"], 5) for line in log],
            "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        }
    )
)
