"""Did training change what it should have? Exact comparisons, tensor by tensor, with no tolerance."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from welltuned.errors import RunError


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """One trained tensor against its start.

    Attributes:
        sha256: of the tensor's bytes now (little-endian, row-major, in its own number format).
        change: sum of absolute changes, in float64; NaN where the start is not known.
        moved: whether any byte differs; where the start is not known, whether any number is not 0.
        mean, variance: of its numbers now, in float64.
    """

    name: str
    sha256: str
    change: float
    moved: bool
    finite: bool
    mean: float
    variance: float


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def check_tensors(now: Mapping[str, Tensor], start: Mapping[str, Tensor | None]) -> tuple[TensorCheck, ...]:
    """Compare every tensor with its start; both hold the same names. None: a start that is not known."""
    return tuple(check_tensor(name, tensor, start[name]) for name, tensor in now.items())


def check_tensor(name: str, now: Tensor, start: Tensor | None) -> TensorCheck:
    now = now.detach().cpu()
    wide = now.double()
    if start is None:
        change, moved = math.nan, bool(now.any())
    else:
        start = start.detach().cpu()
        change, moved = float((wide - start.double()).abs().sum()), not torch.equal(now, start)
    return TensorCheck(
        name=name,
        sha256=sha256(now),
        change=change,
        moved=moved,
        finite=bool(torch.isfinite(now).all()),
        mean=float(wide.mean()),
        variance=float(wide.var(correction=0)),
    )


def require_learned(checks: Iterable[TensorCheck], updates: int) -> None:
    """Raise if a trained tensor is not finite or did not move."""
    for problem in not_learned(checks, updates):
        raise RunError(problem)


def not_learned(checks: Iterable[TensorCheck], updates: int | None) -> list[str]:
    """Sentences on tensors that are not finite or did not move; `updates` None: their number is not known.

    LoRA's A cannot move in the first update, because B starts at zero and with it A's gradient.
    """
    checks, found = tuple(checks), []
    broken = [c.name for c in checks if not c.finite]
    if broken:
        found.append(f"{some(broken)} hold numbers that are not finite; lower the learning rate")
    first = updates is not None and updates < 2
    still = [c.name for c in checks if not c.moved and not (first and c.name.endswith("lora_A"))]
    if still:
        when = "" if updates is None else f" in {updates} updates"
        found.append(f"{some(still)} did not move{when}: they are not connected to the loss, or the rate is 0")
    return found


def some(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"
