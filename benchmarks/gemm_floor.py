"""This machine's matrix-product rate in fp32 at the shapes of a small LoRA run: what no trainer can beat.

python benchmarks/gemm_floor.py
"""

import json
import os
import time

import torch

SHAPES = ((1900, 576, 960), (1900, 576, 3072), (1900, 1536, 576))  # rows, inputs, outputs: SmolLM2-135M's projections


def gemm_floor(repeats: int = 12) -> float:
    """GFLOP/s of fp32 matrix products, the mean over SHAPES of each one's median."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    rates = []
    for rows, inputs, outputs in SHAPES:
        x, w = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        times = []
        for _ in range(repeats + 2):
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            times.append(time.perf_counter() - start)
        rates.append(2 * rows * inputs * outputs / sorted(times[2:])[repeats // 2] / 1e9)
    return sum(rates) / len(rates)


if __name__ == "__main__":
    print(json.dumps({"gflops": gemm_floor()}))
