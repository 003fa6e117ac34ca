"""A checkpoint in pieces: every rank writes and reads its own part of weights, moments and average.

By torch.distributed.checkpoint (DCP), in its safetensors form, so that nothing is a pickle. Its files are shard-…, at
least one of every rank, with tensors named trained/…, exp_avg/…, exp_avg_sq/… and average/… and the first row of each.
Everything else is as in a whole checkpoint (training/checkpoint.py): state.json, a manifest with sizes and sha256,
written beside its name, fsynced, read back by whoever wrote it, renamed by the first rank. Any number of ranks can read
it, one among them.
"""

import io
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from welltuned.errors import RunError
from welltuned.models.sharded import ShardedParameters
from welltuned.training import durable
from welltuned.training.checkpoint import (
    CHECKPOINTS,
    OPTIMIZER,
    TRAINED,
    Damaged,
    Snapshot,
    begin_checkpoint,
    finish_checkpoint,
)
from welltuned.training.durable import Written, checksum
from welltuned.training.ranks import Group

if TYPE_CHECKING:
    from welltuned.training.loop import Loop

T = TypeVar("T")
FILE_BYTES = 2**30  # of one file of one rank: each is laid out in memory once more before it is written


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def keep_pieces(loop: "Loop", trained: ShardedParameters) -> None:
    """Save the loop's position, unless that is done: all ranks write, and training waits for them."""
    ranks, directory, keeper = loop.ranks, loop.setting.directory, loop.setting.keeper
    assert isinstance(ranks, Group)
    if ranks.first(lambda: keeper.has(loop.at.step)):
        return
    started = time.perf_counter()
    snapshot = ranks.each(lambda: loop.snapshot(copied=False))
    _, failed = _agreed(ranks, directory.sync_metrics)  # metrics.jsonl must not be behind its checkpoint
    if failed is None:
        failed = write_pieces(directory.path, snapshot, trained, ranks)
    seconds = time.perf_counter() - started
    ranks.first(lambda: loop.say(keeper.written(snapshot, failed, seconds)))


def write_pieces(run: Path, snapshot: Snapshot, trained: ShardedParameters, ranks: Group) -> str | None:
    """Write one checkpoint, all ranks together; why it could not be, where that is so, the same on all.

    Args:
        snapshot: this rank's part. The first rank's says what stands in state.json.

    Raises:
        Lost: a rank is gone.
    """
    tensors = {
        f"{kind}/{name}": piece
        for kind, flat_KP in _kinds(snapshot).items()
        for name, piece in trained.dtensors(flat_KP).items()
    }
    needed = sum(4 * tensor.numel() for tensor in tensors.values())  # of whole tensors

    def begin() -> str | None:
        if not ranks.is_first:
            return None
        durable.sweep(run / CHECKPOINTS)
        return begin_checkpoint(run, snapshot, needed)

    begun, failed = _agreed(ranks, begin)
    place = begun[0]
    if failed is not None or place is None:
        return failed
    beside = Path(place)
    _, failed = _agreed(ranks, lambda: _require_folder(beside, ranks))
    files: dict[str, Written] = {}
    if failed is None:
        files, failed = _written(beside, tensors, ranks)
    if failed is None:
        shapes = {name: list(shape) for name, shape in trained.whole.items()}
        _, failed = _agreed(ranks, lambda: finish_checkpoint(run, snapshot, files, shapes) if ranks.is_first else None)
    return failed


def _kinds(snapshot: Snapshot) -> dict[str, Tensor]:
    found = {"trained": snapshot.flat_KP, "exp_avg": snapshot.exp_avg_KP, "exp_avg_sq": snapshot.exp_avg_sq_KP}
    return found if snapshot.average_KP is None else {**found, "average": snapshot.average_KP}


def _agreed(ranks: Group, make: Callable[[], T | None]) -> tuple[list[T | None], str | None]:
    """What it gives on every rank, or the first reason for which a disk refused it on one."""

    def tried() -> tuple[T | None, str | None]:
        try:
            return make(), None
        except OSError as error:
            return None, error.strerror or str(error)
        except RunError as error:
            return None, str(error)

    found = ranks.gather(tried)
    failed = next((f"{why} (process {rank})" for rank, (_, why) in enumerate(found) if why is not None), None)
    return [value for value, _ in found], failed


def _require_folder(beside: Path, ranks: Group) -> None:
    if not beside.is_dir():
        raise RunError(f"process {ranks.rank} does not see {beside}: a model in pieces needs a folder that all share")


