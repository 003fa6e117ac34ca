"""What the benchmarks share: a description of the machine, and where results are written."""

import json
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import welltuned
from welltuned.facts.machine import read_machine_facts

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "unsloth", "triton", "numpy")


def describe_machine() -> dict[str, Any]:
    """Date, processor, memory, GPU with its driver, and versions: what a number means nothing without."""
    facts = read_machine_facts(ask_gpu=True)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": facts.cores,
        "memory_bytes": facts.memory_total,
        "gpu": facts.gpu_name,
        "gpu_memory_bytes": facts.gpu_memory_total,
        "driver": None if facts.gpu_name is None else _driver(),
        "versions": {"python": platform.python_version(), "welltuned": welltuned.__version__, **_versions()},
    }


def write_result(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `result` to NAME.json in the folder of results, over what lay there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def runs_so_far(name: str, settings: dict[str, Any], folder: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """The runs that NAME.json holds, so that rounds can be added to them; only those of the same settings will do."""
    result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    for key, value in settings.items():
        if result[key] != value:
            raise SystemExit(
                f"{name}.json was measured with {key} {result[key]}, not {value}: begin anew, without --more"
            )
    runs: dict[str, list[dict[str, Any]]] = result["runs"]
    return runs


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor()


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        out = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.split("\n")[0].strip()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found
