"""One tune and rank of the GPU benchmark with TRL and PEFT, in an environment of its own: torch, transformers, trl,
peft, datasets, for QLoRA bitsandbytes; with flash-attn without padding, else rows of like lengths padded together.

    python trl_gpu.py SPEC.json         the last line printed is the result

SPEC holds a folder with the model, the rows as tokens and labels, and how long to measure: see gpu_peers.py.
"""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
import torch
from peer_clock import measure
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

FLASH = find_spec("flash_attn") is not None


def load(spec):
    """The model as TRL's own examples load it: bf16, the base in 4 bits where asked."""
    four_bit = None
    if spec["tune"] == "qlora":
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, spec["dtype"]),
        )
    return AutoModelForCausalLM.from_pretrained(
        spec["model"],
        dtype=getattr(torch, spec["dtype"]),
        attn_implementation="flash_attention_2" if FLASH and spec["device"] == "cuda" else "sdpa",
        device_map={"": spec["device"]},
        quantization_config=four_bit,
    )


def trainer(spec, model, tokenizer, dataset, batch, steps, accumulate, out, clock):
    adapter = LoraConfig(r=spec["rank"], lora_alpha=spec["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
    cuda = spec["device"] == "cuda"
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=dataset,
        peft_config=adapter,
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
            padding_free=FLASH and cuda,
            train_sampling_strategy="random" if FLASH and cuda else "group_by_length",
            use_cpu=not cuda,
            bf16=spec["dtype"] == "bfloat16",
            tf32=None,
            optim="adamw_torch_fused" if cuda else "adamw_torch",
            gradient_checkpointing=False,
            dataloader_pin_memory=cuda,
            disable_tqdm=True,
        ),
    )


def without_adapter(model):
    return model.unload()


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    flags = {"attention": "flash-attn" if FLASH else "sdpa", "padding_free": FLASH, "by_length": not FLASH}
    print(json.dumps(measure(spec, load, trainer, without_adapter, flags, ("trl", "peft", "transformers", "torch"))))
