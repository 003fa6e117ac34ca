"""The process that trains: how much memory it uses, and how glibc's allocator is made to keep it."""

import ctypes
import gc
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from welltuned.facts.machine import Device

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # from malloc.h
_DEFAULT_MMAP_THRESHOLD = 128 * 1024
_DEFAULT_TRIM, _DEFAULT_MMAP_MAX = 128 * 1024, 65536


@dataclass(frozen=True, slots=True)
class MemoryUsed:
    """Bytes now and at the peak: resident memory on the CPU, allocated memory on the GPU."""

    now: int
    peak: int


def memory_used(device: Device) -> MemoryUsed:
    if device is Device.CUDA:
        return MemoryUsed(torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        now = peak
    return MemoryUsed(now, peak)


def return_freed_memory() -> None:
    """Give freed pages back to the kernel: what loading a model used would else count as the run's for good."""
    gc.collect()
    if sys.platform.startswith("linux"):
        with suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)


def _mallopt(device: Device) -> Callable[[int, int], int] | None:
    """glibc's setting of its allocator; None for a GPU, and where there is no glibc."""
    if device is not Device.CPU or not sys.platform.startswith("linux"):
        return None
    try:
        found: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return None
    return found


@contextmanager
def allocator_keeps_memory(device: Device) -> Iterator[None]:
    """Within the block glibc keeps freed memory instead of giving every large tensor's pages back to the kernel.

    By default each tensor over 32 MiB is mapped afresh, and the kernel clears its pages again at every use: 10 to 20 %
    of a CPU update. Elsewhere than on Linux with glibc, or for a GPU, nothing is done.
    """
    mallopt = _mallopt(device)
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
        mallopt(_M_TRIM_THRESHOLD, _DEFAULT_TRIM)
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def allocator_returns_memory(device: Device) -> Iterator[None]:
    """Within the block glibc gives back every tensor of 1 MiB and more as soon as it is freed.

    For a model in pieces: of layers that are whole in turn its heap keeps far more than one. It would otherwise raise
    the size from which it does so with each tensor that is freed, up to 32 MiB.
    """
    mallopt = _mallopt(device)
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _DEFAULT_MMAP_THRESHOLD)
