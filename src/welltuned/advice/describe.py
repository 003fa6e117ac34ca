"""The facts of a plan in a line each, for the screen and the report."""

from collections.abc import Iterator

from welltuned.advice.effort import SpeedFrom, TimeForecast
from welltuned.advice.settle import bytes_words, counted, shown, size_words, span_words
from welltuned.facts.data import DatasetFacts, Lengths
from welltuned.facts.machine import Device, MachineFacts
from welltuned.facts.model import ModelFacts


def model_line(model: ModelFacts) -> str:
    """SmolLM2 · llama · 135M parameters · 30 layers of 576 · …"""
    size = f"{size_words(model.parameters)} parameters"
    if model.active_parameters != model.parameters:
        size += f", {size_words(model.active_parameters)} of them active"
    if not model.parameters_exact:
        size += " (estimated)"
    stored = f"stored as {model.dtype}" + (f", quantised ({model.quantized})" if model.quantized else "")
    context = f"context {model.context_length:,}" if model.context_length else "context not said"
    head = "head tied to it" if model.tied_head else "head of its own"
    template = "a chat template" if model.has_chat_template else "no chat template"
    layers = f"{counted(model.layers, 'layer')} of {model.hidden_size:,}"
    words = f"vocabulary {model.vocabulary:,}, {head}"
    return " · ".join([model.id, model.family, size, layers, words, context, stored, template])


def brief_model(model: ModelFacts) -> str:
    """smollm2-135m-instruct · llama of 135M parameters · 30 layers of 576 · context 8,192 · chat template."""
    active = f", {size_words(model.active_parameters)} active" if model.active_parameters != model.parameters else ""
    about = "" if model.parameters_exact else "about "
    size = f"{model.family} of {about}{size_words(model.parameters)} parameters{active}"
    layers = f"{counted(model.layers, 'layer')} of {model.hidden_size:,}"
    context = [f"context {model.context_length:,}"] if model.context_length else []
    quantised = [f"stored as {model.quantized}"] if model.quantized else []
    template = "chat template" if model.has_chat_template else "no chat template"
    return " · ".join([model.id, size, layers, *context, *quantised, template])


def brief_data(data: DatasetFacts) -> str:
    """337 training rows, 84 more held out · 28,871 tokens, 35% of them trained · lengths 66 to 108, half up to 86."""
    noun = "pair" if data.sequences_per_row > 1 else "row"
    held = f"{data.heldout_rows:,} more held out" if data.heldout_rows else "none held out"
    trained = f", {data.supervised_share:.0%} of them trained" if data.supervised_tokens else " of prompts"
    lengths = f"lengths {data.length_min:,} to {data.length_max:,}, half up to {data.length_median:,}"
    answers = [f"answers {_lengths(data.answers)}"] if data.answers is not None else []
    rows = f"{counted(data.rows, f'training {noun}')}, {held}"
    return " · ".join([rows, f"{data.tokens:,} tokens{trained}", lengths, *answers, *_risks(data)])


def data_line(data: DatasetFacts) -> str:
    """337 training rows, 84 held out · 28,871 tokens, 35% of them trained · lengths …"""
    noun = "pair" if data.sequences_per_row > 1 else "row"
    rows = f"{counted(data.rows, f'training {noun}')}, {data.heldout_rows:,} held out"
    trained = f"{data.supervised_share:.0%} of them trained, the rest masked"
    tokens = f"{data.tokens:,} tokens, {trained if data.supervised_tokens else 'all of prompts: answers are sampled'}"
    lengths = (
        f"lengths {data.length_min:,} to {data.length_max:,}: half up to {data.length_median:,}, 95% up to "
        f"{data.length_p95:,}, 99% up to {data.length_p99:,}"
    )
    return " · ".join([rows, tokens, lengths, *_parts(data), *_risks(data)])


def _parts(data: DatasetFacts) -> Iterator[str]:
    for name, part in (
        ("prompts", data.prompts),
        ("chosen", data.chosen),
        ("rejected", data.rejected),
        ("answers", data.answers),
    ):
        if part is not None:
            yield f"{name} {_lengths(part)}"
    if data.desirable_share is not None:
        yield f"{data.desirable_share:.0%} of them marked good"


def _lengths(part: Lengths) -> str:
    return f"half up to {part.median:,}, at most {part.max:,}"


def _risks(data: DatasetFacts) -> Iterator[str]:
    """What a run learns twice, or has learned already; none is said too."""
    risks = [
        f"{number:,} {words}"
        for number, words in (
            (data.duplicates, "duplicated"),
            (data.heldout_overlap, "held-out ones among the training rows"),
            (data.unsupervised_rows, "without a trained token"),
            (data.very_short_rows, "with hardly an answer"),
            (data.very_long_rows, "several times as long as most"),
        )
        if number
    ]
    yield ", ".join(risks) if risks else "none duplicated, none held out and trained on"


def machine_line(machine: MachineFacts) -> str:
    """AMD EPYC, 2 cores · 15.8 GB free · float32 (no AMX) · 4-bit weights."""
    cores = counted(machine.cores, "core")
    name = machine.gpu_name or f"{machine.processor}, {cores}".removeprefix(", ")
    name = f"{machine.gpus} × {name}" if machine.gpus > 1 else name
    free = f"{bytes_words(machine.training_memory)} memory free"
    if machine.device is Device.CUDA:
        bf16 = "native bfloat16" if machine.native_bf16 else "no native bfloat16"
    elif machine.amx_bf16:
        bf16 = "bfloat16 with AMX"
    else:
        bf16 = "bfloat16 without AMX" if machine.native_bf16 else "no native bfloat16"
    four = "4-bit weights can be used" if machine.four_bit else "no 4-bit weights (bitsandbytes is not installed)"
    shared = [f"{machine.processes} processes share the run"] if machine.processes > 1 else []
    return " · ".join([name, *shared, free, bf16, four])


def time_line(time: TimeForecast) -> str:
    """About 9 min: 86,613 tokens at 159 a second (arithmetic alone, good to a factor of two)."""
    work = f"{counted(time.updates, 'update')}, {time.tokens:,} tokens"
    if time.seconds is None or time.tokens_per_second is None:
        return f"{work}; how long sampling takes is known once a run, or `plan --probe`, has measured it here"
    how = {
        SpeedFrom.ARITHMETIC: "by arithmetic, right to a factor of about two; `plan --probe` measures",
        SpeedFrom.MEASURED: "as measured on this machine",
    }[time.speed_from]
    return f"about {span_words(time.seconds)} for {work} at {shown(round(time.tokens_per_second))} a second ({how})"
