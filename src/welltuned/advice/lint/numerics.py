"""Checks of number formats, quantisation and the optimiser."""

from collections.abc import Iterator

from welltuned.advice.lint.check import Hit, Severity, check, limit
from welltuned.advice.lint.config import Config, Form, Tool
from welltuned.advice.lint.derived import parameters
from welltuned.advice.settle import shown, size_words
from welltuned.recipe import Tune

_TRUE = (True, "true", "True")


@check(
    "WT060",
    "fp16-instead-of-bf16",
    Severity.WARNING,
    looks_for="fp16 switched on.",
    why="fp16 ends at 65,504, which models trained in bf16 may exceed, and the filter for NaN then hides the loss. "
    "Every NVIDIA GPU since Ampere has bf16.",
    mend="`bf16: true`; keep fp16 only for GPUs before Ampere (T4, V100)",
    evidence=("S010", "L001"),
)
def fp16_instead_of_bf16(config: Config) -> Iterator[Hit]:
    if config.value("fp16") in _TRUE and config.value("bf16") not in (*_TRUE, "auto") and "bf16" not in config.unread:
        yield Hit(name="fp16", sentence="fp16 is on and bf16 is not")


@check(
    "WT061",
    "fp16-and-bf16",
    Severity.ERROR,
    looks_for="fp16 and bf16 both on.",
    why="The Trainer refuses both.",
    mend="keep bf16",
    evidence=("L001",),
)
def fp16_and_bf16(config: Config) -> Iterator[Hit]:
    if config.value("fp16") in _TRUE and config.value("bf16") in _TRUE:
        yield Hit(name="fp16", sentence="fp16 and bf16 are both on, and the Trainer takes one")


@check(
    "WT062",
    "full-on-quantised",
    Severity.ERROR,
    looks_for="A base in 4 or 8 bits, and no adapter.",
    why="Quantised weights have no gradient: the tools refuse to start, or train nothing.",
    mend="train an adapter on it, or load the model in bf16",
    evidence=("L004", "L005"),
)
def full_on_quantised(config: Config) -> Iterator[Hit]:
    if config.tune is not Tune.FULL or config.tool is Tool.UNSLOTH or "adapter_unused" in config.facts:
        return
    for name, bits in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        if config.on(name) and name in config.settings:
            yield Hit(
                name=name, sentence=f"{config.key(name)}: the base is in {bits} bits, and all of it is to be trained"
            )


@check(
    "WT063",
    "two-quantisations",
    Severity.ERROR,
    looks_for="load_in_4bit and load_in_8bit both on; Axolotl's `adapter: qlora` without load_in_4bit, or with 8 bits.",
    why="The loaders refuse the pair.",
    mend="keep one; QLoRA is 4 bits",
    evidence=("L004", "L005"),
)
def two_quantisations(config: Config) -> Iterator[Hit]:
    if config.on("load_in_4bit") and config.on("load_in_8bit"):
        yield Hit(name="load_in_8bit", sentence="load_in_4bit and load_in_8bit are both on")
    elif config.tool is Tool.AXOLOTL and config.value("adapter") == "qlora" and config.off("load_in_4bit"):
        yield Hit(name="adapter", sentence="adapter qlora without load_in_4bit: Axolotl refuses it")


@check(
    "WT064",
    "merge-into-quantised",
    Severity.WARNING,
    looks_for="An adapter merged into a 4-bit base: merge_and_unload on a model loaded in "
    "4 bits, `merge_lora` with qlora, "
    "save_method merged_4bit.",
    why="The sum is rounded to 4 bits: what the adapter learned is smaller than a step of the grid and is partly lost.",
    mend="load the base in bf16 and merge there; keep the adapter apart until then",
    evidence=("L014", "S006"),
)
def merge_into_quantised(config: Config) -> Iterator[Hit]:
    merge, save = config.facts.get("merge_and_unload"), config.facts.get("save_pretrained_merged")
    if merge is not None and config.tune is Tune.QLORA and config.tool is Tool.TRL:
        yield Hit(
            name="merge",
            sentence="merge_and_unload on a base that was loaded in 4 bits",
            key=merge.key,
            line=merge.line,
        )
    if save is not None and "merged_4bit" in str(save.value) and "forced" not in str(save.value):
        yield Hit(
            name="merge", sentence="merged_4bit rounds the merged weights to 4 bits", key=save.key, line=save.line
        )
    if config.on("merge_lora") and config.tune is Tune.QLORA:
        yield Hit(name="merge_lora", sentence="merge_lora on a base in 4 bits", severity=Severity.ERROR)


@check(
    "WT065",
    "quantisation-type",
    Severity.WARNING,
    looks_for="bnb_4bit_quant_type fp4, also by default of BitsAndBytesConfig in a script.",
    why="NF4's levels fit normally distributed weights; QLoRA found it better than FP4 throughout.",
    mend='`bnb_4bit_quant_type="nf4"`',
    evidence=("S006", "L010"),
)
def quantisation_type(config: Config) -> Iterator[Hit]:
    name = "bnb_4bit_quant_type"
    if not config.on("load_in_4bit") or name in config.unread:
        return
    if config.value(name) == "fp4":
        yield Hit(name=name, sentence="the base is quantised to fp4")
    elif "quantised_by" in config.facts and not config.given(name):
        yield Hit(
            name=name,
            sentence="bnb_4bit_quant_type is not set: BitsAndBytesConfig's default is fp4",
            line=config.facts["quantised_by"].line,
        )


