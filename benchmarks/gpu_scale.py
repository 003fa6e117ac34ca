"""The GPU benchmark's givens: shapes, rows, the arithmetic that an update needs, clocks, and options."""

import argparse
import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import RESULTS, write_result

from welltuned.data.render import Example
from welltuned.objectives.supervised import supervised_tokens

RANK = 16

LLAMA_8B: dict[str, Any] = dict(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=131_072, rms_norm_eps=1e-5, tie_word_embeddings=False,
    rope_parameters=dict(rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0,
                         high_freq_factor=4.0, original_max_position_embeddings=8192),
)  # fmt: skip
SMALL = LLAMA_8B | dict(
    vocab_size=4096, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2,
)  # fmt: skip
TOY = LLAMA_8B | dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """All that differs between a GPU and a toy run."""

    device: str
    dtype: torch.dtype
    shape: dict[str, Any]
    parity_shape: dict[str, Any]
    long: int  # tokens of a long row
    ragged_rows: int
    shrink: int  # ragged lengths are divided by this
    budgets: tuple[int, ...]  # tokens of a micro-batch: the first that fits
    product: int  # side of the square matrices whose product is the ceiling
    updates: int  # timed updates of one system in one round, at most
    blink: float  # seconds in which something small is timed

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


GPU = Scale(
    device="cuda", dtype=torch.bfloat16, shape=LLAMA_8B, parity_shape=SMALL, long=4096, ragged_rows=64, shrink=1,
    budgets=(8192, 4096), product=8192, updates=6, blink=0.3,
)  # fmt: skip
CPU = Scale(
    device="cpu", dtype=torch.float32, shape=TOY, parity_shape=TOY, long=64, ragged_rows=8, shrink=8,
    budgets=(128, 64), product=256, updates=1, blink=0.005,
)  # fmt: skip


# --- rows ---


def long_rows(scale: Scale) -> list[Example]:
    """Two rows of the full length, every token trained on."""
    return [row_of(scale, 0, scale.long, seed) for seed in range(2)]


