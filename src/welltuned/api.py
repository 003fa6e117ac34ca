"""welltuned from Python: the commands as functions.

import welltuned
result = welltuned.train(model="HuggingFaceTB/SmolLM2-135M-Instruct", data="tickets.jsonl", out="runs/tickets")
tuned = welltuned.load("runs/tickets")
print(tuned.reply("My kettle leaks."))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from welltuned.advice.plan import Plan
from welltuned.data.conversation import Conversation, Message
from welltuned.data.render import render_prompt
from welltuned.errors import InputError
from welltuned.models.adapter_file import load_adapter
from welltuned.models.generate import Decoding, replies
from welltuned.models.load import load_model, load_tokenizer
from welltuned.models.lora import AdapterBank
from welltuned.recipe import KEYS, load_recipe
from welltuned.training.events import Observer, silent
from welltuned.training.inspection import SHOWN, Inspection
from welltuned.training.inspection import inspect as inspect_recipe
from welltuned.training.prepare import prepare
from welltuned.training.resume import resume as resume_run
from welltuned.training.run import RunResult
from welltuned.training.run import train as train_prepared
from welltuned.training.rundir import ADAPTER, MODEL, read_run, require_free


def plan(recipe: str | None = None, **options: Any) -> Plan:
    """Everything that a run would do, without loading weights.

    Args:
        recipe: path of a recipe file.
        options: recipe keys (`model`, `data`, `tune`, ...) and hyperparameters (`learning_rate`, `r`, ...).

    Raises:
        InputError: an unknown key, or anything that training could not use.
    """
    return prepare(_recipe(recipe, options), weights_needed=False).plan


def inspect(recipe: str | None = None, *, show: int = SHOWN, rows: Sequence[str] = (), **options: Any) -> Inspection:
    """What the data would teach, without training: counts, lengths, findings, and rows as runs of trained text or not.

    Args:
        recipe: path of a recipe file.
        show: how many rows to choose.
        rows: rows to show instead: origins such as `train.jsonl:7`, or the numbers in them.
        options: as in `plan`. What training would refuse is in the result, whose `blocked` is then true.

    Raises:
        InputError: as in `plan`, for data that cannot be read at all.
    """
    return inspect_recipe(_recipe(recipe, options), show=show, rows=rows)


def train(recipe: str | None = None, *, out: str | Path, observer: Observer = silent, **options: Any) -> RunResult:
    """Plan and train, and write the Run to `out`; options as in `plan`."""
    asked = _recipe(recipe, options)
    require_free(Path(out))
    return train_prepared(prepare(asked), Path(out), observer)


def resume(run: str | Path, *, observer: Observer = silent, accept_changes: bool = False) -> RunResult:
    """Finish a run that was interrupted, from its newest sound checkpoint.

    Args:
        run: the directory that `train` was given as `out`.
        accept_changes: go on although recipe, data, base model or tokenizer changed since.

    Raises:
        InputError: there is no unfinished run, or something changed.
    """
    return resume_run(Path(run), observer, accept_changes=accept_changes)


def _recipe(path: str | None, options: dict[str, Any]) -> Any:
    unknown = [key for key in options if key not in KEYS]
    if unknown:
        raise InputError(f"{unknown[0]!r} is no recipe key", mend=f"known keys: {', '.join(KEYS)}")
    return load_recipe(path, options)


@dataclass(frozen=True, slots=True)
class Tuned:
    """A tuned model, ready to answer.

    Attributes:
        bank: its adapter, None after full fine-tuning.
        chat_template: the template that it was trained with; None for plain text.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    bank: AdapterBank | None
    chat_template: str | None

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant begins, as in training."""
        return render_prompt(Conversation(tuple(messages), "the prompt"), self.tokenizer, self.chat_template)

    def reply(self, text: str, *, system: str | None = None, decoding: Decoding | None = None) -> str:
        """The answer to one message; greedy unless `decoding` says otherwise."""
        messages = [Message("system", system)] if system is not None else []
        return replies(self.model, self.tokenizer, [self.prompt([*messages, Message("user", text)])], decoding)[0]


def load(run: str | Path, *, device: str | None = None) -> Tuned:
    """The tuned model of a finished run: its base with the adapter, or the model after full fine-tuning."""
    path = Path(run)
    facts = read_run(path)
    if facts.get("method") == "reward":
        mend = "load it with transformers' AutoModelForSequenceClassification, with PEFT where it is an adapter"
        raise InputError("this Run is a reward model, which scores and does not answer", where=str(path), mend=mend)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if (path / MODEL).is_dir():
        model = load_model(str(path / MODEL), dtype=dtype, device=device)
        return Tuned(model, load_tokenizer(str(path / MODEL)), None, facts["chat_template"])
    model = load_model(facts["model"], dtype=dtype, device=device, nf4=facts["tune"] == "qlora")
    bank = load_adapter(model, path / ADAPTER)
    return Tuned(model, load_tokenizer(facts["model"]), bank, facts["chat_template"])
