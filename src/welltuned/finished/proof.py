"""Is what lies on disk what was trained? Every tensor against its checksum and its start, or against another's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from welltuned.adapters.files import read_adapter
from welltuned.adapters.layers import Learned, learned
from welltuned.adapters.verify import TensorCheck, check_tensors, not_learned, some
from welltuned.errors import InputError
from welltuned.finished.find import Finished, find
from welltuned.models.adapter_file import UNDERSTOOD, load_adapter, read_config, split_start
from welltuned.models.frozen import frozen_weight, is_projection
from welltuned.models.load import load_model, load_skeleton
from welltuned.models.lora import attach
from welltuned.models.lora_settings import FROM_WEIGHTS, Init, parse_init


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found.

    Attributes:
        against: what the tensors were compared with, in words.
        checks: every trained tensor.
        modules: how much each adapted module's weights changed; () for a whole model.
        problems: sentences; none means that all is well.
        notes: what could not be compared, and why.
    """

    path: Path
    against: str
    checks: tuple[TensorCheck, ...]
    modules: tuple[Learned, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


def prove(path: str | Path, against: str | Path | None = None) -> Proof:
    """Compare what was trained with its start, or with another adapter, checkpoint, run or model; exactly.

    Raises:
        InputError: something cannot be read, or an adapter is compared with another model's.
    """
    subject = find(path)
    other = None if against is None else find(against)
    if subject.adapter is None:
        return _of_model(subject, other)
    if other is not None and other.adapter is None and other.is_run:
        raise InputError("an adapter cannot be compared with a fully tuned run", where=str(against))
    return _of_adapter(subject, other)


def _of_adapter(subject: Finished, other: Finished | None) -> Proof:
    assert subject.adapter is not None
    notes: list[str] = []
    config = read_config(subject.adapter, accept=UNDERSTOOD)
    whole = config.get("bias") not in (None, "none") or config.get("modules_to_save") or config.get("use_dora")
    skeleton = (
        load_model(subject.model, dtype=torch.float32, nf4=subject.nf4) if whole else load_skeleton(subject.model)
    )
    bank = load_adapter(skeleton, subject.adapter, device="cpu")
    now, settings = {name: t.clone() for name, t in bank.tensors().items()}, bank.settings[0]
    bank.detach()
    start_of_run: dict[str, Tensor] | None = None
    if _start_of(subject) in FROM_WEIGHTS:
        now, start_of_run = split_start(now)
    if other is not None and other.adapter is not None:
        start, words = _other_tensors(skeleton, other.adapter, now), str(other.path)
    elif start_of_run is not None:
        start, words = dict[str, Tensor | None](start_of_run), "its start, which the adapter holds too"
    else:
        known = _known_start(subject)
        began = replace(settings, **known) if known is not None else settings
        start = dict[str, Tensor | None](attach(skeleton, began, bank.saved, device="cpu").tensors())
        if _start_of(subject) is Init.LOFTQ:
            start = {name: None if ".lora_" in name else t for name, t in start.items()}
            notes.append("A and B started at what 4 bits had lost, which is not computed again here")
        elif known is None:
            start = {name: None if name.endswith("lora_A") else t for name, t in start.items()}
            notes.append("where A started is not known, since this is no Run of welltuned; B started at 0")
        words = "its start"
    checks = check_tensors(now, start)
    adapter = read_adapter_anyhow(subject.adapter)
    sizes = None
    if other is not None and other.adapter is None:
        sizes, words = (
            _sizes(load_model(other.model, dtype=torch.float32)),
            f"its start and the weights of {other.path}",
        )
    compared = other.path if other is not None and other.adapter is not None else None
    problems = [*_against_run(subject, checks), *_against_plan(subject), *_unmoved(subject, checks, compared)]
    return Proof(
        path=subject.path,
        against=words,
        checks=checks,
        modules=tuple(learned(adapter, sizes)) if adapter is not None else (),
        problems=tuple(dict.fromkeys(problems)),
        notes=tuple(notes),
    )


def read_adapter_anyhow(folder: Path) -> Any:
    """The adapter's file, or None where its numbers are not finite (which the checks say)."""
    try:
        return read_adapter(folder, accept=UNDERSTOOD)
    except InputError as error:
        if "not finite" in error.what:
            return None
        raise


def _other_tensors(skeleton: PreTrainedModel, folder: Path, now: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    theirs = load_adapter(skeleton, folder, device="cpu").tensors()
    for name in sorted(theirs.keys() ^ now.keys()):
        where = "is only in the other adapter" if name in theirs else "is not in the other adapter"
        raise InputError(f"{name} {where}", where=str(folder), mend="compare adapters of the same modules")
    for name, tensor in theirs.items():
        if tensor.shape != now[name].shape:
            what = f"{name} is {tuple(tensor.shape)} there and {tuple(now[name].shape)} here"
            raise InputError(what, where=str(folder), mend="compare adapters of one rank")
    return dict(theirs)


def _start_of(subject: Finished) -> Init | None:
    """How a Run's adapter began; None where that is not known."""
    if subject.plan is None or "init_lora_weights" not in subject.plan.choices:
        return None
    found = parse_init(subject.plan.value("init_lora_weights"))
    return None if found is None else found[0]


def _known_start(subject: Finished) -> dict[str, Any] | None:
    """The settings from which a Run's adapter began; None where they are not known."""
    begun = _start_of(subject)
    if subject.plan is None or begun not in (Init.KAIMING, Init.GAUSSIAN):
        return None
    return {"init": begun, "seed": subject.plan.value("seed")}


def _unmoved(subject: Finished, checks: tuple[TensorCheck, ...], compared: Path | None) -> list[str]:
    if compared is None:
        return not_learned(checks, _updates(subject))
    equal = [c.name for c in checks if not c.moved]
    finite = not_learned([replace(c, moved=True) for c in checks], None)
    return [*finite, *([f"{some(equal)} are the same, byte for byte, as in {compared}"] if equal else [])]


def _updates(subject: Finished) -> int | None:
    updates = subject.facts.get("updates")
    return updates if isinstance(updates, int) else None


def _sizes(model: PreTrainedModel) -> dict[str, float]:
    """The Frobenius norm of every linear layer's weights."""
    return {
        name: float(frozen_weight(module).dense(torch.float32).norm())
        for name, module in model.named_modules()
        if is_projection(module)
    }


def _against_run(subject: Finished, checks: tuple[TensorCheck, ...]) -> list[str]:
    """Whether these are the very tensors that the run noted when it ended."""
    noted = {entry["name"]: entry["sha256"] for entry in subject.facts.get("trained_tensors") or ()}
    if not noted:
        return []
    found, problems = {check.name: check.sha256 for check in checks}, []
    changed = [name for name in found if name in noted and found[name] != noted[name]]
    missing, extra = sorted(noted.keys() - found.keys()), sorted(found.keys() - noted.keys())
    if changed:
        problems.append(f"{some(changed)} are not what run.json has the checksum of: the file was changed or damaged")
    if missing:
        problems.append(f"{some(missing)} were trained by the run and are missing")
    if extra:
        problems.append(f"{some(extra)} were not trained by the run")
    return problems


def _against_plan(subject: Finished) -> list[str]:
    """Whether the adapter's configuration still says what the plan says: alpha scales all that it does."""
    if subject.plan is None or subject.adapter is None:
        return []
    config = read_config(subject.adapter, accept=UNDERSTOOD)
    twice = 2 if _start_of(subject) in FROM_WEIGHTS else 1  # see models.adapter_file.without_start
    factors = {"r": twice, "lora_alpha": math.sqrt(twice) if subject.plan.value("use_rslora") else twice}
    found = []
    for key in ("r", "lora_alpha", "use_rslora"):
        planned = subject.plan.value(key) * factors.get(key, 1)
        if config.get(key, False) != planned:
            found.append(f"{key} is {config.get(key)} in adapter_config.json and {planned} in plan.yaml")
    return found


def require_as_planned(subject: Finished) -> None:
    """Refuse an adapter whose configuration is not the one it was trained with.

    Raises:
        InputError: r, alpha or rsLoRA differ from plan.yaml.
    """
    for problem in _against_plan(subject):
        mend = "put the plan's value back; to change the strength, use `welltuned adapter scale`"
        raise InputError(problem, where=str(subject.adapter), mend=mend)


def _of_model(subject: Finished, other: Finished | None) -> Proof:
    if other is not None and other.adapter is not None:
        raise InputError("a whole model is compared with a whole model", where=str(other.path))
    base = other.model if other is not None else subject.base
    if base is None:
        raise InputError("what this model was before is not known", where=str(subject.path), mend="give --against")
    now = dict(load_model(subject.model, dtype=torch.float32).named_parameters())
    start = dict(load_model(base, dtype=torch.float32).named_parameters())
    for name in sorted(now.keys() ^ start.keys()):
        raise InputError(f"{name} is in one of the models only", where=str(subject.path), mend="give its own base")
    for name, tensor in now.items():
        if tensor.shape != start[name].shape:
            what = f"{name} is {tuple(tensor.shape)} here and {tuple(start[name].shape)} in {base}"
            raise InputError(what, where=str(subject.path), mend="give its own base")
    checks = check_tensors(now, start)
    problems = [*_against_run(subject, checks)]
    if subject.is_run:
        trained = {entry["name"] for entry in subject.facts.get("trained_tensors") or ()}
        problems += not_learned([c for c in checks if c.name in trained], _updates(subject))
    elif not any(check.moved for check in checks):
        problems.append(f"every tensor equals that of {base}")
    broken = [c.name for c in checks if not c.finite]
    if broken and not subject.is_run:
        problems.append(f"{some(broken)} hold numbers that are not finite")
    return Proof(subject.path, base, checks, (), tuple(dict.fromkeys(problems)))
