"""What a user points at after training: a Run, an adapter's folder, or a model; found, understood, loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from welltuned.adapters.files import ORIGIN
from welltuned.advice.plan import Plan, plan_from_yaml
from welltuned.data.templates import resolve_chat_template
from welltuned.errors import InputError
from welltuned.finished.checkpoints import adapter_of, is_checkpoint
from welltuned.models.adapter_file import CONFIG, UNDERSTOOD, load_adapter, read_config
from welltuned.models.load import load_model, load_tokenizer
from welltuned.models.lora import AdapterBank
from welltuned.models.paths import inside
from welltuned.models.resolve import NO_TRUST, SourceKind, resolve
from welltuned.recipe import Trust
from welltuned.training.rundir import ADAPTER, MODEL, PLAN, RUN, read_run

SHOWN = 5  # runs that are named where one is not found
_NO_FACTS: Mapping[str, Any] = MappingProxyType({})
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Something trained.

    Attributes:
        path: as the user gave it.
        adapter: the adapter's folder; None for a whole model.
        model: what to load: the whole model, or the adapter's base.
        base: what it was before training; None where that is not known.
        nf4: whether the base was stored in 4 bits while the adapter was trained.
        dtype: the number format that the base had then; None where it is not known.
        chat_template: what rows were rendered with; None for plain text.
        facts: run.json, or what an adapter or model made from a Run says of it; empty for others' files.
        plan: the Run's; None for anything else.
    """

    path: Path
    adapter: Path | None
    model: str
    base: str | None
    nf4: bool = False
    dtype: torch.dtype | None = None
    chat_template: str | None = None
    facts: Mapping[str, Any] = field(default_factory=lambda: _NO_FACTS)
    plan: Plan | None = None

    @property
    def is_run(self) -> bool:
        return self.plan is not None

    @property
    def started(self) -> str | None:
        """How the adapter began (`init_lora_weights`); None where that is not known."""
        if self.plan is not None and "init_lora_weights" in self.plan.choices:
            return str(self.plan.value("init_lora_weights"))
        known = self.facts.get("init_lora_weights")
        return None if known is None else str(known)

    def origin(self, made: str, **more: Any) -> dict[str, Any]:
        """What is written beside something made from this: enough for chat, eval and export to go on."""
        kept = {key: self.facts[key] for key in ("updates", "held_out", "base_weights") if key in self.facts}
        return {
            "made": made,
            "from": str(self.path),
            "model": self.base,
            "tune": "qlora" if self.nf4 else "lora",
            "chat_template": self.chat_template,
            "init_lora_weights": self.started,
            **kept,
            **more,
        }


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to answer; `bank` is its adapter, None for a whole model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    bank: AdapterBank | None


def find(path: str | Path) -> Finished:
    """Understand what the path names, without loading weights.

    Raises:
        InputError: it is neither a finished run, nor an adapter's folder, nor a model.
    """
    folder = Path(path)
    if (folder / CONFIG).is_file():
        return _adapter(folder)
    if (folder / RUN).is_file() or (folder / PLAN).is_file():
        return _run(folder)
    if is_checkpoint(folder):
        return replace(_adapter(adapter_of(folder)), path=folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        mend = "give a run, an adapter's folder or a model"
        raise InputError("there is neither a finished run nor an adapter", where=str(path), mend=mend)
    if resolve(str(path)).kind is SourceKind.HUB:
        _refuse_misspelt(folder)
    facts = _origin(folder) if folder.is_dir() else {}
    template = facts["chat_template"] if "chat_template" in facts else _template(str(path))
    base = facts.get("model")
    return Finished(path=folder, adapter=None, model=str(path), base=base, chat_template=template, facts=facts)


def _refuse_misspelt(folder: Path) -> None:
    """Raise InputError where what could be a hub id is meant for a run here: the hub would be asked at length."""
    beside = folder.parent
    runs = [child.name for child in beside.iterdir() if (child / RUN).is_file()] if beside.is_dir() else []
    close = get_close_matches(folder.name, runs)
    if close or (runs and beside != Path(".")):
        mend = f"did you mean {beside / close[0]}?" if close else f"there are: {', '.join(sorted(runs)[:SHOWN])}"
        raise InputError("there is no such run", where=str(folder), mend=mend)


def _run(folder: Path) -> Finished:
    facts = read_run(folder)
    for name in (ADAPTER, MODEL):
        inside(folder, name, str(folder))
    plan = plan_from_yaml(_text(folder / PLAN), str(folder / PLAN))
    whole = (folder / MODEL).is_dir()
    if not whole and not (folder / ADAPTER / CONFIG).is_file():
        raise InputError(f"the run has neither {ADAPTER}/ nor {MODEL}/", where=str(folder), mend="it is not whole")
    return Finished(
        path=folder,
        adapter=None if whole else folder / ADAPTER,
        model=str(folder / MODEL) if whole else facts["model"],
        base=facts["model"],
        nf4=facts["tune"] == "qlora",
        dtype=_DTYPES[plan.value("dtype")],
        chat_template=facts["chat_template"],
        facts=facts,
        plan=plan,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        mend = "give the directory of a finished run"
        raise InputError(f"there is no {path.name}", where=str(path.parent), mend=mend) from error


def _adapter(folder: Path) -> Finished:
    facts = _origin(folder)
    config = read_config(folder, accept=UNDERSTOOD)
    base = facts.get("model") or config.get("base_model_name_or_path")
    if not base:
        mend = "write its base model's id or path into base_model_name_or_path"
        raise InputError("the adapter does not say what it was trained on", where=str(folder / CONFIG), mend=mend)
    return Finished(
        path=folder,
        adapter=folder,
        model=base,
        base=base,
        nf4=facts.get("tune") == "qlora",
        chat_template=facts["chat_template"] if "chat_template" in facts else _template(base),
        facts=facts,
    )


def _origin(folder: Path) -> dict[str, Any]:
    path = folder / ORIGIN
    if not path.is_file():
        return {}
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{ORIGIN} is damaged ({error})", where=str(folder)) from error
    return facts


def _template(model: str) -> str | None:
    return resolve_chat_template(load_tokenizer(model))


def device_of_choice() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def usual_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def load(
    finished: Finished, *, device: str | None = None, dtype: torch.dtype | None = None, trust: Trust = NO_TRUST
) -> Loaded:
    """The model with its adapter, in float32 on a CPU and bfloat16 on a GPU unless `dtype` says otherwise."""
    device = device or device_of_choice()
    nf4 = finished.nf4 and finished.adapter is not None
    model = load_model(finished.model, dtype=dtype or usual_dtype(device), device=device, nf4=nf4, trust=trust)
    bank = None if finished.adapter is None else load_adapter(model, finished.adapter)
    return Loaded(model, load_tokenizer(finished.model, trust), bank)
