"""Out of memory: how it shows, and how what is free is made usable again."""

import gc

import torch

# What torch says on the CPU, on the GPU and in cuBLAS, which all raise a RuntimeError or a kind of it.
_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "cublas_status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there was no memory left; the host's or the GPU's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


def release_memory() -> None:
    """Give back what no longer lives: call outside the `except` block, whose traceback keeps the failed pass alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
