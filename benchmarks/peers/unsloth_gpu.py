"""One tune and rank of the GPU benchmark with Unsloth, padding-free, its checkpointing off, in an environment of its
own: torch, transformers, trl, peft, datasets, bitsandbytes, triton, unsloth and unsloth_zoo.

    python unsloth_gpu.py SPEC.json     the last line printed is the result; see gpu_peers.py
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
import unsloth  # noqa: F401, I001 (it must come first)
import torch
from peer_clock import measure
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel


def load(spec):
    longest = max(len(ids) for job in spec["jobs"] for ids in job["ids"])
    model, _ = FastLanguageModel.from_pretrained(
        spec["model"],
        max_seq_length=longest,
        dtype=getattr(torch, spec["dtype"]),
        load_in_4bit=spec["tune"] == "qlora",
        local_files_only=True,
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=spec["rank"],
        lora_alpha=spec["alpha"],
        lora_dropout=0,
        bias="none",
        random_state=3407,
        use_gradient_checkpointing=False,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )


def trainer(spec, model, tokenizer, dataset, batch, steps, accumulate, out, clock):
    cuda = spec["device"] == "cuda"
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=dataset,
        callbacks=[clock],
        args=SFTConfig(
            output_dir=out,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_steps=steps,
            learning_rate=1e-4,
            weight_decay=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=0,
            max_length=None,
            padding_free=cuda,
            use_cpu=not cuda,
            bf16=spec["dtype"] == "bfloat16",
            optim="adamw_torch_fused" if cuda else "adamw_torch",
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
    )


def with_new_adapter(model):
    """B is zero again, as where the next kind of rows is begun by the others."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    return model


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    flags = {"padding_free": spec["device"] == "cuda", "checkpointing": False, "optim": "adamw_torch_fused"}
    packages = ("unsloth", "unsloth_zoo", "trl", "peft", "transformers", "torch")
    print(json.dumps(measure(spec, load, trainer, with_new_adapter, flags, packages)))
