"""Some updates of GRPO with welltuned's objective and optimizer; prints one JSON line. Called by grpo_cpu.py.

python welltuned_grpo.py MODEL_DIR PROMPTS.jsonl UPDATES PROMPTS GENERATIONS TOKENS R DTYPE
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

from welltuned.data.conversation import Message
from welltuned.data.prompts import Prompt
from welltuned.facts.machine import Device
from welltuned.models.fuse import find_head, fuse
from welltuned.models.load import load_model, load_tokenizer
from welltuned.models.lora import LoraSettings, attach
from welltuned.models.packed import packed_model
from welltuned.models.sample import Sampling
from welltuned.objectives.grpo import GrpoSettings, LossType
from welltuned.objectives.rewards import Reward
from welltuned.training.grpo_step import Grpo
from welltuned.training.optimizer import AdamWSettings, FlatAdamW, clip_
from welltuned.training.process import allocator_keeps_memory
from welltuned.training.step import Engine

model_dir, data = sys.argv[1:3]
updates, prompts, generations, tokens, r = map(int, sys.argv[3:8])
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
model, tokenizer = load_model(model_dir, dtype=getattr(torch, sys.argv[8])), load_tokenizer(model_dir)
bank = attach(model, LoraSettings(r=r, lora_alpha=16))
fuse(model, bank)
rows = []
for line in Path(data).read_text(encoding="utf-8").splitlines():
    text = json.loads(line)["prompt"]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    rows.append(Prompt(np.array(ids, np.int32), (Message("user", text),), None, 0, {}, f"row {len(rows)}", len(rows)))
objective = Grpo(
    GrpoSettings(loss_type=LossType.DAPO, max_completion_length=tokens, epsilon_high=0.2),
    Sampling(max_new_tokens=tokens, tokens_at_once=16_384),
    [Reward("es", 1.0, lambda samples: [s.completion.count("e") / 10 for s in samples])],
    tokenizer,
    generations=generations,
)
optimizer = FlatAdamW(bank.flat_KP, bank.grad_KP, bank.decayed, AdamWSettings())
engine = Engine(model, bank, find_head(model), token_budget=2048)
found = []
with allocator_keeps_memory(Device.CPU), packed_model(model):  # as a run does
    for update in range(updates):
        started, cpu = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        chosen = slice(update * prompts, (update + 1) * prompts)
        keys = list(range(chosen.start, chosen.stop))
        made = objective.accumulate_gradient(engine, rows[chosen], keys)
        clip_(bank.grad_KP, 1.0)
        optimizer.step([1e-4])
        whole = time.perf_counter() - started
        sampling, reward = made.measures["seconds/generation"], made.measures["seconds/reward"]
        parts = {"generation": sampling, "reward": reward, "update": whole - sampling - reward, "whole": whole}
        parts["cpu"] = time.process_time() - cpu
        silent = made.measures["frac_reward_zero_std"]
        found.append({**parts, "tokens": made.supervised_tokens, "frac_reward_zero_std": silent})
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
print(json.dumps({"updates": found, "peak_rss_gb": peak}))
