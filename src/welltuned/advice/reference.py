"""docs/hyperparameters.md: what every key is, what it is set to by default and why, and how far sources disagree.

The defaults are plans: the advice itself, asked about the runs of `examples`. All other words are those of the recipe's
keys and of `welltuned why`.

python -m welltuned.advice.reference docs/hyperparameters.md
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from welltuned.advice.page import escaped, scope
from welltuned.advice.plan import Plan, PlanLine, make_plan, plan_lines
from welltuned.advice.why import Entry, converted, entries
from welltuned.facts.data import DatasetFacts, dataset_facts, pair_facts, prompt_facts
from welltuned.facts.machine import Device, MachineFacts
from welltuned.facts.model import read_model_facts
from welltuned.recipe import FIELDS, HYPERPARAMETERS, Method, Tune, load_recipe
from welltuned.recipe.keys import POLICIES, Key

GROUPS: Mapping[str, tuple[str, ...]] = {
    "The rate and its schedule": (
        *("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps"),
    ),
    "The adapter": (
        *("r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "init_lora_weights", "bias", "use_dora"),
        *("rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save", "embedding_learning_rate"),
        "loraplus_lr_ratio",
    ),
    "Batches and lengths": (
        *("effective_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "token_budget"),
        *("max_length", "packing", "assistant_only_loss"),
    ),
    "The optimizer": (*("optim", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "ema_decay", "seed"),),
    "Memory and numbers": (
        *("dtype", "gradient_checkpointing", "checkpointed_layers", "offload_checkpoints", "dense_base", "fsdp"),
        "torch_compile",
    ),
    "Looking and saving": (
        *("eval_steps", "save_steps", "save_total_limit", "load_best_model_at_end", "early_stopping_patience"),
    ),
    "Preferences": (
        *("loss_type", "beta", "label_smoothing", "simpo_gamma", "desirable_weight", "undesirable_weight"),
        "center_rewards_coefficient",
    ),
    "Learning from rewards": (
        *("num_generations", "max_completion_length", "temperature", "top_p", "epsilon", "epsilon_high"),
        *("scale_rewards", "mask_truncated_completions", "num_iterations", "vllm_importance_sampling_clip_max"),
    ),
}
SMALL: dict[str, Any] = dict(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, tie_word_embeddings=True,
)  # fmt: skip
LARGE: dict[str, Any] = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A run that the page asks the advice about. `memory` is in GB."""

    name: str
    about: str
    shape: Mapping[str, Any]
    data: DatasetFacts
    device: Device = Device.CUDA
    memory: float = 80
    method: Method = Method.SFT
    tune: Tune = Tune.LORA


def examples() -> tuple[Example, ...]:
    """Runs that show the span: small and large, supervised, in full, on pairs, on judged answers, on rewards."""
    chats, answers = _chats(10_000), "1,000 prompts and their answers"
    pairs = _pairs(5_000)
    return (
        Example(name="135M", about="LoRA of a 135M model on 340 short chats, on a CPU with 16 GB", shape=SMALL,
                data=_chats(340), device=Device.CPU, memory=16),
        Example(name="8B", about="LoRA of an 8B model on 10,000 chats, on a GPU with 80 GB", shape=LARGE, data=chats),
        Example(name="8B, 4 bits", about="QLoRA of the same on a GPU with 24 GB", shape=LARGE, data=chats, memory=24,
                tune=Tune.QLORA),
        Example(name="135M in full", about="full fine-tuning of a 135M model on 10,000 chats, on that GPU", shape=SMALL,
                data=chats, memory=24, tune=Tune.FULL),
        Example(name="8B, DPO", about="LoRA of an 8B model on 5,000 pairs, on a GPU with 80 GB", shape=LARGE,
                data=pairs, method=Method.DPO),
        Example(name="8B, ORPO", about="the same", shape=LARGE, data=pairs, method=Method.ORPO),
        Example(name="8B, KTO", about="the same on 10,000 answers, half of them good", shape=LARGE,
                data=_judged(10_000), method=Method.KTO),
        Example(name="8B, reward", about="a reward model of those pairs", shape=LARGE, data=pairs,
                method=Method.REWARD),
        Example(name="135M, GRPO", about=f"LoRA of a 135M model on {answers}, on a GPU with 24 GB", shape=SMALL,
                data=_prompts(1_000), memory=24, method=Method.GRPO),
    )  # fmt: skip


