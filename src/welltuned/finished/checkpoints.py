"""A run's checkpoint as an adapter: its trained tensors under the Run's configuration, as PEFT would have them."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from welltuned.adapters.files import ORIGIN
from welltuned.advice.plan import Plan, plan_from_yaml
from welltuned.errors import InputError
from welltuned.models.adapter_file import save_adapter
from welltuned.models.load import load_model, load_skeleton
from welltuned.models.lora import AdapterBank, attach
from welltuned.models.lora_settings import FROM_WEIGHTS
from welltuned.models.saved import named_modules
from welltuned.recipe import Tune
from welltuned.training.checkpoint import CHECKPOINTS, MANIFEST, Damaged, read_checkpoint
from welltuned.training.rundir import PLAN
from welltuned.training.starting import lora_settings

_KEPT: list[TemporaryDirectory[str]] = []  # removed when the process ends


def is_checkpoint(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and folder.parent.name == CHECKPOINTS


@cache
def adapter_of(folder: Path) -> Path:
    """A folder in PEFT's format, which lasts as long as the process, with what the checkpoint holds.

    Raises:
        InputError: it is damaged, or of a run that trains all of a model.
    """
    run = folder.parent.parent
    try:
        found = read_checkpoint(folder)
        plan = plan_from_yaml((run / PLAN).read_text(encoding="utf-8"), str(run / PLAN))
    except Damaged as damage:
        raise InputError(f"the checkpoint is damaged: {damage}", where=str(folder), mend="give another") from damage
    except OSError as error:
        raise InputError(f"there is no {PLAN}", where=str(run), mend="give a checkpoint within its run") from error
    if plan.recipe.tune is Tune.FULL:
        raise InputError(
            "the checkpoint holds a whole model", where=str(folder), mend="resume the run, or give another"
        )
    bank = _bank(plan)
    places = bank.tensors()
    if {n: t.shape for n, t in places.items()} != {n: t.shape for n, t in found.trained.items()}:
        raise InputError("the checkpoint holds other tensors than its plan trains", where=str(folder))
    for name, tensor in found.trained.items():
        places[name].copy_(tensor)
    _KEPT.append(TemporaryDirectory(prefix="welltuned-"))
    place = Path(_KEPT[-1].name)
    save_adapter(bank, place, base=str(bank.model.config.name_or_path))
    (place / ORIGIN).write_text(json.dumps(_origin(plan, folder, found.position.step)) + "\n", encoding="utf-8")
    return place


def _bank(plan: Plan) -> AdapterBank:
    """The adapters as they began; on the real weights where their start is taken from them."""
    settings, recipe = lora_settings(plan), plan.recipe
    wanted = plan.value("modules_to_save") if "modules_to_save" in plan.choices else ()
    if settings.init in FROM_WEIGHTS or wanted:
        nf4 = recipe.tune is Tune.QLORA
        model = load_model(recipe.model, dtype=torch.float32, nf4=nf4, trust=recipe.trust)
    else:
        model = load_skeleton(recipe.model, recipe.trust)
        model.config.name_or_path = recipe.model
    return attach(model, settings, named_modules(model, wanted), device="cpu")


def _origin(plan: Plan, folder: Path, step: int) -> dict[str, Any]:
    recipe = plan.recipe
    return {"made": f"train, after update {step}", "from": str(folder), "model": recipe.model, "tune": str(recipe.tune)}
