"""A run's numbers into a snapshot, and from a checkpoint back into the flat buffers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from welltuned.advice.codec import to_plain
from welltuned.errors import RunError
from welltuned.models.full import FullParameters
from welltuned.models.lora import AdapterBank
from welltuned.training.average import Average
from welltuned.training.checkpoint import Checkpoint, Position, Snapshot, named
from welltuned.training.optimizer_8bit import Optimizer
from welltuned.training.ranks import Ranks
from welltuned.training.step import Trained

if TYPE_CHECKING:
    from welltuned.models.sharded import ShardedParameters


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose checkpoint it is: the run's id, what the run is of, and what bits depend on beside that."""

    run: str
    identity: Mapping[str, Any]
    versions: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Numbers:
    """All that updates change: weights, moments, step counts, and the average where the run keeps one."""

    trained: Trained
    optimizer: Optimizer
    average: Average | None

    @property
    def flat(self) -> list[torch.Tensor]:
        """The flat buffers, which are the same on every rank unless the model lies in pieces."""
        average = [] if self.average is None else [self.average.flat_KP]
        moments = [self.optimizer.exp_avg_KP, self.optimizer.exp_avg_sq_KP, *self.optimizer.codes.values()]
        return [self.trained.flat_KP, *moments, *average]

    @property
    def pieces(self) -> "ShardedParameters | None":
        """What is trained, where each rank holds and saves a part of it."""
        if not (isinstance(self.trained, FullParameters) and self.trained.in_pieces):
            return None
        from welltuned.models.sharded import ShardedParameters

        assert isinstance(self.trained, ShardedParameters)
        return self.trained

    def take(self, position: Position, origin: Origin, metrics_bytes: int, *, copied: bool) -> Snapshot:
        """The run at this position in host memory: a copy, or the live buffers, on a CPU and where all ranks write.

        Raises:
            RunError: a number is not finite; such a state is never saved.
        """
        flat = self.flat if self.pieces is not None else [tensor.to("cpu", copy=copied) for tensor in self.flat]
        flat_KP, exp_avg_KP, exp_avg_sq_KP, *rest = flat
        codes = dict(zip(self.optimizer.codes, rest, strict=False))
        wide = [tensor for tensor in codes.values() if tensor.is_floating_point()]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in (flat_KP, exp_avg_KP, exp_avg_sq_KP, *wide)):
            raise RunError("trained weights or moments are not finite: they are not saved")
        return Snapshot(
            flat_KP=flat_KP,
            exp_avg_KP=exp_avg_KP,
            exp_avg_sq_KP=exp_avg_sq_KP,
            average_KP=rest[-1] if self.average is not None else None,
            codes=codes,
            steps_G=self.optimizer.steps_G,
            slots=self.trained.slots,
            position=position,
            run=origin.run,
            metrics_bytes=metrics_bytes,
            identity=origin.identity,
            versions=origin.versions,
        )

    def restore(self, found: Checkpoint | None, ranks: Ranks) -> Position:
        """Take in a checkpoint, which the first rank has read, on all of them; where the run was.

        Raises:
            RunError: it holds other tensors than the model has.
        """
        if self.pieces is not None:
            return self._restore_pieces(found, ranks, self.pieces)
        steps, position = ranks.first(lambda: self._read(found))
        ranks.spread_(self.flat)
        if found is None:
            self.optimizer.restore_steps(steps)
        return Position.from_json(position)

    def _restore_pieces(self, found: Checkpoint | None, ranks: Ranks, trained: "ShardedParameters") -> Position:
        from welltuned.training.pieces import read_own_part

        place, steps, position = ranks.first(lambda: _told(found))
        names = ("trained", "exp_avg", "exp_avg_sq", "average")
        ranks.each(lambda: read_own_part(Path(place), dict(zip(names, self.flat, strict=False)), trained))
        self.optimizer.restore_steps(steps)
        return Position.from_json(position)

    def _read(self, found: Checkpoint | None) -> tuple[list[float], Mapping[str, Any]]:
        assert found is not None
        restore_weights(self.trained, found)
        self.optimizer.restore(found.exp_avg_KP, found.exp_avg_sq_KP, found.steps_G, found.codes)
        if self.average is not None:
            self.average.restore(found.average_KP, self.trained.flat_KP)
        return found.steps_G.tolist(), to_plain(found.position)

    def start_over(self) -> bool:
        """Everything as before the first update; False where that start is not known any more."""
        if not isinstance(self.trained, AdapterBank):
            return False
        self.trained.flat_KP.copy_(self.trained.start_KP)
        self.optimizer.reset()
        if self.average is not None:
            self.average.restore(self.trained.start_KP, self.trained.flat_KP)
        return True


def _told(found: Checkpoint | None) -> tuple[str, list[float], Mapping[str, Any]]:
    assert found is not None
    return str(found.folder), found.steps_G.tolist(), to_plain(found.position)


def same_tensors(found: Checkpoint, trained: Trained) -> bool:
    """Whether a checkpoint holds exactly what is trained here, by names and shapes."""
    shapes = {name: tuple(t.shape) for name, t in named(trained.flat_KP, trained.slots).items()}
    if isinstance(trained, FullParameters):
        shapes = {name: trained.whole[name] for name in shapes}
    return shapes == dict(found.shapes)


def restore_weights(trained: Trained, found: Checkpoint) -> None:
    """Copy a checkpoint's tensors into the flat buffer."""
    places = named(trained.flat_KP, trained.slots)
    if not same_tensors(found, trained):
        raise RunError(f"{found.folder} holds other tensors than this model with this recipe trains")
    for name, tensor in found.trained.items():
        places[name].copy_(tensor)
