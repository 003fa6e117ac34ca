"""The adapter that training goes on from: where it lies, and what should be said of it. No torch."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from welltuned.errors import InputError
from welltuned.facts.adapter import CONFIG, read_adapter_facts
from welltuned.models.resolve import resolve
from welltuned.recipe import Recipe
from welltuned.training.rundir import ADAPTER, MODEL, RUN, read_run

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class StartAdapter:
    """What of an adapter belongs to what a run is of.

    Attributes:
        note: a sentence where something about it should be seen.
        digest: of its numbers, as they lie on disk.
    """

    note: str | None
    digest: str


def adapter_folder(adapter: str) -> Path:
    """The PEFT folder that a recipe's `adapter` means: itself, or a Run's."""
    path = Path(adapter).expanduser()
    if (path / CONFIG).is_file():
        return path
    if (path / RUN).is_file():
        if (path / ADAPTER / CONFIG).is_file():
            return path / ADAPTER
        if (path / MODEL).is_dir():
            what, mend = "this Run trained all of a model", f"give its folder as the model: {path / MODEL}"
            raise InputError(what, where=f"adapter: {adapter}", mend=mend)
    if (path / ADAPTER / CONFIG).is_file():
        raise InputError("this Run is not finished", where=f"adapter: {adapter}", mend="resume it first")
    mend = "give the directory of a finished run, or a folder in PEFT's format"
    raise InputError(f"there is no adapter (no {RUN}, no {CONFIG})", where=f"adapter: {adapter}", mend=mend)


def start_adapter(recipe: Recipe) -> StartAdapter | None:
    """The recipe's start adapter; None without one.

    Raises:
        InputError: there is none there.
    """
    if recipe.adapter is None:
        return None
    folder = adapter_folder(recipe.adapter)
    facts = read_adapter_facts(str(folder))
    try:
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"there is no {WEIGHTS}", where=str(folder), mend="give an adapter's folder") from error
    return StartAdapter(_other_base(recipe, recipe.adapter, facts.base), digest)


def _other_base(recipe: Recipe, adapter: str, base: str | None) -> str | None:
    run = Path(adapter).expanduser()
    trained_on = read_run(run)["model"] if (run / RUN).is_file() else base
    if not trained_on or _same(trained_on, recipe.model):
        return None
    return f"the adapter that training goes on from was trained on {trained_on}, and is put on {recipe.model} here"


def _same(a: str, b: str) -> bool:
    try:
        first, second = resolve(a, weights_needed=False), resolve(b, weights_needed=False)
    except InputError:
        return False
    if first.path is None or second.path is None:
        return first.name == second.name
    return first.path.resolve() == second.path.resolve()
