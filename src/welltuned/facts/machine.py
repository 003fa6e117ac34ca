"""MachineFacts: processors, memory and number formats of the machine, as far as this process may use them.

In a container the machine's own figures are not the process's: cores come from the affinity mask and the cgroup's
quota, memory from the tightest cgroup limit on the way up. A run that trusts /proc/meminfo alone is killed, not slowed.
"""

import ctypes
import math
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

from welltuned.errors import InputError

_NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


class Device(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True)
class Launch:
    """As which of how many processes torchrun started this one: of all, and of those on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    here: int = 1


def launch() -> Launch:
    """What torchrun says in the environment; one process where it did not start this one."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        return Launch(*(int(os.environ[name]) for name in names))
    except (KeyError, ValueError):
        return Launch()


def require_one_process(what: str) -> None:
    """Refuse what torchrun's processes cannot do together."""
    started = launch().size
    if started > 1:
        mend = "start it without torchrun"
        raise InputError(f"{what} runs in one process, and {started} were started", where="torchrun", mend=mend)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """`memory_*` are the host's; `gpu_memory_*` the first GPU's, where one was asked for. All in bytes.

    `four_bit` is whether 4-bit weights can be used: whether bitsandbytes is installed. `gpus` are those that there are;
    `processes` share a run's updates, `processes_here` of them on this machine.
    """

    device: Device
    cores: int
    memory_total: int
    memory_available: int
    native_bf16: bool
    avx512_bf16: bool = False
    amx_bf16: bool = False
    processor: str = ""
    four_bit: bool = False
    gpu_name: str | None = None
    gpu_memory_total: int | None = None
    gpu_memory_available: int | None = None
    gpus: int = 0
    processes: int = 1
    processes_here: int = 1

    @property
    def training_memory(self) -> int:
        """What a process may use where the user sets no limit: its GPU's free memory, else its share of the host's."""
        if self.gpu_memory_available is not None:
            return self.gpu_memory_available
        return self.memory_available // self.processes_here


def read_machine_facts(*, ask_gpu: bool = False, root: Path = Path("/")) -> MachineFacts:
    """Read /proc and the cgroup. `ask_gpu` looks for a GPU, with torch where there is a driver; else it is the CPU."""
    flags = _processor_flags(root)
    avx, amx = "avx512_bf16" in flags, "amx_bf16" in flags
    total, available = _memory(root)
    gpu, launched = _gpu() if ask_gpu else None, launch()
    return MachineFacts(
        device=Device.CUDA if gpu else Device.CPU,
        cores=_cores(root),
        memory_total=total,
        memory_available=available,
        native_bf16=gpu.native_bf16 if gpu else avx or amx,
        avx512_bf16=avx,
        amx_bf16=amx,
        processor=_processor(root),
        four_bit=find_spec("bitsandbytes") is not None,
        gpu_name=gpu.name if gpu else None,
        gpu_memory_total=gpu.total if gpu else None,
        gpu_memory_available=gpu.available if gpu else None,
        gpus=gpu.count if gpu else 0,
        processes=launched.size,
        processes_here=launched.here,
    )


def memory_available(root: Path = Path("/")) -> int:
    """Bytes of host memory that this process may still take, by the kernel and by its cgroups."""
    return _memory(root)[1]


@dataclass(frozen=True, slots=True)
class _Gpu:
    name: str
    total: int
    available: int
    native_bf16: bool
    count: int


def _gpu() -> _Gpu | None:
    if not _has_driver():
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    available, total = torch.cuda.mem_get_info()
    bf16 = torch.cuda.get_device_capability()[0] >= 8  # Ampere and later
    return _Gpu(torch.cuda.get_device_name(), total, available, bf16, torch.cuda.device_count())


def _has_driver() -> bool:
    """Whether NVIDIA's or AMD's driver can be loaded; without one there is no need to import torch and ask."""
    for name in ("libcuda.so.1", "nvcuda.dll", "libamdhip64.so"):
        with suppress(OSError):
            ctypes.CDLL(name)
            return True
    return False


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _processor_flags(root: Path) -> frozenset[str]:
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86; Arm
            return frozenset(value.split())
    return frozenset()


def _processor(root: Path) -> str:
    """Its name; empty where the system does not say."""
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return " ".join(value.split())
    return platform.processor() if root == Path("/") else ""


def _cores(root: Path) -> int:
    affinity = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quotas = [affinity, *(_quota(folder) for folder in _cgroup_folders(root, "cpu"))]
    return max(1, min(quotas))


def _quota(folder: Path) -> int:
    """Cores of a cgroup's processor quota, rounded up; without one, more than any machine has."""
    words = (_text(folder / "cpu.max") or "").split()  # version 2: "max 100000" or "150000 100000"
    if len(words) != 2:  # version 1
        words = [(_text(folder / f"cpu.cfs_{name}_us") or "").strip() for name in ("quota", "period")]
    try:
        quota, period = float(words[0]), float(words[1])
    except ValueError:
        return _NO_LIMIT
    return math.ceil(quota / period) if quota > 0 and period > 0 else _NO_LIMIT


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """The process's cgroup folders of a controller, both versions, from its own up to the root."""
    for line in (_text(root / "proc/self/cgroup") or "0::/").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if number == "0" and not controllers:
            bases = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            bases = [root / "sys/fs/cgroup" / controller, root / "sys/fs/cgroup" / controllers]
        else:
            continue
        for base in dict.fromkeys(bases):
            folder = base / name.lstrip("/")
            while folder != base:
                yield folder
                folder = folder.parent
            yield base


def _memory(root: Path) -> tuple[int, int]:
    total, available = _host_memory(root)
    for folder in _cgroup_folders(root, "memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if limit is None or limit >= min(_NO_LIMIT, total):
            continue
        total = limit
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        available = min(available, limit - max(0, used - _reclaimable(folder)))
    limit = _address_space(root)
    if limit is not None and limit < total:  # `ulimit -v`, and some batch systems
        total, available = limit, min(available, limit - _mapped(root))
    return total, max(0, min(available, total))


def _host_memory(root: Path) -> tuple[int, int]:
    sizes: dict[str, int] = {}
    for line in (_text(root / "proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            sizes[name] = int(value.split()[0]) * 1024
    if "MemTotal" in sizes:
        return sizes["MemTotal"], sizes.get("MemAvailable", sizes["MemTotal"])
    try:
        import psutil
    except ImportError as error:
        what = "the machine's memory cannot be read"
        raise InputError(what, where="machine", mend="install psutil, or give --memory") from error
    memory = psutil.virtual_memory()
    return int(memory.total), int(memory.available)


def _address_space(root: Path) -> int | None:
    """The process's own limit (RLIMIT_AS), in bytes of addresses."""
    for line in (_text(root / "proc/self/limits") or "").splitlines():
        if line.startswith("Max address space"):
            soft = line.split()[3]
            return int(soft) if soft.isdigit() else None
    return None


def _mapped(root: Path) -> int:
    """Bytes of addresses that the process has taken."""
    for line in (_text(root / "proc/self/status") or "").splitlines():
        if line.startswith("VmSize:"):
            return int(line.split()[1]) * 1024
    return 0


def _number(path: Path) -> int | None:
    text = (_text(path) or "").strip()
    return int(text) if text.isdigit() else None


def _reclaimable(folder: Path) -> int:
    """Cached file pages, which the kernel gives back on demand."""
    for line in (_text(folder / "memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and value.isdigit():
            return int(value)
    return 0
