"""A run's numbers into a snapshot, and from a checkpoint back into the flat buffers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from welltuned.errors import RunError
from welltuned.training.checkpoint import Checkpoint, Position, Snapshot, named
from welltuned.training.optimizer import FlatAdamW
from welltuned.training.step import Trained


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose checkpoint it is: the run's id, what the run is of, and what bits depend on beside that."""

    run: str
    identity: Mapping[str, Any]
    versions: Mapping[str, Any]


def take(
    trained: Trained,
    optimizer: FlatAdamW,
    position: Position,
    origin: Origin,
    metrics_bytes: int,
    average_KP: torch.Tensor | None = None,
    *,
    copied: bool,
) -> Snapshot:
    """The run at this position in host memory: a copy, or on a CPU the live buffers themselves.

    Raises:
        RunError: a number is not finite; such a state is never saved.
    """
    flat_KP, exp_avg_KP, exp_avg_sq_KP = (
        tensor.to("cpu", copy=copied) for tensor in (trained.flat_KP, optimizer.exp_avg_KP, optimizer.exp_avg_sq_KP)
    )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (flat_KP, exp_avg_KP, exp_avg_sq_KP)):
        raise RunError("trained weights or moments are not finite: they are not saved")
    return Snapshot(
        flat_KP=flat_KP,
        exp_avg_KP=exp_avg_KP,
        exp_avg_sq_KP=exp_avg_sq_KP,
        average_KP=None if average_KP is None else average_KP.to("cpu", copy=copied),
        steps_G=optimizer.steps_G,
        slots=trained.slots,
        position=position,
        run=origin.run,
        metrics_bytes=metrics_bytes,
        identity=origin.identity,
        versions=origin.versions,
    )


def same_tensors(found: Checkpoint, trained: Trained) -> bool:
    """Whether a checkpoint holds exactly what is trained here, by names and shapes."""
    places = named(trained.flat_KP, trained.slots)
    return {n: t.shape for n, t in places.items()} == {n: t.shape for n, t in found.trained.items()}


def restore_weights(trained: Trained, found: Checkpoint) -> None:
    """Copy a checkpoint's tensors into the flat buffer."""
    places = named(trained.flat_KP, trained.slots)
    if not same_tensors(found, trained):
        raise RunError(f"{found.folder} holds other tensors than this model with this recipe trains")
    for name, tensor in found.trained.items():
        places[name].copy_(tensor)
