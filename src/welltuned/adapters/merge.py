"""An adapter merged into its base: W + s B A in float32, saved in 16 bits, and compared with what it came from.

Where the base lies in safetensors files whose names are the model's own, its weights are read, changed and written one
at a time, and no more than a shard is in memory. Other bases (GGUF, experts that transformers stacks on reading) are
loaded once and changed in place. The comparison loads base and merged model after each other, never both.
"""

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from welltuned.adapters.agree import Agreement, Reference, compare, logits_of, prompts_of, require_agreement
from welltuned.adapters.files import ORIGIN, AdapterFile, pair, read_adapter
from welltuned.adapters.merge_loaded import merge_loaded
from welltuned.adapters.merge_stream import can_stream, merge_stream
from welltuned.adapters.place import written_whole
from welltuned.adapters.verify import some
from welltuned.errors import InputError
from welltuned.models.adapter_file import UNDERSTOOD, WEIGHTS, load_adapter
from welltuned.models.fingerprint import fingerprint
from welltuned.models.load import load_config, load_model, load_skeleton, load_tokenizer
from welltuned.models.resolve import SourceKind, resolve

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be merged.

    Args:
        base: the model to merge into.
        nf4: the base was in 4 bits while the adapter was trained, and is to be what it was then, dequantised.
        trained_dtype: the number format that the base had then.
        chat_template: of the run; written into the merged model's tokenizer.
        base_weights: fingerprints of the weights that the adapter was trained on; {} where they are not known.
        origin: what is noted beside the merged model.
    """

    base: str
    adapter: Path
    dtype: torch.dtype = torch.bfloat16
    nf4: bool = False
    trained_dtype: torch.dtype = torch.float32
    chat_template: str | None = None
    base_weights: Mapping[str, str]
    origin: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Merged:
    """`streamed`: whether the weights were read and written one at a time."""

    path: Path
    agreement: Agreement
    modules: int
    streamed: bool
    reference: Reference


def merge(job: Job, out: Path) -> Merged:
    """Merge, compare, and only then put the result in its place.

    Raises:
        InputError: something that would give a wrong model: see `refuse_wrong`, `refuse_other_base`.
        RunError: the merged model is not what base and adapter are.
    """
    adapter = read_adapter(job.adapter, accept=UNDERSTOOD)
    skeleton, tokenizer = load_skeleton(job.base), load_tokenizer(job.base)
    refuse_wrong(job, adapter, skeleton, tokenizer)
    elements = sum(p.numel() for p in skeleton.parameters())
    prompts = prompts_of(tokenizer, job.chat_template)
    with written_whole(out, elements * job.dtype.itemsize) as folder:
        reference = _reference(job, prompts)
        pairs = {_plain(module): pair(adapter, module) for module in adapter.modules}
        streamed = can_stream(job.base, skeleton, pairs, adapter)
        if streamed:
            requantise = job.trained_dtype if job.nf4 else None
            merge_stream(job.base, skeleton, pairs, folder, dtype=job.dtype, requantise=requantise)
        else:
            merge_loaded(job.base, job.adapter, folder, dtype=job.dtype, nf4=job.nf4, trained_dtype=job.trained_dtype)
        _save_tokenizer(tokenizer, job.chat_template, folder)
        agreement = compare(reference, load_model(str(folder), dtype=torch.float32))
        gc.collect()
        require_agreement(agreement, job.dtype)
        noted = {**job.origin, "adapter": _digest(job.adapter), "agreement": _numbers(agreement)}
        (folder / ORIGIN).write_text(json.dumps(noted, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return Merged(out, agreement, len(pairs), streamed, reference)


def _numbers(agreement: Agreement) -> dict[str, float]:
    return {name: getattr(agreement, name) for name in Agreement.__slots__}


def _plain(module: str) -> str:
    return module.removeprefix("base_model.model.")


def _reference(job: Job, prompts: Sequence[Sequence[int]]) -> Reference:
    """Logits of the base and of base with adapter, as the adapter was trained."""
    model = load_model(job.base, dtype=torch.float32, nf4=job.nf4)
    refuse_other_base(job, model)
    bank = load_adapter(model, job.adapter)
    with bank.disabled():
        base_NV = logits_of(model, prompts)
    tuned_NV = logits_of(model, prompts)
    del bank, model
    gc.collect()
    return Reference(prompts, base_NV, tuned_NV)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str | None, folder: Path) -> None:
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def refuse_wrong(job: Job, adapter: AdapterFile, skeleton: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what cannot be merged rightly, before anything large is read.

    Raises:
        InputError: an adapter on a tied head, a resized vocabulary, factors of another model's shapes, a base that
            holds this adapter already, or one whose files are quantised.
    """
    where = str(job.adapter)
    config = load_config(job.base)
    if resolve(job.base).kind is not SourceKind.GGUF and config.to_dict().get("quantization_config"):
        mend = "give the 16-bit model with --base"
        raise InputError("the base's files are quantised, and nothing can be added to them", where=job.base, mend=mend)
    _refuse_vocabulary(job, adapter, skeleton, tokenizer)
    for module in adapter.modules:
        if _plain(module) in _ends(skeleton):
            tied = skeleton.config.get_text_config().tie_word_embeddings
            why = ", which shares its weights with the embedding" if tied else ""
            mend = "train without it: target_modules: all-linear"
            raise InputError(f"the adapter is on {_plain(module)}{why}", where=where, mend=mend)
    load_adapter(skeleton, job.adapter).detach()  # every name and shape
    origin = Path(job.base) / ORIGIN
    if origin.is_file() and json.loads(origin.read_text(encoding="utf-8")).get("adapter") == _digest(job.adapter):
        raise InputError("this adapter is merged into that model already", where=job.base, mend="give its base")