def _written(beside: Path, tensors: Mapping[str, Any], ranks: Group) -> tuple[dict[str, Written], str | None]:
    """The files of every rank, each written by its own and read back."""
    files = _Files()
    writer = HuggingFaceStorageWriter(str(beside), _file_of(tensors), save_distributed=True)
    writer.fs, writer.sync_files = files, False  # ours are fsynced when they are closed
    try:
        with ranks.connected():
            save(dict(tensors), storage_writer=writer, process_group=ranks.words)
    except CheckpointException as error:  # on all ranks alike
        rank, (why, _) = next(iter(error.failures.items()))
        return {}, f"{why.strerror if isinstance(why, OSError) and why.strerror else why} (process {rank})"

    def read_back() -> dict[str, Written]:
        for name, file in files.written.items():
            if checksum(beside / name) != file:
                raise Damaged(f"{name} is not what was written")
        return files.written

    parts, failed = _agreed(ranks, read_back)
    return {name: file for part in parts if part is not None for name, file in part.items()}, failed


def _file_of(tensors: Mapping[str, Any]) -> dict[str, int]:
    """In which of a rank's files a tensor lies."""
    found, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        size = 4 * tensor.numel() // tensor.device_mesh.size()
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        found[name], filled = number, filled + size
    return found


class _Files(FileSystem):
    """Where DCP writes: files whose hash is taken on the way and which are fsynced, by `durable.SYSTEM`."""

    def __init__(self) -> None:
        self.written: dict[str, Written] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        stream = _Stream(Path(path))
        try:
            yield stream
        except BaseException:
            stream.abandon()
            raise
        stream.close()
        self.written[Path(path).name] = Written(stream.tell(), stream.digest.hexdigest())


class _Stream(io.RawIOBase):
    def __init__(self, path: Path):
        self.digest, self._size, self._number = sha256(), 0, durable.SYSTEM.open(path)

    def write(self, data: Any) -> int:
        self.digest.update(data)
        rest = memoryview(data).cast("B")
        self._size += len(rest)
        written = len(rest)
        while len(rest):
            rest = rest[durable.SYSTEM.write(self._number, rest[: durable.CHUNK]) :]
        return written

    def tell(self) -> int:
        return self._size

    def abandon(self) -> None:
        if self._number >= 0:
            os.close(self._number)
            self._number = -1

    def close(self) -> None:
        if self._number >= 0:
            try:
                durable.SYSTEM.fsync(self._number)
            finally:
                self.abandon()


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_own_part(folder: Path, kinds: Mapping[str, Tensor], trained: ShardedParameters) -> None:
    """This rank's rows from a verified checkpoint into flat buffers; `kinds` by their names in it.

    Raises:
        RunError: it lacks one of them.
    """
    if (folder / TRAINED).is_file():
        return _read_rows(folder, kinds, trained)
    state = {
        f"{kind}/{name}": piece for kind, flat_KP in kinds.items() for name, piece in trained.dtensors(flat_KP).items()
    }
    _load(folder, state)


def _load(folder: Path, state: Mapping[str, Any]) -> None:
    try:
        with warnings.catch_warnings():  # that it reads for itself alone, as it is told to
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(dict(state), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as error:
        why = next(iter(error.failures.values()))[0]
        raise RunError(f"{folder} does not hold what is trained here ({why})") from error


def _read_rows(folder: Path, kinds: Mapping[str, Tensor], trained: ShardedParameters) -> None:
    """The same from a checkpoint that one process wrote, whose moments are flat."""
    starts, at = {}, 0
    for name, shape in trained.whole.items():
        starts[name], at = at, at + torch.Size(shape).numel()
    with safe_open(folder / TRAINED, "pt") as weights, safe_open(folder / OPTIMIZER, "pt") as moments:
        for kind, flat_KP in kinds.items():
            for name, place in trained.pieces_of(flat_KP).items():
                first, count = trained.first_row(name), len(place)
                if kind == "trained":
                    place.copy_(weights.get_slice(name)[first : first + count])
                    continue
                width = torch.Size(trained.whole[name][1:]).numel()
                columns = slice(starts[name] + first * width, starts[name] + (first + count) * width)
                place.copy_(moments.get_slice(kind)[0:1, columns].view(place.shape))


def read_whole(folder: Path, shapes: Mapping[str, tuple[int, ...]], average: bool) -> dict[str, Any]:
    """All of a checkpoint in pieces, for one process: tensors by name, and the flat buffers in their order."""
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    trained = {name: torch.empty(shape) for name, shape in shapes.items()}
    state = {f"trained/{name}": tensor for name, tensor in trained.items()}
    flat = {}
    for kind in ("exp_avg", "exp_avg_sq", *(("average",) if average else ())):
        flat[kind], at = torch.empty(1, total), 0
        for name, shape in shapes.items():
            size = torch.Size(shape).numel()
            state[f"{kind}/{name}"], at = flat[kind][0, at : at + size].view(shape), at + size
    _load(folder, state)
    return {"trained": trained, **flat}
