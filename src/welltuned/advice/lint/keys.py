"""Checks of the keys and values themselves: unknown, removed, twice, of the wrong kind."""

from collections.abc import Callable, Iterator
from difflib import get_close_matches

from welltuned.advice.lint.check import Hit, Severity, check
from welltuned.advice.lint.config import BadKey, Config, Form, KeyTrouble, Tool
from welltuned.advice.settle import shown


def _bad(config: Config, trouble: KeyTrouble) -> Iterator[BadKey]:
    return (bad for bad in config.bad_keys if bad.trouble is trouble)


@check(
    "WT090",
    "removed-key",
    Severity.ERROR,
    looks_for="Keys that today's transformers 5, TRL 1.16, Axolotl 0.19 or LLaMA-Factory "
    "0.9.5 no longer take: `warmup_ratio`, "
    "`max_seq_length`, `evaluation_strategy`, `max_prompt_length`, `torch_dtype`, `tokenizer=`, ...",
    why="The run ends before it begins: with an unexpected keyword, or with unknown arguments.",
    mend="write the new name",
    evidence=("L001", "L004", "L005"),
)
def removed_key(config: Config) -> Iterator[Hit]:
    for bad in _bad(config, KeyTrouble.REMOVED):
        why = f" ({bad.why})" if bad.why else ""
        yield Hit(
            name=bad.key,
            sentence=f"{bad.owner} no longer takes {bad.key}{why}",
            mend=bad.mend,
            key=bad.key,
            line=bad.line,
        )
    fact = config.facts.get("removed_type")
    if fact is not None:
        mend = "write `type: chat_template`"
        yield Hit(
            name="type",
            sentence=f"Axolotl no longer takes the dataset type {fact.value}",
            mend=mend,
            key="type",
            line=fact.line,
        )


@check(
    "WT091",
    "deprecated-key",
    Severity.NOTE,
    looks_for="Keys that are still taken and will not be for long: `gradient_checkpointing`, "
    "`use_liger_kernel`, `pad_token`, ...",
    why="They warn today and are refused in a later release.",
    mend="write the new name",
    evidence=("L001", "L004", "L005"),
)
def deprecated_key(config: Config) -> Iterator[Hit]:
    for bad in _bad(config, KeyTrouble.DEPRECATED):
        why = f": {bad.why}" if bad.why else ""
        yield Hit(name=bad.key, sentence=f"{bad.key} is deprecated{why}", mend=bad.mend, key=bad.key, line=bad.line)


@check(
    "WT092",
    "unknown-key",
    Severity.ERROR,
    looks_for="Keys that the tool does not know and refuses; the nearest known name is suggested.",
    why="TRL's parser, LLaMA-Factory, the configuration classes and welltuned end with an error.",
    mend="correct the name",
    evidence=("L001", "L004"),
)
def unknown_key(config: Config) -> Iterator[Hit]:
    if config.tool is not Tool.AXOLOTL:
        for bad in _bad(config, KeyTrouble.UNKNOWN):
            yield Hit(
                name=bad.key, sentence=f"{bad.owner} knows no {bad.key}", mend=bad.mend, key=bad.key, line=bad.line
            )


@check(
    "WT093",
    "unknown-key-ignored",
    Severity.WARNING,
    looks_for="Keys that Axolotl does not know and passes over. A note where no known name is near.",
    why="Its schema ignores extra keys: a misspelt `lora_dropuot` has no effect, and nothing says so.",
    mend="correct the name",
    evidence=("L005",),
)
def unknown_key_ignored(config: Config) -> Iterator[Hit]:
    if config.tool is Tool.AXOLOTL:
        for bad in _bad(config, KeyTrouble.UNKNOWN):
            near = bad.mend.startswith("did you mean")
            severity = None if near else Severity.NOTE
            sentence = f"Axolotl knows no {bad.key} and ignores it"
            yield Hit(name=bad.key, sentence=sentence, mend=bad.mend, key=bad.key, line=bad.line, severity=severity)


@check(
    "WT094",
    "key-twice",
    Severity.WARNING,
    looks_for="A key that stands twice in a YAML file.",
    why="The last one wins, and nothing says so. welltuned refuses it.",
    mend="remove one",
    evidence=("L011",),
)
def key_twice(config: Config) -> Iterator[Hit]:
    for bad in _bad(config, KeyTrouble.TWICE):
        severity = Severity.ERROR if config.tool is Tool.WELLTUNED else None
        sentence = f"{bad.key} is set in line {bad.why} and again here; this one wins"
        yield Hit(name=bad.key, sentence=sentence, mend=bad.mend, key=bad.key, line=bad.line, severity=severity)


@check(
    "WT095",
    "recipe-refused",
    Severity.ERROR,
    looks_for="A recipe of welltuned's own that `plan` and `train` would refuse.",
    why="What would be ignored is an error there.",
    mend="see the sentence",
    evidence=("L011",),
)
def recipe_refused(config: Config) -> Iterator[Hit]:
    for bad in _bad(config, KeyTrouble.IGNORED):
        yield Hit(name=bad.key, sentence=bad.why, mend=bad.mend or None, key=bad.key, line=bad.line)