def _chats(rows: int) -> DatasetFacts:
    lengths = np.linspace(80, 600 if rows > 1000 else 220, rows).astype(int)
    heldout = lengths[:: max(1, rows // 100)]
    return dataset_facts(lengths, lengths // 3, heldout, heldout // 3, "messages")


def _judged(rows: int) -> DatasetFacts:
    lengths = np.linspace(80, 600, rows).astype(int)
    heldout, good = lengths[::100], [number % 2 == 0 for number in range(rows)]
    return dataset_facts(lengths, lengths // 3, heldout, heldout // 3, "label", desirable=good)


def _pairs(rows: int) -> DatasetFacts:
    prompt, chosen, rejected = (np.full(rows, length) for length in (100, 200, 180))
    return pair_facts(prompt, chosen, rejected, prompt[:100], chosen[:100], rejected[:100], "preference")


def _prompts(rows: int) -> DatasetFacts:
    return prompt_facts(np.full(rows, 100), np.full(100, 100), "prompt", np.full(rows, 60))


def planned(example: Example) -> Plan:
    """The advice's plan of it, of a model that is only a configuration."""
    memory = int(example.memory * 1e9)
    gpu = example.device is Device.CUDA
    machine = MachineFacts(
        device=example.device, cores=8, memory_total=memory, memory_available=memory, native_bf16=gpu, amx_bf16=False,
        gpu_name="a GPU" if gpu else None, gpu_memory_total=memory if gpu else None,
        gpu_memory_available=memory if gpu else None,
    )  # fmt: skip
    options = {"model": "a/model", "data": "rows", "method": str(example.method), "tune": str(example.tune)}
    if example.method is Method.GRPO:
        options["rewards"] = "exact_match"
    with TemporaryDirectory() as folder:
        config = {"model_type": "llama", "max_position_embeddings": 8192, **example.shape}
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        model = read_model_facts(folder, weights_needed=False)
    return make_plan(load_recipe(None, options), model, example.data, machine)


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def page() -> str:
    """The whole page, as Markdown."""
    runs = examples()
    lines = {run.name: {line.name: line for line in plan_lines(planned(run))} for run in runs}
    return "\n".join([*_head(runs), *_groups(lines), *_others()]) + "\n"


def _head(runs: tuple[Example, ...]) -> Iterator[str]:
    yield "# Hyperparameters"
    yield ""
    yield "What each one is, what the plan sets it to and why, its sound range, and how far sources disagree. Made by"
    yield "`make docs` from the advice itself: change that, not this page. [The evidence](evidence.md) has every row;"
    yield "`welltuned why KEY` says it in a terminal, and with `--model` and `--data` it speaks of your run."
    yield ""
    yield "Defaults are not constants: they follow from model, data and machine. These runs stand for the rest:"
    yield ""
    yield from (f"- **{run.name}**: {run.about}" for run in runs)


def _groups(lines: Mapping[str, Mapping[str, PlanLine]]) -> Iterator[str]:
    for title, keys in GROUPS.items():
        yield ""
        yield f"## {title}"
        for key in keys:
            yield ""
            yield f"### {key}"
            yield ""
            yield HYPERPARAMETERS[key].doc
            yield from _defaults({run: found[key] for run, found in lines.items() if key in found})
            yield from _said(entries().get(key, ()))


def _defaults(lines: Mapping[str, PlanLine]) -> Iterator[str]:
    """A table of what the plans say, runs of equal lines as one."""
    together: dict[tuple[str, str, str], list[str]] = {}
    for run, line in lines.items():
        together.setdefault((line.value, line.span, line.reason.split(";")[0]), []).append(run)
    yield ""
    if not lines:
        yield "Unset, unless you set it."
        return
    yield "| in the run | default | range | why |"
    yield "|---|---|---|---|"
    for (value, span, reason), runs in together.items():
        where = "all that read it" if len(runs) == len(lines) and len(runs) > 1 else " · ".join(runs)
        yield f"| {where} | {escaped(value)} | {span} | {escaped(reason)} |"


def _said(found: tuple[Entry, ...]) -> Iterator[str]:
    for entry in found:
        yield ""
        about = f" ({scope(entry)})" if scope(entry) else ""
        yield f"**Rule{about}.** {escaped(entry.rule).rstrip('.')}."
        if entry.against:
            yield ""
            yield f"**Disagreement.** {_disagreement(entry)} [Each of them](evidence.md#{entry.key})."
        yield ""
        yield f"**To settle it.** {escaped(entry.settle).rstrip('.')}."


def _disagreement(entry: Entry) -> str:
    """How many rows say otherwise, why, and what is left of it once they are compared in their own setting."""
    reasons = Counter(reason for against in entry.against for reason in against.because)
    why = ", ".join(f"{reason} {times}" if times > 1 else str(reason) for reason, times in reasons.most_common())
    rows = f"{len(entry.evidence)} {'row speaks' if len(entry.evidence) == 1 else 'rows speak'} for it"
    text = f"{rows}, {len(entry.against)} against ({why})."
    compared = [one for against in entry.against if (one := converted(entry, against)) is not None]
    if not compared:
        return text
    agree = sum(one.agrees for one in compared)
    verb = "agrees" if agree == 1 else "agree"
    return f"{text} Of the {len(compared)} that name a setting, {agree} {verb} once the rule is asked about it."


def _others() -> Iterator[str]:
    yield ""
    yield "## Every other key of a recipe"
    yield ""
    yield "No advice is needed for these. [recipes/sft_lora.yaml](../recipes/sft_lora.yaml) has every key in its place."
    for title, keys in (("Model, data and method", FIELDS), ("What is done with a row that has a defect", POLICIES)):
        yield ""
        yield f"### {title}"
        yield ""
        yield "| key | what |"
        yield "|---|---|"
        yield from (_row(name, key) for name, key in keys.items())


def _row(name: str, key: Key) -> str:
    several = " Several may be given." if key.many and "several" not in key.doc.lower() else ""
    return f"| `{name}` | {escaped(key.doc)}{several} |"


def main(path: str) -> None:
    Path(path).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
