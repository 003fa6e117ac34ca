"""A run handed on: as PEFT's folder, as a merged model, as GGUF for llama.cpp, or for Ollama."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from welltuned.adapters.agree import (
    Agreement,
    Reference,
    compare,
    logits_of,
    prompts_of,
    require_agreement,
)
from welltuned.adapters.files import read_adapter, save
from welltuned.adapters.gguf.read_back import read_back
from welltuned.adapters.gguf.write import Quantization, Written, require_exportable, write_lora, write_model
from welltuned.adapters.merge import Job, Merged, merge
from welltuned.adapters.ollama import modelfile, turns_of
from welltuned.adapters.place import folder_size, require_unused, written_whole
from welltuned.errors import InputError
from welltuned.finished.card import card, write_card
from welltuned.finished.find import Finished
from welltuned.finished.proof import require_as_planned
from welltuned.models.adapter_file import UNDERSTOOD
from welltuned.models.generate import stop_ids
from welltuned.models.load import load_config, load_model, load_skeleton, load_tokenizer
from welltuned.models.lora_settings import Init
from welltuned.models.resolve import SourceKind, resolve
from welltuned.models.vllm import rank_of_server


class Target(StrEnum):
    PEFT = "peft"
    MERGED = "merged"
    GGUF = "gguf"
    LORA_GGUF = "lora-gguf"
    OLLAMA = "ollama"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`base`: merge into this model rather than the one that was trained on. `quantization`: of GGUF's matrices."""

    dtype: torch.dtype = torch.bfloat16
    quantization: Quantization = Quantization.F16
    base: str | None = None


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written; `commands` run it."""

    path: Path
    files: tuple[str, ...]
    commands: tuple[str, ...]
    notes: tuple[str, ...]
    agreement: Agreement | None = None


def merge_run(finished: Finished, out: Path, options: Options, *, made: str = "adapter merge") -> Merged:
    """Merge a run's adapter into its base, or into the one that the user gives, and write the card.

    Raises:
        InputError: as `merge`, and where the adapter is not as it was planned.
    """
    if finished.adapter is None:
        what = "there is no adapter to merge: this is a whole model"
        raise InputError(what, where=str(finished.path), mend="use it as it is, or `adapter export`")
    require_as_planned(finished)
    if options.base is not None and finished.started == Init.LOFTQ:
        what = "the adapter began at what 4 bits lose of the weights, which this base has"
        raise InputError(what, where="--base", mend="leave --base out: it is merged into the 4-bit base, dequantised")
    job = Job(
        base=options.base or finished.model,
        adapter=finished.adapter,
        dtype=options.dtype,
        nf4=finished.nf4 and options.base is None,
        trained_dtype=finished.dtype or torch.float32,
        chat_template=finished.chat_template,
        base_weights=finished.facts.get("base_weights") or {},
        origin=finished.origin(made),
    )
    return merge(job, out)


def export_run(finished: Finished, to: Target, out: Path, options: Options | None = None) -> Exported:
    """Write the run in another tool's form, whole or not at all.

    Raises:
        InputError: a form that this run has no place in, with what to use instead.
        RunError: a merge that is not what base and adapter are.
    """
    options = options or Options()
    require_unused(out)
    if finished.adapter is None and to in (Target.PEFT, Target.LORA_GGUF):
        mend = "use --to merged, gguf or ollama"
        raise InputError("a whole model has no adapter to export", where=str(finished.path), mend=mend)
    write: dict[Target, Callable[[Finished, Path, Options], Exported]] = {
        Target.PEFT: _peft,
        Target.MERGED: _merged,
        Target.GGUF: _gguf,
        Target.LORA_GGUF: _lora_gguf,
        Target.OLLAMA: _ollama,
    }
    return write[to](finished, out, options)


def _title(finished: Finished) -> str:
    return finished.path.absolute().name


def _peft(finished: Finished, out: Path, options: Options) -> Exported:
    assert finished.adapter is not None
    require_as_planned(finished)
    adapter = read_adapter(finished.adapter, accept=UNDERSTOOD)
    base = str(adapter.config.get("base_model_name_or_path") or finished.model)
    rank = int(adapter.config["r"])
    name = _title(finished)
    commands = (
        f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{out}")',
        f"vllm serve {base} --enable-lora --max-lora-rank {rank_of_server(rank)} --lora-modules {name}={out}",
    )
    notes = []
    if resolve(finished.model).kind is SourceKind.GGUF:
        notes.append("the base is a GGUF file, which PEFT and vLLM do not load by that name: give them its hub model")
    if finished.nf4:
        notes.append("the adapter was trained on the base in 4 bits (NF4, double quantisation): load it so there too")
    if adapter.others:
        notes.append(f"the adapter trained {adapter.others[0]} too, which PEFT loads and vLLM does not: merge it there")
    with written_whole(out, folder_size(finished.adapter)) as folder:
        save(adapter, folder, finished.origin("adapter export --to peft"))
        tokenizer = load_tokenizer(finished.model)
        if finished.chat_template is not None:
            tokenizer.chat_template = finished.chat_template
        tokenizer.save_pretrained(folder)
        write_card(folder, card(finished, title=name, use=_code(commands)))
    return Exported(out, _listed(out), commands, tuple(notes))


def _merged(finished: Finished, out: Path, options: Options) -> Exported:
    commands = (f'AutoModelForCausalLM.from_pretrained("{out}")', f"vllm serve {out}")
    with written_whole(out) as folder:
        reference, agreement = _whole_model(finished, folder / "model", options)
        del reference
        for path in (folder / "model").iterdir():
            path.replace(folder / path.name)
        (folder / "model").rmdir()
        write_card(folder, card(finished, title=_title(finished), use=_code(commands), agreement=agreement))
    return Exported(out, _listed(out), commands, (), agreement)


def _whole_model(finished: Finished, folder: Path, options: Options) -> tuple[Reference, Agreement]:
    """The model without adapters, its tokenizer and template, in `folder`; compared with what it must be."""
    if finished.adapter is not None:
        merged = merge_run(finished, folder, options, made="adapter export")
        return merged.reference, merged.agreement
    if finished.base is None:
        mend = "give a run: only that knows the base to compare with"
        raise InputError("what this model was before is not known", where=str(finished.path), mend=mend)
    tokenizer = load_tokenizer(finished.model)
    if finished.chat_template is not None:
        tokenizer.chat_template = finished.chat_template
    prompts = prompts_of(tokenizer, finished.chat_template)
    base_NV = logits_of(load_model(finished.base, dtype=torch.float32), prompts)
    model = load_model(finished.model, dtype=torch.float32)
    reference = Reference(prompts, base_NV, logits_of(model, prompts))
    model.to(options.dtype)
    model.config.dtype = options.dtype
    model.save_pretrained(folder, max_shard_size="2GB")
    del model
    tokenizer.save_pretrained(folder)
    agreement = compare(reference, load_model(str(folder), dtype=torch.float32))
    require_agreement(agreement, options.dtype)
    return reference, agreement


def _gguf(finished: Finished, out: Path, options: Options) -> Exported:
    with written_whole(out) as folder:
        written, agreement = _gguf_file(finished, folder, options)
        path = out / written.path.name
        commands = (f"llama-cli -m {path}", f'llama_cpp.Llama("{path}").create_chat_completion(...)')
        write_card(folder, card(finished, title=_title(finished), use=_code(commands), agreement=agreement))
    return Exported(out, _listed(out), commands, _gguf_notes(written), agreement)


def _gguf_file(finished: Finished, folder: Path, options: Options) -> tuple[Written, Agreement]:
    """Merge into a folder of its own, write the GGUF file into `folder`, and forget the merged weights.

    The file is read back with transformers' own reader and compared with base and adapter.
    """
    require_exportable(load_config(finished.model), load_tokenizer(finished.model))
    # In as many bits as the file can use: what is merged and rounded to 16 bits first would be rounded twice.
    exact = options.quantization in (Quantization.F32, Quantization.F16, Quantization.Q8_0)
    within = Options(dtype=torch.float32 if exact else torch.bfloat16, base=options.base)
    with TemporaryDirectory(dir=folder.parent, prefix=".merging.") as beside:
        merged = Path(beside) / "model"
        reference, _ = _whole_model(finished, merged, within)
        name = _title(finished)
        config = load_config(str(merged))
        written = write_model(
            merged,
            folder / f"{name}-{options.quantization}.gguf",
            config=config,
            tokenizer=load_tokenizer(str(merged)),
            template=finished.chat_template,
            kind=options.quantization,
            name=name,
        )
    agreement = compare(reference, read_back(written.path, config))
    require_agreement(agreement, torch.float32 if options.quantization is Quantization.F32 else torch.float16)
    return written, agreement


def _gguf_notes(written: Written) -> tuple[str, ...]:
    if not written.wider:
        return ()
    return (f"{len(written.wider)} matrices have rows that Q8_0 cannot divide into blocks of 32 and are in F16",)


def _lora_gguf(finished: Finished, out: Path, options: Options) -> Exported:
    assert finished.adapter is not None
    require_as_planned(finished)
    adapter = read_adapter(finished.adapter, accept=("alpha_pattern",))
    skeleton = load_skeleton(finished.model)
    name = _title(finished)
    path = out / f"{name}-lora.gguf"
    commands = (f"llama-cli -m BASE.gguf --lora {path}", f'llama_cpp.Llama("BASE.gguf", lora_path="{path}")')
    with written_whole(out, folder_size(finished.adapter)) as folder:
        write_lora(adapter, folder / path.name, config=skeleton.config, name=name)
        write_card(folder, card(finished, title=name, use=_code(commands)))
    return Exported(out, _listed(out), commands, ("BASE.gguf is the base model as GGUF",))


def _ollama(finished: Finished, out: Path, options: Options) -> Exported:
    if finished.chat_template is None:
        what = "the run was trained on plain text, and Ollama's models take chats"
        raise InputError(what, where=str(finished.path), mend="export --to gguf")
    tokenizer = load_tokenizer(finished.model)
    turns = turns_of(tokenizer, finished.chat_template)
    name = _title(finished).lower()
    commands = (f"ollama create {name} -f {out}/Modelfile", f"ollama run {name}")
    with written_whole(out) as folder:
        written, agreement = _gguf_file(finished, folder, options)
        stops = [str(tokenizer.decode([i])) for i in stop_ids(load_skeleton(finished.model), tokenizer)]
        text = modelfile(written.path.name, turns, stops)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        write_card(folder, card(finished, title=_title(finished), use=_code(commands), agreement=agreement))
    return Exported(out, _listed(out), commands, _gguf_notes(written), agreement)


def _code(commands: tuple[str, ...]) -> str:
    return "```\n" + "\n".join(commands) + "\n```"


def _listed(out: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in out.iterdir()))