_Test = Callable[[float], bool]
_NUMBERS: dict[str, tuple[_Test, str]] = {
    "learning_rate": (lambda n: 0 < n < 1, "a number above 0 and below 1"),
    "num_train_epochs": (lambda n: n > 0, "a number above 0"),
    "per_device_train_batch_size": (lambda n: n >= 1 and n == int(n), "a whole number from 1"),
    "gradient_accumulation_steps": (lambda n: n >= 1 and n == int(n), "a whole number from 1"),
    "r": (lambda n: n >= 1 and n == int(n), "a whole number from 1"),
    "lora_alpha": (lambda n: n > 0, "a number above 0"),
    "lora_dropout": (lambda n: 0 <= n < 1, "a number from 0 and below 1"),
    "warmup_ratio": (lambda n: 0 <= n <= 1, "a share from 0 to 1"),
    "warmup_steps": (lambda n: n >= 0, "a number from 0"),
    "weight_decay": (lambda n: n >= 0, "a number from 0"),
    "max_grad_norm": (lambda n: n >= 0, "a number from 0"),
    "adam_beta1": (lambda n: 0 <= n < 1, "a number from 0 and below 1"),
    "adam_beta2": (lambda n: 0 <= n < 1, "a number from 0 and below 1"),
    "num_generations": (lambda n: n >= 1 and n == int(n), "a whole number from 1"),
    "temperature": (lambda n: n >= 0, "a number from 0"),
    "beta": (lambda n: n >= 0, "a number from 0"),
    "max_length": (lambda n: n >= 1 and n == int(n), "a whole number from 1"),
}
_WORDS = ("auto", "none", "no")


@check(
    "WT096",
    "value-impossible",
    Severity.ERROR,
    looks_for="A value that its setting cannot have: a rate of 0, text for a number, a dropout of 1, a batch of 0.",
    why="The tool fails on it late, or takes it and trains nothing.",
    mend="see the sentence for what it can be",
    evidence=("L011",),
)
def value_impossible(config: Config) -> Iterator[Hit]:
    for name, (sound, words) in _NUMBERS.items():
        if name not in config.settings or config.value(name) in _WORDS:
            continue
        number = config.number(name)
        if number is None or number != number or not sound(number):
            yield Hit(
                name=name, sentence=f"{config.key(name)} is {shown(config.value(name)) or 'empty'}, and must be {words}"
            )


_OPTIMIZERS_WORDS = (
    "adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adafactor adamw_anyprecision "
    "adamw_torch_4bit adamw_torch_8bit ademamix sgd adagrad adamw_bnb_8bit adamw_8bit "
    "ademamix_8bit lion_8bit lion_32bit "
    "paged_adamw_32bit paged_adamw_8bit paged_ademamix_32bit paged_ademamix_8bit "
    "paged_lion_32bit paged_lion_8bit rmsprop "
    "rmsprop_bnb rmsprop_bnb_8bit rmsprop_bnb_32bit galore_adamw galore_adamw_8bit galore_adafactor "
    "galore_adamw_layerwise galore_adamw_8bit_layerwise galore_adafactor_layerwise lomo adalomo grokadamw "
    "schedule_free_radam schedule_free_adamw schedule_free_sgd apollo_adamw apollo_adamw_layerwise stable_adamw"
)
_OPTIMIZERS = frozenset(_OPTIMIZERS_WORDS.split())
_SCHEDULES_WORDS = (
    "linear cosine cosine_with_restarts polynomial constant constant_with_warmup inverse_sqrt reduce_lr_on_plateau "
    "cosine_with_min_lr cosine_warmup_with_min_lr warmup_stable_decay greedy"
)
_SCHEDULES = frozenset(_SCHEDULES_WORDS.split())
_NAMES: dict[str, frozenset[str]] = {
    "optim": _OPTIMIZERS,
    "lr_scheduler_type": _SCHEDULES,
    "eval_strategy": frozenset({"no", "steps", "epoch"}),
    "save_strategy": frozenset({"no", "steps", "epoch", "best"}),
}


@check(
    "WT097",
    "name-unknown",
    Severity.ERROR,
    looks_for="An optimiser, schedule or strategy that transformers does not have (Axolotl's "
    "own additions are passed over).",
    why="The Trainer ends with an error.",
    mend="correct the name",
    evidence=("L001",),
)
def name_unknown(config: Config) -> Iterator[Hit]:
    if config.tool in (Tool.AXOLOTL, Tool.WELLTUNED):
        return
    for name, known in _NAMES.items():
        value = config.text(name).lower() if name in config.settings else ""
        if value and value not in known and not (config.tool is Tool.UNSLOTH and name == "optim"):
            near = get_close_matches(value, sorted(known), n=1, cutoff=0.6)
            mend = f"did you mean `{near[0]}`?" if near else f"one of {', '.join(sorted(known)[:6])}, ..."
            yield Hit(name=name, sentence=f"{config.key(name)} {value} is not known to transformers", mend=mend)


@check(
    "WT098",
    "number-is-text",
    Severity.NOTE,
    looks_for="`2e-4` in a YAML for transformers: an exponent without a dot is text to YAML 1.1.",
    why="TRL's parser turns it into a number, LLaMA-Factory and Axolotl as well; "
    "HfArgumentParser.parse_yaml_file does not, "
    "and the run fails when the optimiser compares text with a number.",
    mend="write `2.0e-4`",
    evidence=("L012",),
)
def number_is_text(config: Config) -> Iterator[Hit]:
    fact = config.facts.get("text_number")
    if fact is not None and config.form is Form.YAML:
        sentence = f"{fact.key}: {fact.value} is text to YAML 1.1, and a number only to parsers that convert it"
        yield Hit(name=fact.key, sentence=sentence, key=fact.key, line=fact.line)
