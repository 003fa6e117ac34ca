"""One checkpoint: a folder of safetensors and JSON, no pickle, with a manifest by which every byte is verified.

    trained.safetensors     the trained tensors by name
    optimizer.safetensors   AdamW's two moments in the flat layout (of 8-bit AdamW codes and scales), its step counts,
                            and the average of the weights where the run keeps one (ema_decay)
    state.json              position, monitor, what the run was (training/identity.py)
    manifest.json           written last: size and sha256 of the other three, and of itself

Where the model lies in pieces, files of every rank stand in the place of the first two (training/pieces.py).

It is written beside its name, fsynced, read back and renamed, so that a folder with its name is whole. Everything
random in a run is a function of (seed, update, row), so there is no random state to keep, and nothing in a checkpoint
depends on how many devices share the work.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from welltuned.advice.codec import to_plain
from welltuned.errors import InputError, RunError
from welltuned.models.lora import Slot
from welltuned.training import durable
from welltuned.training.durable import (
    BESIDE,
    Written,
    checksum,
    publish_folder,
    remove_folder,
    sync_folder,
    write_file,
)
from welltuned.training.position import Position as Position
from welltuned.training.position import Snapshot as Snapshot
from welltuned.training.streamed import data, header

WHOLE, IN_PIECES = 1, 2  # formats: the latter where every rank writes its part
FORMAT = IN_PIECES  # the newest
CHECKPOINTS, DAMAGED = "checkpoints", "damaged"
TRAINED, OPTIMIZER, STATE, MANIFEST = "trained.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{6,})")
_SHARD = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")
_NO_CODES = {"trained", "exp_avg", "exp_avg_sq", "step", "average"}
_NO_STATE: Mapping[str, Any] = MappingProxyType({})


class Damaged(RunError):
    """A checkpoint is not what was written."""


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def folder_of(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:06d}"


def write_checkpoint(run: Path, snapshot: Snapshot) -> Path:
    """Write one checkpoint durably and read it back. One that is there already and whole is left as it is.

    Raises:
        OSError: as the disk says. Damaged: what was read back is not what was written.
    """
    target = folder_of(run, snapshot.position.step)
    place = begin_checkpoint(run, snapshot, snapshot.bytes)
    if place is None:
        return target
    beside = Path(place)
    files = {
        TRAINED: write_file(beside / TRAINED, _safetensors(named(snapshot.flat_KP, snapshot.slots))),
        OPTIMIZER: write_file(beside / OPTIMIZER, _safetensors(_optimizer_tensors(snapshot))),
        STATE: write_file(beside / STATE, [_json(_state(snapshot))]),
    }
    write_file(beside / MANIFEST, [_manifest(snapshot, files, WHOLE)])
    verify(beside)
    publish_folder(beside, target)
    return target


def begin_checkpoint(run: Path, snapshot: Snapshot, needed: int) -> str | None:
    """An empty folder beside the checkpoint's name; None where one with that name is there already and whole.

    Raises:
        OSError: as the disk says, or where it has no room for `needed` bytes.
    """
    target = folder_of(run, snapshot.position.step)
    if target.exists():
        try:
            verify(target)
            return None
        except Damaged as damage:
            set_aside(target, str(damage))
    durable.require_room(run, needed)
    beside = target.with_name(target.name + BESIDE)
    if beside.exists():
        remove_folder(beside)
    if not target.parent.is_dir():
        durable.SYSTEM.make_folder(target.parent)
        sync_folder(run)
    durable.SYSTEM.make_folder(beside)
    return str(beside)


def finish_checkpoint(run: Path, snapshot: Snapshot, files: Mapping[str, Written], shapes: Mapping[str, Any]) -> None:
    """Give a checkpoint in pieces its name, once every rank has written its files and read them back.

    Args:
        shapes: of all that is trained, in the order of a whole flat buffer.
    """
    target = folder_of(run, snapshot.position.step)
    beside = target.with_name(target.name + BESIDE)
    more = {"trained": shapes, "step": snapshot.steps_G.tolist(), "average": snapshot.average_KP is not None}
    state = write_file(beside / STATE, [_json(_state(snapshot, IN_PIECES, more))])
    write_file(beside / MANIFEST, [_manifest(snapshot, {STATE: state, **files}, IN_PIECES)])
    if checksum(beside / STATE) != state:
        raise Damaged(f"{STATE} is not what was written")
    _read_manifest(beside)
    publish_folder(beside, target)


def named(flat_KP: Tensor, slots: Sequence[Slot]) -> dict[str, Tensor]:
    """The trained tensors by name, in the order of the flat buffer; with several adapters their number comes first."""
    several = flat_KP.shape[0] > 1
    return {
        (f"{k}/" if several else "") + s.name: flat_KP[k, s.start : s.start + s.size].view(s.shape)
        for k in range(flat_KP.shape[0])
        for s in slots
    }


def _optimizer_tensors(snapshot: Snapshot) -> dict[str, Tensor]:
    fp32 = {"exp_avg": snapshot.exp_avg_KP, "exp_avg_sq": snapshot.exp_avg_sq_KP, "step": snapshot.steps_G}
    found = {**fp32, **snapshot.codes}
    return found if snapshot.average_KP is None else {**found, "average": snapshot.average_KP}


def _state(snapshot: Snapshot, format_: int = WHOLE, more: Mapping[str, Any] = _NO_STATE) -> dict[str, Any]:
    return {
        "format": format_,
        "run": snapshot.run,
        "position": to_plain(snapshot.position),
        "metrics_bytes": snapshot.metrics_bytes,
        "identity": dict(snapshot.identity),
        "versions": dict(snapshot.versions),
        **more,
    }


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file, piece by piece: safetensors' own writer would hold all of it once more.

    The wider types come first, so that all lie at multiples of their size.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    yield header({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    for tensor in tensors.values():
        if tensor.numel():
            yield data(tensor)


def _json(value: Any) -> bytes:
    """As Python writes it, NaN and all: a monitor's numbers come back as they were."""
    return (json.dumps(value, ensure_ascii=True, indent=1) + "\n").encode("utf-8")