def _ends(model: PreTrainedModel) -> set[str]:
    """Names of the embedding and the head."""
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    return {name for name, module in model.named_modules() if id(module) in ends}


def _refuse_vocabulary(
    job: Job, adapter: AdapterFile, skeleton: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = skeleton.get_input_embeddings().weight.shape[0]
    for name in adapter.others:
        resized = len(adapter.tensors[name]) != rows
        if resized and _plain(name).removesuffix(".weight").replace(".base_layer", "") in _ends(skeleton):
            what = f"the adapter holds all of {_plain(name)} with {len(adapter.tensors[name]):,} rows: its vocabulary "
            mend = "merge it with PEFT, after resizing the base"
            raise InputError(f"{what}was resized (the base has {rows:,})", where=str(job.adapter), mend=mend)
    own = job.adapter / "tokenizer.json"
    if own.is_file():
        added = json.loads(own.read_text(encoding="utf-8")).get("added_tokens") or []
        largest = max((token["id"] for token in added), default=0)
        known = max(tokenizer.get_vocab().values())  # Gemma 3 1B's own has one more than its embedding, an image's
        if largest >= rows and largest > known:
            what = f"its tokenizer has token {largest}, and the base's embedding ends with {rows - 1}"
            raise InputError(what, where=str(own), mend="resize the base's vocabulary first, as it was for training")


def refuse_other_base(job: Job, model: PreTrainedModel) -> None:
    """Refuse a base whose weights are not those that the adapter was trained on.

    Raises:
        InputError: naming the first weights that differ.
    """
    now = fingerprint(model)
    changed = [name for name in job.base_weights if name in now and now[name] != job.base_weights[name]]
    if changed:
        what = f"these are not the weights that the adapter was trained on ({some(changed)})"
        mend = "give the model of run.json; one with the adapter merged into it already is another one"
        raise InputError(what, where=job.base, mend=mend)
    if job.base_weights and not now.keys() & job.base_weights.keys():
        raise InputError("this is another model than the adapter was trained on", where=job.base)


def _digest(adapter: Path) -> str:
    import hashlib

    return hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest()
