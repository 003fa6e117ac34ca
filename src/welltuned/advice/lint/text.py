"""Checks of what is trained on: masks, end tokens, templates, packing."""

from collections.abc import Iterator

from welltuned.advice.lint.check import Hit, Severity, check
from welltuned.advice.lint.config import Config, Form, Tool
from welltuned.recipe import Method

_CHAT_COLUMNS = frozenset({"messages", "conversations"})
_TEMPLATES = {  # LLaMA-Factory's template names, by the words of the models that they are for
    "qwen": ("qwen",),
    "llama2": ("llama-2", "llama2"),
    "llama3": ("llama-3", "llama3"),
    "llama4": ("llama-4", "llama4"),
    "gemma": ("gemma",),
    "mistral": ("mistral", "mixtral"),
    "phi": ("phi",),
    "deepseek": ("deepseek",),
    "glm": ("glm",),
}


@check(
    "WT050",
    "prompts-trained",
    Severity.WARNING,
    looks_for="Masking switched off for instruction data: `train_on_inputs`, `train_on_prompt`, `completion_only_loss: "
    "false`, `loss_on: everything`.",
    why="The users' words are given in use and need no learning; they take loss and capacity from the answers.",
    mend="train on the answers only",
    evidence=("P014",),
)
def prompts_trained(config: Config) -> Iterator[Hit]:
    if config.method is not Method.SFT or config.stage == "pt":
        return
    for name in ("train_on_prompt", "completion_only_loss"):
        switched = config.on(name) if name == "train_on_prompt" else config.value(name) is False
        if name in config.settings and switched:
            yield Hit(name=name, sentence=f"{config.key(name)} trains on the prompts as well as on the answers")


@check(
    "WT051",
    "chat-data-without-mask",
    Severity.NOTE,
    looks_for="TRL with local chat data and no `assistant_only_loss`; Unsloth with chat "
    "data and no `train_on_responses_only`.",
    why="For `messages` the default is to train on every token, the user's too.",
    mend="set `assistant_only_loss: true` (Unsloth: call train_on_responses_only)",
    evidence=("P014", "L001"),
)
def chat_data_without_mask(config: Config) -> Iterator[Hit]:
    if config.method is not Method.SFT or config.tool not in (Tool.TRL, Tool.UNSLOTH):
        return
    masked = config.on("assistant_only_loss") or "assistant_only_loss" in config.unread
    if config.look.columns & _CHAT_COLUMNS and not masked and "train_on_responses_only" not in config.facts:
        column = sorted(config.look.columns & _CHAT_COLUMNS)[0]
        yield Hit(name="assistant_only_loss", sentence=f"the data's {column} are trained whole, the user's turns too")


@check(
    "WT052",
    "answer-end-untrained",
    Severity.WARNING,
    looks_for="`train_on_eos: none` in Axolotl.",
    why="The end token is then outside the mask, and the model does not learn to stop. The loss looks healthy.",
    mend="write `train_on_eos: turn`",
    evidence=("L013", "L005"),
)
def answer_end_untrained(config: Config) -> Iterator[Hit]:
    fact = config.facts.get("end_untrained")
    if fact is not None:
        yield Hit(
            name="data",
            sentence=f"{fact.value}: the end of an answer is not trained",
            key="train_on_eos",
            line=fact.line,
        )


@check(
    "WT053",
    "pad-is-end-in-collator",
    Severity.ERROR,
    looks_for="pad = eos together with DataCollatorForLanguageModeling(mlm=False) in a script.",
    why="That collator takes every padding token out of the labels by its id: with pad = eos the end of each answer is "
    "never trained, and the model does not stop.",
    mend="use a padding token of its own, or TRL's SFTTrainer without a collator, which masks by position",
    evidence=("L013",),
)
def pad_is_end_in_collator(config: Config) -> Iterator[Hit]:
    pad, collator = config.facts.get("pad_is_eos"), config.facts.get("lm_collator")
    if pad is not None and collator is not None:
        yield Hit(
            name="pad_token",
            sentence=f"{pad.key} = eos, and the collator of line {collator.line} masks it wherever it stands",
            key=pad.key,
            line=pad.line,
        )


@check(
    "WT054",
    "pad-is-end",
    Severity.NOTE,
    looks_for="The padding token is the end token.",
    why="Harmless where labels are masked by position, as TRL, Axolotl and Unsloth do "
    "today; fatal in a collator that masks by id.",
    mend="use a padding token of its own where the tokenizer has one",
    evidence=("L013",),
)
def pad_is_end(config: Config) -> Iterator[Hit]:
    fact = config.facts.get("pad_is_eos")
    if fact is not None and "lm_collator" not in config.facts:
        yield Hit(name="pad_token", sentence=f"{fact.key} is set to the end token", key=fact.key, line=fact.line)
    pad, end = config.text("pad_token"), config.text("eos_token")
    if pad and pad == end:
        yield Hit(name="pad_token", sentence=f"{config.key('pad_token')} and the end token are both {pad}")


