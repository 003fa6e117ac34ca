"""A model with welltuned's adapters and fused parts, trained by TRL's SFTTrainer.

    pip install welltuned trl
    python examples/trl_sft.py MODEL data.jsonl --out runs/by-trl --steps 100 --rate 5e-4

What you keep of TRL: its trainer, callbacks, logging and launchers. What you get from here: the adapters, the faster
forwards, rows whose masks are certain, and an adapter that is checked before it is saved. What you leave behind:
packing without padding, the loss over labelled rows only, and the plan; `welltuned train` has those.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from welltuned import LoraSettings, attach
from welltuned.adapters.verify import check_tensors, require_learned
from welltuned.data.formats import to_conversations
from welltuned.data.render import render_all, trained_texts
from welltuned.data.source import read_rows
from welltuned.models.adapter_file import save_adapter
from welltuned.models.fuse import fuse
from welltuned.models.load import load_model, load_tokenizer
from welltuned.models.lora import AdapterBank


def load(model: str, settings: LoraSettings) -> tuple[PreTrainedModel, AdapterBank]:
    """A frozen base with adapters, on its device before TRL sees it: the adapters are views of one buffer there.

    `lora_dropout` stays 0: only welltuned's own loop knows which rows are which example's, and drops by that.
    """
    cuda = torch.cuda.is_available()
    base = load_model(model, dtype=torch.bfloat16 if cuda else torch.float32, device="cuda" if cuda else "cpu")
    bank = attach(base, settings)
    for sentence in fuse(base, bank).sentences():
        print(sentence)
    return base, bank


def rows_for_trl(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    instruction_part: str | None = None,
    response_part: str | None = None,
    max_length: int | None = None,
) -> Dataset:
    """Columns `input_ids` and `labels` (-100 where nothing is learned), which SFTTrainer takes as they are.

    Without parts the trained spans are found from the chat template. The parts are for templates that defeat that:
    everything from a `response_part` to the next `instruction_part` is trained, as in Unsloth's
    train_on_responses_only. A part that is not in a row, or does not fit its turns, is an error that names the row.
    """
    rendering = render_all(
        to_conversations(read_rows(data)).items,
        tokenizer,
        max_length=max_length,
        instruction_part=instruction_part,
        response_part=response_part,
    )
    print(f"Trained tokens are found from {rendering.mask_from}: {trained_texts(rendering.examples[0], tokenizer)}")
    return Dataset.from_list(
        [
            {
                "input_ids": example.ids.tolist(),
                "labels": [int(i) if m else -100 for i, m in zip(example.ids, example.mask, strict=True)],
            }
            for example in rendering.examples
        ]
    )


def config(out: str, *, steps: int, rate: float, batch: int, **yours: Any) -> SFTConfig:
    """TRL's settings. The ones with a comment matter here; the rest are yours."""
    settings = dict(
        output_dir=out,
        max_steps=steps,
        learning_rate=rate,
        per_device_train_batch_size=batch,
        lr_scheduler_type="linear",
        logging_steps=1,
        report_to="none",
        bf16=False,  # TRL's default is autocast; here the base has its dtype and the adapters theirs (fp32)
        gradient_checkpointing=False,  # TRL's default is True: 44 % more arithmetic, to save memory; it works too
        max_length=None,  # the rows are cut already, if at all
        save_strategy="no",  # a Trainer checkpoint would hold the whole model; save_adapter writes the adapter
        use_cpu=not torch.cuda.is_available(),
    )
    return SFTConfig(**{**settings, **yours})


def main(arguments: argparse.Namespace) -> list[float]:
    """Train; the logged losses."""
    tokenizer = load_tokenizer(arguments.model)
    model, bank = load(arguments.model, LoraSettings(r=arguments.r, lora_alpha=2 * arguments.r))
    rows = rows_for_trl(
        arguments.data,
        tokenizer,
        instruction_part=arguments.instruction_part,
        response_part=arguments.response_part,
        max_length=arguments.max_length,
    )
    trainer = SFTTrainer(
        model=model,
        args=config(arguments.out, steps=arguments.steps, rate=arguments.rate, batch=arguments.batch),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    checks = check_tensors(bank.tensors(), bank.tensors_at_start())
    require_learned(checks, arguments.steps)  # every tensor moved and is finite, or this raises
    save_adapter(bank, Path(arguments.out) / "adapter", base=model.config.name_or_path)
    print(f"{len(checks)} tensors moved; {arguments.out}/adapter is in PEFT's format")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a hub id, a folder or a GGUF file")
    parser.add_argument("data", help="JSONL, JSON, CSV or Parquet, or a hub dataset")
    parser.add_argument("--out", required=True)
    for name, default in (("--steps", 100), ("--rate", 5e-4), ("--batch", 8), ("--r", 16)):
        parser.add_argument(name, type=type(default), default=default)
    parser.add_argument("--max-length", type=int, help="rows of more tokens are cut")
    parser.add_argument("--instruction-part", help=r"what opens a user's turn, such as $'<|im_start|>user\n'")
    parser.add_argument("--response-part", help=r"what opens the model's turn, such as $'<|im_start|>assistant\n'")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
