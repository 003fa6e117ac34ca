"""The same run with Unsloth's CPU path, checkpointing off (its fastest), in an environment of its own: torch,
transformers, trl, peft, datasets, bitsandbytes, and unsloth with unsloth_zoo installed without their dependencies.

    python unsloth_sft.py MODEL_DIR DATA.jsonl ROWS BATCH
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import unsloth  # noqa: F401, I001 (it must come first)
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel
from unsloth.chat_templates import train_on_responses_only

model_dir, data, rows, batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(os.cpu_count() or 1)
model, tokenizer = FastLanguageModel.from_pretrained(
    model_dir, max_seq_length=1024, dtype=torch.float32, load_in_4bit=False
)
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    random_state=3407,
    use_gradient_checkpointing=False,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)
pairs = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()[:rows]]
chats = [
    [{"role": "user", "content": pair["question"]}, {"role": "assistant", "content": pair["answer"]}] for pair in pairs
]
dataset = Dataset.from_list([{"text": tokenizer.apply_chat_template(chat, tokenize=False)} for chat in chats])
with tempfile.TemporaryDirectory() as folder:
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=dataset,
        args=SFTConfig(
            output_dir=folder,
            dataset_text_field="text",
            per_device_train_batch_size=batch,
            max_steps=rows // batch,
            learning_rate=2e-4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=0,
            use_cpu=True,
            bf16=False,
        ),
    )
    trainer = train_on_responses_only(
        trainer, instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n"
    )
    tokens = sum(len(ids) for ids in trainer.train_dataset["input_ids"])
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