@check(
    "WT066",
    "quantised-compute-in-float32",
    Severity.WARNING,
    looks_for="BitsAndBytesConfig in 4 bits without bnb_4bit_compute_dtype.",
    why="Its default is float32: every product is computed at a fraction of the speed and twice the memory of bf16.",
    mend="`bnb_4bit_compute_dtype=torch.bfloat16`",
    evidence=("L010",),
)
def quantised_compute_in_float32(config: Config) -> Iterator[Hit]:
    name = "bnb_4bit_compute_dtype"
    if config.on("load_in_4bit") and "quantised_by" in config.facts and not config.given(name):
        yield Hit(
            name=name,
            sentence="bnb_4bit_compute_dtype is not set: products are computed in float32",
            line=config.facts["quantised_by"].line,
        )


@check(
    "WT067",
    "base-in-float32",
    Severity.WARNING,
    looks_for="TRL's YAML with an adapter on a base of 3B or more and no `dtype`.",
    why="TRL loads a model that is named by a string in float32, also under an adapter: 4 bytes for each parameter.",
    mend="`dtype: bfloat16`",
    evidence=("L004", "S005"),
    parameters=3e9,
)
def base_in_float32(config: Config) -> Iterator[Hit]:
    size = parameters(config)
    if config.tool is not Tool.TRL or config.form is not Form.YAML or config.tune is not Tune.LORA:
        return
    if "dtype" in config.unread or config.on("load_in_8bit") or config.given("model_init_kwargs"):
        return
    if size is not None and size >= limit("WT067", "parameters") and config.value("dtype") in (None, "float32"):
        yield Hit(
            name="dtype",
            sentence=f"dtype is not set: TRL loads the {size_words(size)} in float32, {4 * size / 1e9:.0f} GB",
        )


@check(
    "WT068",
    "nan-filter-hides-loss",
    Severity.NOTE,
    looks_for="The filter for NaN and infinite losses in the log: set on purpose, or left on with fp16.",
    why="logging_nan_inf_filter (on by default) leaves steps with NaN or infinite loss "
    "out of the logged mean: a run that "
    "broke looks healthy.",
    mend="`logging_nan_inf_filter: false`",
    evidence=("L001",),
)
def nan_filter_hides_loss(config: Config) -> Iterator[Hit]:
    name = "logging_nan_inf_filter"
    asked = name in config.settings and config.on(name)
    if asked or (config.on(name) and config.value("fp16") in _TRUE):
        words = "is on" if asked else "is on by default, and fp16 overflows"
        yield Hit(name=name, sentence=f"logging_nan_inf_filter {words}: a NaN loss does not show in the log")


@check(
    "WT070",
    "decay-strong",
    Severity.WARNING,
    looks_for="weight_decay above 0.2 on an adapter.",
    why="Decay pulls A and B to zero, the model back to its start; recipes use 0 to 0.1.",
    mend="0 to 0.01",
    evidence=("E059", "P007", "D008"),
    most=0.2,
)
def decay_strong(config: Config) -> Iterator[Hit]:
    decay = config.number("weight_decay")
    if config.trains_adapter and decay is not None and decay > limit("WT070", "most"):
        yield Hit(name="weight_decay", sentence=f"weight_decay {shown(decay)} on an adapter; recipes use 0 to 0.1")


@check(
    "WT071",
    "no-clipping",
    Severity.WARNING,
    looks_for="Gradient clipping switched off, or above 10.",
    why="One broken row is enough to destroy Adam's averages; clipping at 1.0 costs nothing.",
    mend="`max_grad_norm: 1.0`",
    evidence=("P016", "E055"),
    most=10,
)
def no_clipping(config: Config) -> Iterator[Hit]:
    clip = config.number("max_grad_norm")
    if "max_grad_norm" in config.settings and clip is not None and (clip == 0 or clip > limit("WT071", "most")):
        yield Hit(
            name="max_grad_norm",
            sentence=f"max_grad_norm {shown(clip)}: gradients of any length are taken as they come",
        )


@check(
    "WT072",
    "beta2-extreme",
    Severity.NOTE,
    looks_for="adam_beta2 below 0.9, or 0.9999 and above.",
    why="Recipes use 0.95 to 0.999; the average of squares then lasts 20 to 1,000 updates.",
    mend="0.95 to 0.999",
    evidence=("E021", "E055", "P015"),
    least=0.9,
    most=0.9999,
)
def beta2_extreme(config: Config) -> Iterator[Hit]:
    beta = config.number("adam_beta2")
    if beta is not None and 0 <= beta < 1 and not limit("WT072", "least") <= beta < limit("WT072", "most"):
        yield Hit(name="adam_beta2", sentence=f"adam_beta2 {shown(beta)} is outside 0.95 to 0.999")