def _manifest(snapshot: Snapshot, files: Mapping[str, Written], format_: int) -> bytes:
    body = {
        "format": format_,
        "run": snapshot.run,
        "step": snapshot.position.step,
        "files": {name: asdict(file) for name, file in files.items()},
    }
    return _json({**body, "sha256": sha256(_json(body)).hexdigest()})


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself. `extra` are files that it does not know."""

    run: str
    step: int
    extra: tuple[str, ...]


def verify(folder: Path) -> Manifest:
    """Compare every byte with the manifest.

    Raises:
        Damaged: with the reason. InputError: a newer version wrote it.
    """
    plain = _read_manifest(folder)
    for name, wanted in plain["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != wanted["size"]:
                raise Damaged(f"{name} has {size:,} bytes instead of {wanted['size']:,}")
            if checksum(path).sha256 != wanted["sha256"]:
                raise Damaged(f"{name} is not what was written: its sha256 differs")
        except FileNotFoundError as error:
            raise Damaged(f"{name} is missing") from error
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from error
    known = {*plain["files"], MANIFEST}
    extra = tuple(sorted(path.name for path in folder.iterdir() if path.name not in known and path.name[0] != "."))
    return Manifest(run=plain["run"], step=plain["step"], extra=extra)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        text = (folder / MANIFEST).read_bytes()
        plain: dict[str, Any] = json.loads(text)
        body = {key: value for key, value in plain.items() if key != "sha256"}
        whole = text == _json({**body, "sha256": sha256(_json(body)).hexdigest()})
        newer = whole and plain["format"] > FORMAT
        known = whole and not newer and _are_known(plain["format"], plain["files"])
    except FileNotFoundError as error:
        raise Damaged(f"{MANIFEST} is missing: the save was cut short") from error
    except OSError as error:
        raise Damaged(f"{MANIFEST} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{MANIFEST} is not what was written ({error})") from error
    if newer:
        what = f"the checkpoint has format {plain['format']}, and this version reads up to {FORMAT}"
        raise InputError(what, where=str(folder), mend="use the version of welltuned that wrote it, or a newer one")
    if not known:
        raise Damaged(f"{MANIFEST} is not what was written: its sha256 differs")
    return plain


def _are_known(format_: int, files: Mapping[str, Any]) -> bool:
    """Whether these are the files of such a checkpoint, all by their own names in its folder."""
    if format_ == WHOLE:
        return files.keys() == {TRAINED, OPTIMIZER, STATE}
    return STATE in files and all(name == STATE or _SHARD.fullmatch(name) for name in files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint, read.

    Attributes:
        shapes: of the trained tensors by name; `trained` are they themselves, empty where only the position was read.
    """

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    trained: Mapping[str, Tensor]
    exp_avg_KP: Tensor
    exp_avg_sq_KP: Tensor
    steps_G: Tensor
    position: Position
    run: str
    metrics_bytes: int
    identity: Mapping[str, Any]
    versions: Mapping[str, Any]
    average_KP: Tensor | None = None
    codes: Mapping[str, Tensor] = field(default_factory=dict)
    extra: tuple[str, ...] = ()


