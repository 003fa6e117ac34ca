"""The same run with TRL and PEFT, in an environment of its own (torch, transformers, trl, peft, datasets).

python trl_sft.py MODEL_DIR DATA.jsonl ROWS BATCH
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
from trl import SFTConfig, SFTTrainer

model_dir, data, rows, batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(os.cpu_count() or 1)
pairs = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()[:rows]]
dataset = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": pair["question"]}],
            "completion": [{"role": "assistant", "content": pair["answer"]}],
        }
        for pair in pairs
    ]
)
with tempfile.TemporaryDirectory() as folder:
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        train_dataset=dataset,
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=rows // batch,
            learning_rate=2e-4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
    )
    tokens = sum(len(ids) for ids in trainer.train_dataset["input_ids"])  # without padding
    start = time.time()
    trainer.train()
    seconds = time.time() - start
print(
    json.dumps(
        {
            "tokens_per_s": tokens / seconds,
            "tokens": tokens,
            "losses": [round(line["loss"], 4) for line in trainer.state.log_history if "loss" in line],
            "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        }
    )
)