def short_rows(scale: Scale) -> list[Example]:
    """As many tokens in rows of an eighth of the length."""
    return [row_of(scale, 0, scale.long // 8, seed) for seed in range(16)]


def ragged_rows(scale: Scale) -> list[Example]:
    """Lengths drawn like GSM8K's chat rows, answers trained on.

    Prompt and answer are log-normal with the means, spreads and correlation of the first 1,500 rows as SmolLM2's
    template and tokenizer render them: 215 tokens a row, between 103 and 570, of which 58 % are trained.
    """
    normal_NP = np.random.default_rng(0).multivariate_normal([0, 0], [[1, 0.51], [0.51, 1]], scale.ragged_rows)
    prompts = np.exp(4.47 + 0.23 * normal_NP[:, 0]) / scale.shrink
    answers = np.exp(4.74 + 0.42 * normal_NP[:, 1]) / scale.shrink
    pairs = enumerate(zip(prompts, answers, strict=True))
    return [row_of(scale, int(p) + 1, int(a) + 2, seed) for seed, (p, a) in pairs]


def row_of(scale: Scale, prompt: int, answer: int, seed: int) -> Example:
    vocabulary = min(scale.shape["vocab_size"], scale.parity_shape["vocab_size"])
    ids = np.random.default_rng(seed).integers(0, vocabulary, prompt + answer, dtype=np.int32)
    mask = np.arange(prompt + answer) >= max(prompt, 1)
    return Example(ids, mask, f"random:{seed}")


# --- arithmetic ---


def flops_per_token(shape: dict[str, Any], rows: list[Example], checkpointing: bool, rank: int = RANK) -> float:
    """4N + 4f·V·h + 7·L·S·d + 6P, and with checkpointing one more forward pass of the trunk: 2N + 2·L·S·d + 2P.

    N trunk, P adapter parameters, f share of trained tokens, V·h head, L layers, d width of all heads, S the length
    that a token's example has on average over tokens (attention is causal and within examples).
    """
    h, i, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    d, kv = shape["head_dim"] * shape["num_attention_heads"], shape["head_dim"] * shape["num_key_value_heads"]
    projections = [(h, d), (h, kv), (h, kv), (d, h), (h, i), (h, i), (i, h)]
    n = layers * sum(inputs * outputs for inputs, outputs in projections)
    p = layers * sum(rank * (inputs + outputs) for inputs, outputs in projections)
    lengths = np.array([len(row.ids) for row in rows], dtype=np.float64)
    attention = layers * d * float((lengths**2).sum() / lengths.sum())
    trained = sum(supervised_tokens(row) for row in rows) / lengths.sum()
    once = 4 * n + 4 * trained * shape["vocab_size"] * h + 7 * attention + 6 * p
    return float(once + (2 * n + 2 * attention + 2 * p if checkpointing else 0))


def matrix_ceiling(scale: Scale) -> float:
    """FLOP/s of a large square product of random matrices; timed for long enough that clocks settle."""
    n = scale.product
    a, b = (torch.randn(n, n, device=scale.device, dtype=scale.dtype) for _ in range(2))
    return 2 * n**3 / time_median(lambda: torch.mm(a, b), scale)


# --- clocks and memory ---


def time_median(function: Callable[[], Any], scale: Scale) -> float:
    """Seconds of one call, the median of as many as fit into a blink after two to warm up."""
    for _ in range(2):
        function()
    times: list[float] = []
    while sum(times) < scale.blink:
        times.append(time_once(function, scale))
    return median(times)


def time_once(function: Callable[[], Any], scale: Scale) -> float:
    synchronize = torch.cuda.synchronize if scale.cuda else lambda: None
    synchronize()
    started = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - started


def free_memory(scale: Scale) -> None:
    """Give the last system's memory back before the next one is measured."""
    if scale.cuda:
        gc.collect()
        torch.cuda.empty_cache()


def sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


# --- what the scripts are started with ---

NO_TIME, FAILED = "no time left", "failed"
ASKED_TORCH = (2, 12)


@dataclass(frozen=True, slots=True)
class Deadline:
    """When a script must have ended: each part asks what is left, and says so where nothing is."""

    at: float

    @classmethod
    def after(cls, minutes: float) -> "Deadline":
        return cls(time.perf_counter() + 60 * minutes)

    @property
    def left(self) -> float:
        return max(0.0, self.at - time.perf_counter())

    def earlier(self, seconds: float) -> "Deadline":
        """With so many seconds kept for what comes after."""
        return Deadline(self.at - seconds)


@dataclass(frozen=True, slots=True)
class Started:
    """A script's scale, its time, and where what is known is written: after every part, over what lay there."""

    scale: Scale
    deadline: Deadline
    save: Callable[[dict[str, Any]], None]


def usual_options(doc: str | None, minutes: float = 9.0) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size on the CPU (so it is without CUDA, too)")
    parser.add_argument("--minutes", type=float, default=minutes, help="time for everything (default: %(default)g)")
    parser.add_argument("--layers", type=int, help="decoder layers of the measured model (default: the shape's own)")
    parser.add_argument("--out", type=Path, help="folder of the result (default: benchmarks/results; toy: none)")
    return parser


def start(name: str, options: argparse.Namespace) -> Started:
    """What the options say; NAME-GPU.json is the result."""
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)  # its new name is not in 5.17
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < ASKED_TORCH:
        asked = ".".join(map(str, ASKED_TORCH))
        print(
            f"torch {torch.__version__} is older than welltuned asks for ({asked}): its varlen_attn has no enable_gqa "
            "and takes fewer key heads as its kernel does; gpu.py compares attention with plain products"
        )
    scale = CPU if options.toy or not torch.cuda.is_available() else GPU
    device = torch.cuda.get_device_name().lower().replace(" ", "-") if scale.cuda else "toy"
    name = f"{name}-{device}"
    folder = options.out or (RESULTS if scale.cuda else None)
    if not scale.cuda:
        print("Toy size on the CPU: the code is tried, the numbers mean nothing.")
    if options.layers:
        scale = replace(scale, shape=scale.shape | {"num_hidden_layers": options.layers})
        name += f"-{options.layers}-layers"

    def save(result: dict[str, Any]) -> None:
        if folder is not None:
            write_result(name, result, folder)

    return Started(scale, Deadline.after(options.minutes), save)


def tunes_here() -> list[str]:
    if find_spec("bitsandbytes") is None:
        print("QLoRA is left out: bitsandbytes is not installed")
        return ["lora"]
    return ["lora", "qlora"]