def read_checkpoint(folder: Path, *, tensors: bool = True) -> Checkpoint:
    """Verify and read; without `tensors` only its position, step counts and shapes. Raises as `verify` does."""
    manifest = verify(folder)
    try:
        state = json.loads((folder / STATE).read_bytes())
        foreign = [name for name in manifest.extra if name.endswith(".safetensors")]
        if foreign and state["format"] == IN_PIECES:  # all that lie there are read as parts of one
            raise Damaged(f"{foreign[0]} does not belong to it")
        shapes, held = _held(folder, state, tensors)
        return Checkpoint(
            folder=folder,
            shapes=shapes,
            trained=held.get("trained", {}),
            exp_avg_KP=held.get("exp_avg", torch.empty(0)),
            exp_avg_sq_KP=held.get("exp_avg_sq", torch.empty(0)),
            steps_G=held["step"],
            average_KP=held.get("average"),
            codes={name: tensor for name, tensor in held.items() if name not in _NO_CODES},
            position=Position.from_json(state["position"]),
            run=state["run"],
            metrics_bytes=state["metrics_bytes"],
            identity=state["identity"],
            versions=state["versions"],
            extra=manifest.extra,
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"it cannot be read ({error})") from error


def _held(folder: Path, state: Mapping[str, Any], tensors: bool) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """The trained tensors' shapes, and what of the rest is asked for."""
    if state["format"] == IN_PIECES:
        from welltuned.training.pieces import read_whole

        shapes = {name: tuple(shape) for name, shape in state["trained"].items()}
        held = read_whole(folder, shapes, state["average"]) if tensors else {}
        return shapes, {**held, "step": torch.tensor(state["step"])}
    if tensors:
        trained = load_file(folder / TRAINED)
        shapes = {name: tuple(tensor.shape) for name, tensor in trained.items()}
        return shapes, {"trained": trained, **load_file(folder / OPTIMIZER)}
    with safe_open(folder / TRAINED, "pt") as file, safe_open(folder / OPTIMIZER, "pt") as moments:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        return shapes, {"step": moments.get_tensor("step")}


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all that have a checkpoint's name, newest first; by their names, never by clocks."""
    root = run / CHECKPOINTS
    if not root.is_dir():
        return []
    named_ = [(_NAME.fullmatch(path.name), path) for path in root.iterdir()]
    return sorted(((int(match[1]), path) for match, path in named_ if match and path.is_dir()), reverse=True)


def set_aside(folder: Path, reason: str) -> Path:
    """Move a damaged checkpoint out of the way, never delete it, and leave the reason beside it."""
    room = folder.parent / DAMAGED
    room.mkdir(exist_ok=True)
    number = 1
    while (place := room / (folder.name if number == 1 else f"{folder.name}-{number}")).exists():
        number += 1
    durable.SYSTEM.rename(folder, place)
    (place.with_name(place.name + ".reason.txt")).write_text(reason + "\n", encoding="utf-8")
    sync_folder(room)
    return place


def newest(run: Path, run_id: str | None, *, tensors: bool = True) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """The newest checkpoint that verifies and belongs to this run; sentences on those that were set aside for it.

    Args:
        tensors: whether they are read as well, and not by each rank for itself.
    """
    notes = []
    for step, folder in checkpoints(run):
        try:
            found = read_checkpoint(folder, tensors=tensors)
            if found.position.step != step:
                raise Damaged(f"it holds update {found.position.step} under the name of update {step}")
            if run_id is not None and found.run != run_id:
                raise Damaged("it belongs to another run")
        except Damaged as damage:
            place = set_aside(folder, str(damage))
            notes.append(f"the checkpoint of update {step} was set aside as {place.relative_to(run)}: {damage}")
            continue
        if found.extra:
            notes.append(f"{folder.relative_to(run)} holds files that no checkpoint has: {', '.join(found.extra)}")
        return found, tuple(notes)
    return None, tuple(notes)


def rotate(run: Path, keep: int, best: int | None, run_id: str) -> None:
    """Remove the oldest checkpoints of this run beyond `keep`, never the best; call with the newest one verified."""
    ours = [(step, folder) for step, folder in checkpoints(run) if _run_of(folder) == run_id]
    for step, folder in ours[max(1, keep) :]:
        if step != best:
            remove_folder(folder)


def _run_of(folder: Path) -> str | None:
    try:
        return str(_read_manifest(folder)["run"])
    except (Damaged, InputError):
        return None