@check(
    "WT055",
    "template-missing",
    Severity.NOTE,
    looks_for="LLaMA-Factory without `template`.",
    why="It then reads the tokenizer's template by comparing strings, or falls back to "
    "an empty one with a line in the log: "
    "answers that never end are its users' commonest complaint.",
    mend="name the model's template: `template: qwen3`, `llama3`, ...",
    evidence=("L008",),
)
def template_missing(config: Config) -> Iterator[Hit]:
    if config.tool is Tool.LLAMAFACTORY and not config.given("template") and config.stage != "pt":
        yield Hit(name="template", sentence="template is not set: the prompts' form is guessed")


@check(
    "WT056",
    "template-of-another-model",
    Severity.WARNING,
    looks_for="LLaMA-Factory with a template of another family than the model's name.",
    why="The model is trained on turns that it never saw and that its own template will not write in use.",
    mend="take the template of the model's family",
    evidence=("L008",),
)
def template_of_another_model(config: Config) -> Iterator[Hit]:
    template, model = config.text("template").lower(), config.text("model").lower()
    if config.tool is not Tool.LLAMAFACTORY or not template or "distill" in model:
        return
    of = next((words for name, words in _TEMPLATES.items() if template.startswith(name)), None)
    others = [word for words in _TEMPLATES.values() if words != of for word in words if word in model]
    if of and others and not any(word in model for word in of):
        yield Hit(
            name="template", sentence=f"template {template} for {config.text('model')}, whose name says {others[0]}"
        )


@check(
    "WT057",
    "packing-crosses-rows",
    Severity.WARNING,
    looks_for="Packing that lets rows see each other: LLaMA-Factory's `packing` without "
    "`neat_packing`, TRL's `wrapped` "
    "strategy, Axolotl's `sample_packing` without an attention that knows the borders.",
    why="A token then attends to the row before it, which it will never have in use; a published comparison lost 10 to "
    "20 points to it.",
    mend="`neat_packing: true` (LLaMA-Factory), `packing_strategy: bfd` (TRL), "
    "`attn_implementation: flash_attention_2` (Axolotl)",
    evidence=("L009", "S003"),
)
def packing_crosses_rows(config: Config) -> Iterator[Hit]:
    if not config.on("packing") or config.stage == "pt" or config.method is None:
        return
    if config.tool is Tool.LLAMAFACTORY and config.off("neat_packing"):
        yield Hit(name="packing", sentence="packing without neat_packing: rows in one stream attend to each other")
    elif config.tool is Tool.TRL and config.value("packing_strategy") == "wrapped":
        yield Hit(
            name="packing_strategy",
            sentence="packing_strategy wrapped cuts rows at will and lets them attend to each other",
        )
    elif config.tool is Tool.AXOLOTL and not config.given("attn_implementation"):
        yield Hit(
            name="packing",
            sentence="sample_packing without attn_implementation: rows in one stream attend to each other",
        )


@check(
    "WT058",
    "padding-free-refused",
    Severity.ERROR,
    looks_for="TRL's `padding_free` with a max_length and without packing (SFT), where the trainer refuses it.",
    why="Without packing nothing would enforce max_length.",
    mend="set `packing: true`, or `max_length: null` with rows that fit",
    evidence=("L004",),
)
def padding_free_refused(config: Config) -> Iterator[Hit]:
    if config.tool is Tool.TRL and config.method is Method.SFT and config.on("padding_free") and config.off("packing"):
        length = config.whole("max_length")
        if length is not None:
            yield Hit(
                name="padding_free",
                sentence=f"padding_free without packing, with max_length {length:,}: TRL refuses to start",
            )


@check(
    "WT059",
    "gone-from-library",
    Severity.ERROR,
    looks_for="Imports that TRL no longer has: DataCollatorForCompletionOnlyLM, setup_chat_format, "
    "PPOTrainer, or ORPOTrainer "
    "outside of trl.experimental.",
    why="The script ends at the import.",
    mend="see the name's own line",
    evidence=("L004",),
)
def gone_from_library(config: Config) -> Iterator[Hit]:
    if config.form is not Form.SCRIPT:
        return
    for fact, setting in config.facts.items():
        if fact.startswith("gone:"):
            yield Hit(
                name=fact,
                sentence=f"TRL has no {setting.key} any more",
                mend=str(setting.value),
                key=setting.key,
                line=setting.line,
            )
