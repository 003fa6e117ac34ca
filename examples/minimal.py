"""LoRA fine-tuning in about a hundred lines of plain torch and transformers.

    python examples/minimal.py MODEL data.jsonl --steps 100 --rate 1e-3 --out adapter

To be read from top to bottom. MODEL is a hub id, a folder or a GGUF file. A row of the data is {"messages": [...]} or
{"prompt": "...", "completion": "..."}. welltuned does the same faster and in less memory, for more kinds of model, and
chooses the values; its losses are tested against those of this file (tests/test_minimal.py).
"""

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


# 1. The model stays as it is. What is learned goes beside each linear layer, as a product of two thin matrices:
#    y = x W^T + alpha/r * (x A^T) B^T (Hu et al. 2021, arXiv 2106.09685). B starts at zero, so that the first step
#    starts at exactly the model; A starts random, or nothing would ever move.
def load(model):
    path = Path(model)
    where = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (model, {})
    tokenizer = AutoTokenizer.from_pretrained(where[0], **where[1])
    loaded = AutoModelForCausalLM.from_pretrained(where[0], dtype=torch.float32, **where[1])
    return loaded.eval(), tokenizer  # eval: the model's own dropout, where it has any, stays off


class LoRA(nn.Module):
    def __init__(self, base, r, alpha, seed):
        super().__init__()
        self.base, self.scale = base, alpha / r
        bound, generator = base.in_features**-0.5, torch.Generator().manual_seed(seed)
        self.A = nn.Parameter(torch.rand(r, base.in_features, generator=generator) * (2 * bound) - bound)
        self.B = nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.A.T) @ self.B.T


def add_lora(model, r=16, alpha=32, seed=3407):
    """Freeze the model and put an adapter on every linear layer but the head."""
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    adapters = {name: LoRA(m, r, alpha, seed * 1_000_003 + i) for i, (name, m) in enumerate(linears.items())}
    for name, adapter in adapters.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapter)
    return adapters


# 2. A conversation becomes token ids, and a mask that says which of them the model is to learn: the assistant's words
#    and the token that ends its turn, never the user's. The text up to an answer is tokenised on its own, because that
#    is how the model will meet it later. (A template that rewrites earlier turns would need more care than this.)
def encode(tokenizer, row):
    user_and_answer = (("user", row.get("prompt")), ("assistant", row.get("completion")))
    messages = row.get("messages") or [{"role": role, "content": text} for role, text in user_and_answer]
    ids, mask, done = [], [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False).rstrip()
        assert prompt.startswith(done) and text.startswith(prompt), "the chat template rewrites earlier turns"
        for piece, learned in ((prompt[len(done) :], False), (text[len(prompt) :], True)):
            tokens = tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids, mask = ids + tokens, mask + [learned] * len(tokens)
        done = text
    return ids, mask


# 3. The rate climbs to its peak over the warm-up and then falls in a straight line towards zero.
def rate_of(step, steps, peak, warmup):
    return peak * ((step + 1) / (warmup + 1) if step < warmup else 1 - (step - warmup) / max(1, steps - warmup))


def shuffled(rows, batch, seed):
    """Which rows each update learns from: every row once a pass, in an order of its own each time."""
    per_pass = -(-rows // batch)

    def rows_of(step):
        order = random.Random(f"{seed}/{step // per_pass}").sample(range(rows), rows)
        return order[step % per_pass * batch :][:batch]

    return rows_of


# 4. One update: the loss is the sum over all learned tokens of the batch, divided by their number in the whole batch.
#    (Not the mean of the examples' means, which would let a short answer's tokens count for more.) One example at a
#    time means no padding, and nothing in which one example could disturb another.
def train(model, examples, rows_of, *, steps, rate, warmup=0, decay=0.01, clip=1.0):
    """Train in place; yield each update's loss."""
    learned = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(learned, weight_decay=decay)
    for step in range(steps):
        batch = [examples[i] for i in rows_of(step)]
        count = sum(sum(mask) for _, mask in batch)
        total = 0.0
        for ids, mask in batch:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
            target = torch.tensor(ids[1:]).masked_fill(~torch.tensor(mask[1:]), -100)
            loss = F.cross_entropy(logits, target, ignore_index=-100, reduction="sum") / count
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(learned, clip)
        for group in adamw.param_groups:
            group["lr"] = rate_of(step, steps, rate, warmup)
        adamw.step()
        adamw.zero_grad()
        yield total


# 5. Only A and B are saved, under the names that PEFT, vLLM and welltuned look for.
def save(adapters, folder, r=16, alpha=32):
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name}.lora_{part}.weight": getattr(adapter, part).detach().contiguous()
        for name, adapter in adapters.items()
        for part in "AB"
    }
    save_file(tensors, Path(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    targets = sorted({name.rpartition(".")[2] for name in adapters})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha, "target_modules": targets}
    Path(folder, "adapter_config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a hub id, a folder or a GGUF file")
    parser.add_argument("data", help="a JSONL file")
    for name, default in (("--steps", 100), ("--batch", 8), ("--rate", 1e-3), ("--warmup", 5), ("--seed", 3407)):
        parser.add_argument(name, type=type(default), default=default)
    parser.add_argument("--out", help="a folder for the adapter")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    adapters = add_lora(model, seed=arguments.seed)
    lines = Path(arguments.data).read_text(encoding="utf-8").splitlines()
    examples = [encode(tokenizer, json.loads(line)) for line in lines if line.strip()]
    rows_of = shuffled(len(examples), arguments.batch, arguments.seed)
    losses = train(model, examples, rows_of, steps=arguments.steps, rate=arguments.rate, warmup=arguments.warmup)
    for step, loss in enumerate(losses, start=1):
        print(f"{step}/{arguments.steps}  loss {loss:.4f}", flush=True)
    if arguments.out:
        save(adapters, arguments.out)
