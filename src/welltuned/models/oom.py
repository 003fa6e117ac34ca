"""Out of memory: how it shows, and how what is free is made usable again."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

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


def retried(make: Callable[[], T], shrink: Callable[[], None]) -> T:
    """What `make` gives, tried again after `shrink` each time that memory is out; `shrink` raises where it cannot."""
    while True:
        try:
            return make()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        release_memory()  # here the failed pass is gone, which the traceback kept alive
        shrink()
