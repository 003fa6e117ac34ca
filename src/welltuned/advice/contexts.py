"""How long a row an 8B model can train on, by the memory of the GPU: a table in docs/guides/fit_in_memory.md.

Forecast by the plan's own arithmetic from a configuration alone; nothing in it was measured.

    python -m welltuned.advice.contexts docs/guides/fit_in_memory.md
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from welltuned.advice.activations import MemorySetting
from welltuned.advice.memory import forecast_memory, host_bytes
from welltuned.advice.rules import number
from welltuned.facts.machine import Device
from welltuned.facts.model import ModelFacts, read_model_facts
from welltuned.recipe import Tune

BEGIN, END = "<!-- contexts: made by `make docs` -->", "<!-- /contexts -->"
RANK, STEP, MOST = 16, 256, 2**22
SIZES = (24, 48, 80, 141)  # GB
LLAMA_8B = dict(
    model_type="llama", hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, vocab_size=128_256, max_position_embeddings=131_072,
    tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip


def longest_row(model: ModelFacts, setting: MemorySetting, limit: float) -> int:
    """The longest row, a multiple of 256, that fits as a micro-batch of its own; 0 where none does."""

    def fits(tokens: int) -> bool:
        alone = replace(setting, micro_tokens=tokens, lengths=(tokens,))
        return forecast_memory(model, alone).total_bytes <= number("memory_use_share") * limit

    low, high = 0, MOST // STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * STEP) else (low, middle - 1)
    return low * STEP


def eight_billion() -> ModelFacts:
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
        return read_model_facts(folder, weights_needed=False)


def table() -> str:
    """The section between the markers."""
    model = eight_billion()
    lines = [
        BEGIN,
        "Forecast, not measured: the longest row for the shape of Llama-3.1-8B in bfloat16, one row a micro-batch,",
        f"rank {RANK} on every linear layer, a tenth of the memory left free. The model itself was trained for rows of",
        f"{LLAMA_8B['max_position_embeddings']:,} tokens.",
        "",
        "| GPU | tune | nothing recomputed | every layer recomputed | and its input on the host | which takes |",
        "|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        for tune in (Tune.LORA, Tune.QLORA):
            setting = MemorySetting(
                tune=tune, dtype="bfloat16", device=Device.CUDA, micro_tokens=0, checkpointing=False, r=RANK
            )
            again = replace(setting, checkpointing=True)
            away = replace(again, offload=True)
            rows = [longest_row(model, way, size * 1e9) for way in (setting, again, away)]
            host = host_bytes(model, replace(away, micro_tokens=rows[-1])) / 1e9
            cells = [f"{row:,}" if row else "–" for row in rows] + [f"{host:,.0f} GB" if rows[-1] else "–"]
            lines.append(f"| {size} GB | {tune} | {' | '.join(cells)} |")
    return "\n".join([*lines, END])


def with_table(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return before + table() + rest.partition(END)[2]


def main(path: str) -> None:
    page = Path(path)
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
