"""The result of full fine-tuning in pieces: gathered tensor by tensor on the first rank, and read back."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from welltuned.adapters.verify import TensorCheck, check_tensors, require_learned
from welltuned.errors import RunError
from welltuned.models.load import load_model
from welltuned.models.sharded import ShardedParameters
from welltuned.training import durable
from welltuned.training.checkpoint import Position
from welltuned.training.durable import BESIDE
from welltuned.training.identity import base_digest
from welltuned.training.prepare import Prepared
from welltuned.training.ranks import Group
from welltuned.training.result import beside
from welltuned.training.rundir import MODEL, RunDir, read_started
from welltuned.training.starting import save_model
from welltuned.training.streamed import data, header

GATHERED = "gathered.safetensors" + BESIDE  # the ending by which an interrupted run's is swept away


def save_gathered(
    trained: ShardedParameters, prepared: Prepared, directory: RunDir, at: Position, ranks: Group
) -> tuple[TensorCheck, ...]:
    """Compare every trained tensor with its start and write the model, whole. All ranks call this together.

    Raises:
        RunError: a tensor did not move or is not finite, the base on disk is another by now, or what was read back is
            not what was trained. OSError: as the disk says. On all ranks.
    """
    with gathered_file(trained, directory.path, ranks) as file:
        return ranks.first(lambda: _verify_and_save(prepared, directory, at, file))


@contextmanager
def gathered_file(trained: ShardedParameters, run: Path, ranks: Group) -> Iterator[Path]:
    """All trained tensors in one file on the first rank's disk, which is there within the block."""
    file = run / GATHERED
    _gather(trained, file, ranks)
    try:
        yield file
    finally:
        if ranks.is_first:
            file.unlink(missing_ok=True)


def _gather(trained: ShardedParameters, file: Path, ranks: Group) -> None:
    """Tensor by tensor, so that no more than one is whole in memory. What the disk refuses is raised at the end, on
    all, since the others wait for the first rank in every tensor.
    """
    failed: OSError | None = None
    number = -1
    try:
        number = durable.SYSTEM.open(file) if ranks.is_first else -1
        _write(number, header({name: (torch.float32, shape) for name, shape in trained.whole.items()}))
    except OSError as error:
        failed = error
    for slot in trained.slots:
        rows = trained.flat_KP[0, slot.start : slot.start + slot.size].view(slot.shape)
        parts = ranks.collect(rows.cpu())
        if failed is None and parts:
            try:
                _write(number, data(torch.cat(parts)[: trained.whole[slot.name][0]]))
            except OSError as error:
                failed = error

    def settle() -> None:
        if number >= 0:
            durable.SYSTEM.fsync(number)
        if failed is not None:
            raise failed

    try:
        ranks.each(settle)
    finally:
        if number >= 0:
            os.close(number)


def _write(number: int, piece: bytes | memoryview) -> None:
    rest = memoryview(piece)
    while number >= 0 and len(rest):
        rest = rest[durable.SYSTEM.write(number, rest[: durable.CHUNK]) :]


def _verify_and_save(prepared: Prepared, directory: RunDir, at: Position, file: Path) -> tuple[TensorCheck, ...]:
    recipe = prepared.plan.recipe
    if read_started(directory.path).identity["base"] != base_digest(recipe.model):
        raise RunError("the base model on disk changed while it was trained")
    model = load_model(recipe.model, dtype=torch.float32, trust=recipe.trust)
    start = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with _mapped(file) as now:
        checks = check_tensors(now, start)
        require_learned(checks, at.step - at.skipped)
        with beside(directory.path / MODEL) as folder:
            _save_whole(model, now, prepared, folder)
    return checks


def save_stored(prepared: Prepared, file: Path, folder: Path) -> None:
    """Write a gathered model, whole."""
    recipe = prepared.plan.recipe
    with _mapped(file) as now:
        _save_whole(load_model(recipe.model, dtype=torch.float32, trust=recipe.trust), now, prepared, folder)


@contextmanager
def _mapped(file: Path) -> Iterator[dict[str, Tensor]]:
    with safe_open(file, "pt") as stored:
        yield {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping


def _save_whole(model: PreTrainedModel, now: dict[str, Tensor], prepared: Prepared, folder: Path) -> None:
    """Write the model with these numbers in the place of its own, and compare all of them with what is read back.

    Raises:
        RunError: they differ.
    """
    for name, parameter in model.named_parameters():
        if name in now:
            parameter.data = now[name]
    save_model(model, prepared.recipe.method, folder)
    prepared.tokenizer.save_pretrained(folder)
    again = load_model(str(folder), dtype=torch.float32, trust=prepared.recipe.trust)
    kept = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in kept or not torch.equal(kept[name], parameter):
            raise RunError(f"{folder}: {name} is not what was saved; the disk may be full or failing")
