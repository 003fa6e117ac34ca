"""The same updates with TRL's GRPOTrainer and PEFT, in an environment of its own; prints one JSON line.

python trl_grpo.py MODEL_DIR PROMPTS.jsonl UPDATES PROMPTS GENERATIONS TOKENS R DTYPE
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
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

model_dir, data = sys.argv[1:3]
updates, prompts, generations, tokens, r = map(int, sys.argv[3:8])
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
rows = [json.loads(line)["prompt"] for line in Path(data).read_text(encoding="utf-8").splitlines()]
dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in rows])
spent = {"generation": 0.0, "reward": 0.0}
found = []


def timed(name, function):
    def call(*arguments, **named):
        started = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            spent[name] += time.perf_counter() - started

    return call


class Clock(TrainerCallback):
    def on_step_begin(self, *_, **__):
        spent.update(generation=0.0, reward=0.0)
        self.started, self.cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, *_, **__):
        whole = time.perf_counter() - self.started
        update = whole - spent["generation"] - spent["reward"]
        found.append(
            {
                **spent,
                "update": update,
                "whole": whole,
                "cpu": time.process_time() - self.cpu,
                "tokens": prompts * generations * tokens,
            }
        )


with tempfile.TemporaryDirectory() as folder:
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, sys.argv[8])),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        reward_funcs=lambda completions, **_: [c[0]["content"].count("e") / 10 for c in completions],
        train_dataset=dataset,
        peft_config=LoraConfig(r=r, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=prompts * generations,
            num_generations=generations,
            max_completion_length=tokens,
            generation_kwargs={"min_new_tokens": tokens},
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.0,
            loss_type="dapo",
            max_steps=updates,
            learning_rate=1e-4,
            shuffle_dataset=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        callbacks=[Clock()],
    )
    trainer._generate = timed("generation", trainer._generate)
    trainer._calculate_rewards = timed("reward", trainer._calculate_rewards)
    trainer.train()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
print(json.dumps({"updates": found, "peak_rss_gb": peak}))
