"""Sums to practise on: writes sums.jsonl, rows of `prompt` and `answer`, beside this file. Always the same ones.

python examples/grpo/make_data.py
"""

import json
import random
from pathlib import Path

ROWS, LARGEST = 600, 30


def rows(seed: int = 0) -> list[dict[str, str]]:
    """Distinct sums of two numbers, each asked in one way: what is wanted, and how it is to be written, in words."""
    draw = random.Random(seed)
    pairs = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
    return [
        {"prompt": f"What is {a} + {b}? Reply with the number alone.", "answer": str(a + b)}
        for a, b in draw.sample(pairs, ROWS)
    ]


if __name__ == "__main__":
    path = Path(__file__).with_name("sums.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    print(f"{path}: {ROWS} sums")
