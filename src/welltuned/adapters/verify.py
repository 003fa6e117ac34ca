"""Did training change what it should have? Exact comparisons, tensor by tensor, with no tolerance."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from welltuned.errors import RunError


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """One trained tensor against its start.

    Attributes:
        sha256: of the tensor's bytes now (little-endian fp32, row-major).
        change: sum of absolute changes, in float64.
        moved: whether any byte differs.
    """

    name: str
    sha256: str
    change: float
    moved: bool
    finite: bool


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def check_tensors(now: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> tuple[TensorCheck, ...]:
    """Compare every tensor with its start; both hold the same names."""
    return tuple(_check(name, tensor, start[name]) for name, tensor in now.items())


def _check(name: str, now: Tensor, start: Tensor) -> TensorCheck:
    now, start = now.detach().cpu(), start.detach().cpu()
    return TensorCheck(
        name=name,
        sha256=sha256(now),
        change=float((now.double() - start.double()).abs().sum()),
        moved=not torch.equal(now, start),
        finite=bool(torch.isfinite(now).all()),
    )


def require_learned(checks: Iterable[TensorCheck], updates: int) -> None:
    """Raise if a trained tensor is not finite or did not move.

    LoRA's A cannot move in the first update, because B starts at zero and with it A's gradient.
    """
    checks = tuple(checks)
    broken = [c.name for c in checks if not c.finite]
    if broken:
        raise RunError(f"{_some(broken)} hold numbers that are not finite; lower the learning rate")
    still = [c.name for c in checks if not c.moved and not (updates < 2 and c.name.endswith("lora_A"))]
    if still:
        raise RunError(
            f"{_some(still)} did not move in {updates} updates: they are not connected to the loss, or the rate is 0"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"
