"""Checks of a run's course: epochs, evaluation, batch, length."""

from collections.abc import Iterator

from welltuned.advice.lint.check import Hit, Severity, check, limit
from welltuned.advice.lint.config import Config, Form, Tool
from welltuned.advice.lint.derived import batch, evaluates, has_held_out, updates
from welltuned.advice.rules import number
from welltuned.advice.settle import counted, shown
from welltuned.recipe import Method

_PREFERENCE = (Method.DPO, Method.KTO, Method.ORPO)


@check(
    "WT030",
    "no-held-out-data",
    Severity.NOTE,
    looks_for="No held-out data (GRPO apart, which is watched by its reward).",
    why="Without it nothing shows overfitting, and one value is as good as another. "
    "TRL, Axolotl and LLaMA-Factory hold "
    "nothing out unless told to.",
    mend="hold out 1 to 5 % of the rows and evaluate on them",
    evidence=("D009", "E101"),
)
def no_held_out_data(config: Config) -> Iterator[Hit]:
    if config.method in (None, Method.GRPO) or has_held_out(config) is not False or _many_epochs(config):
        return
    if config.given("eval_strategy") and config.value("eval_strategy") not in (None, False, "no"):
        return  # WT033's
    name = "eval_share" if config.tool in (Tool.AXOLOTL, Tool.LLAMAFACTORY) else "eval_data"
    key = {"eval_share": config.key("eval_share"), "eval_data": "eval_dataset"}[name]
    yield Hit(name=name, sentence="nothing is held out: the run cannot show whether it overfits", key=key)


def _many_epochs(config: Config) -> float | None:
    epochs, most = config.number("num_train_epochs"), config.number("max_steps")
    if epochs is None or "max_steps" in config.unread or (most is not None and most > 0):
        return None
    return epochs if epochs > limit("WT031", "epochs") else None


@check(
    "WT031",
    "many-epochs-unseen",
    Severity.WARNING,
    looks_for="More than 3 epochs without evaluation on held-out rows.",
    why="Past two or three passes most data is learned by heart. Long reasoning traces are an exception, and only an "
    "evaluation can tell.",
    mend="evaluate on held-out rows and keep the best checkpoint, or train 1 to 3 epochs",
    evidence=("E101", "E059", "E100"),
    epochs=3.0,
)
def many_epochs_unseen(config: Config) -> Iterator[Hit]:
    epochs = _many_epochs(config)
    if epochs is not None and config.method is not Method.GRPO and evaluates(config) is False:
        yield Hit(
            name="num_train_epochs", sentence=f"{shown(epochs)} epochs, and nothing is evaluated on held-out rows"
        )


@check(
    "WT032",
    "held-out-data-unused",
    Severity.WARNING,
    looks_for="Held-out data is given, and `eval_strategy` is left at `no`.",
    why="The Trainer's default is never to evaluate; the held-out rows are then neither trained nor looked at.",
    mend="set `eval_strategy: steps` with `eval_steps`",
    evidence=("L001", "D009"),
)
def held_out_data_unused(config: Config) -> Iterator[Hit]:
    if has_held_out(config) and evaluates(config) is False and not config.on("do_eval"):
        name = "eval_data" if config.given("eval_data") else "eval_share"
        yield Hit(
            name=name,
            sentence=f"{config.key(name)} holds data out, and {config.key('eval_strategy')} "
            "is no: it is never evaluated",
        )


@check(
    "WT033",
    "evaluation-without-data",
    Severity.ERROR,
    looks_for="Evaluation is asked for, and there is nothing to evaluate on.",
    why="The Trainer refuses to start without an evaluation set; Axolotl refuses eval_steps with val_set_size 0, and "
    "passes over evals_per_epoch in silence.",
    mend="hold out rows, or remove the evaluation",
    evidence=("L001", "L005"),
)
def evaluation_without_data(config: Config) -> Iterator[Hit]:
    if not config.given("eval_strategy") or config.method is None or has_held_out(config) is not False:
        return
    if config.value("eval_strategy") in (None, False, "no"):
        return
    if config.form is Form.SCRIPT and config.method is Method.GRPO:
        return
    silent = config.key("eval_strategy") == "evals_per_epoch"
    sentence = f"{config.key('eval_strategy')} asks for evaluation, and no data is held out"
    yield Hit(name="eval_strategy", sentence=sentence, severity=Severity.NOTE if silent else None)


@check(
    "WT034",
    "best-model-cannot-be-kept",
    Severity.ERROR,
    looks_for="`load_best_model_at_end` with evaluation and saving at different times.",
    why="The Trainer refuses: the best model can only be loaded if it was saved when it was evaluated.",
    mend="use the same strategy for both, and save_steps as a multiple of eval_steps",
    evidence=("L001",),
)
def best_model_cannot_be_kept(config: Config) -> Iterator[Hit]:
    evaluation, saving = config.value("eval_strategy"), config.value("save_strategy")
    if not config.on("load_best_model_at_end") or None in (evaluation, saving) or saving == "best":
        return
    name = "load_best_model_at_end"
    if str(evaluation) != str(saving):
        yield Hit(
            name=name,
            sentence=f"load_best_model_at_end, with eval_strategy {shown(evaluation)} and "
            f"save_strategy {shown(saving)}",
        )
        return
    between, steps = config.whole("eval_steps"), config.whole("save_steps")
    if evaluation == "steps" and between and steps and between >= 1 and steps >= 1 and steps % between:
        yield Hit(
            name=name, sentence=f"load_best_model_at_end, with save_steps {steps} no multiple of eval_steps {between}"
        )


@check(
    "WT035",
    "early-stopping-cannot-start",
    Severity.ERROR,
    looks_for="EarlyStoppingCallback without evaluation, or without a metric for the best model.",
    why="The callback asserts both when training begins.",
    mend="set eval_strategy and load_best_model_at_end=True",
    evidence=("E106", "L001"),
)
def early_stopping_cannot_start(config: Config) -> Iterator[Hit]:
    fact = config.facts.get("EarlyStoppingCallback")
    if fact is None or config.is_open("metric_for_best_model"):
        return
    blind = config.value("eval_strategy") in (None, False, "no") and not config.is_open("eval_strategy")
    no_metric = not config.given("metric_for_best_model") and config.off("load_best_model_at_end")
    if blind or no_metric:
        lack = "nothing is evaluated" if blind else "metric_for_best_model is not set"
        yield Hit(name="callbacks", sentence=f"EarlyStoppingCallback, and {lack}", key=fact.key, line=fact.line)


@check(
    "WT036",
    "batch-larger-than-data",
    Severity.ERROR,
    looks_for="An update that takes more rows than the local dataset has.",
    why="Every epoch is then less than one update; a rate and a schedule mean nothing.",
    mend="lower gradient_accumulation_steps, so that an epoch has at least 30 updates",
    evidence=("E040", "E097"),
)
def batch_larger_than_data(config: Config) -> Iterator[Hit]:
    size, rows = batch(config), config.look.rows
    if size is not None and rows and config.look.rows_are_all and size > rows and not config.on("packing"):
        name = (
            "gradient_accumulation_steps"
            if config.given("gradient_accumulation_steps")
            else "per_device_train_batch_size"
        )
        yield Hit(name=name, sentence=f"an update takes {size} rows, and the data has {counted(rows, 'row')}")


@check(
    "WT037",
    "few-updates",
    Severity.NOTE,
    looks_for="Fewer than 100 updates, where their number is known.",
    why="Demonstrations set `max_steps: 60`, and runs copy it: below about 100 updates "
    "an adapter has hardly left B = 0, "
    "and the best rate is a different one.",
    mend="remove max_steps and train whole epochs, or make the batch smaller",
    evidence=("E040", "E032", "D001"),
)
def few_updates(config: Config) -> Iterator[Hit]:
    run, wanted = updates(config), number("updates_wanted")
    if run is None or run >= wanted or config.method is Method.GRPO:
        return
    name = "max_steps" if (config.whole("max_steps") or 0) > 0 else "num_train_epochs"
    rows = f" of {size} rows" if (size := batch(config)) else ""
    yield Hit(
        name=name, sentence=f"the run has {counted(run, 'update')}{rows}: about {wanted:.0f} are needed to settle"
    )


@check(
    "WT038",
    "epochs-overruled",
    Severity.NOTE,
    looks_for="`max_steps` and `num_train_epochs` both set.",
    why="max_steps wins, also where it is many epochs, and the schedule is stretched to it.",
    mend="keep one of the two",
    evidence=("L001",),
)
def epochs_overruled(config: Config) -> Iterator[Hit]:
    most = config.whole("max_steps")
    if most is not None and most > 0 and "num_train_epochs" in config.settings:
        yield Hit(
            name="max_steps",
            sentence=f"max_steps {most:,} overrules num_train_epochs {shown(config.value('num_train_epochs'))}",
        )


@check(
    "WT039",
    "preference-epochs",
    Severity.WARNING,
    looks_for="More than 3 epochs of DPO, KTO or ORPO, evaluated or not.",
    why="Released recipes use 1 to 3.",
    mend="1 epoch, at most 3",
    evidence=("E046", "E047", "E049"),
)
def preference_epochs(config: Config) -> Iterator[Hit]:
    epochs = _many_epochs(config)
    if epochs is not None and config.method in _PREFERENCE and evaluates(config) is not False:
        yield Hit(
            name="num_train_epochs", sentence=f"{shown(epochs)} epochs of {config.method}; released recipes use 1 to 3"
        )


@check(
    "WT040",
    "preference-batch-small",
    Severity.NOTE,
    looks_for="DPO, KTO or ORPO with fewer than 8 examples an update on one device.",
    why="A published DPO recipe for 8 GPUs fell from 6.4 to 1.9 on MT-bench when it "
    "was run on one with a smaller batch.",
    mend="raise gradient_accumulation_steps to 16 or 32 examples an update, over all devices",
    evidence=("L006", "E046"),
    least=8,
)
def preference_batch_small(config: Config) -> Iterator[Hit]:
    size = batch(config)
    if config.method in _PREFERENCE and size is not None and 0 < size < limit("WT040", "least"):
        yield Hit(
            name="gradient_accumulation_steps",
            sentence=f"an update of {config.method} sees {counted(size, 'example')} on each device",
        )


@check(
    "WT041",
    "batch-large-for-adapter",
    Severity.NOTE,
    looks_for="SFT with LoRA and more than 256 examples an update on one device.",
    why="LoRA falls behind full fine-tuning as the batch grows, whatever the rank.",
    mend="16 to 64 examples an update",
    evidence=("E035", "E097"),
    most=256,
)
def batch_large_for_adapter(config: Config) -> Iterator[Hit]:
    size = batch(config)
    more_than_all = bool(config.look.rows and config.look.rows_are_all and size and size > config.look.rows)
    if config.method is not Method.SFT or not config.trains_adapter or more_than_all:
        return
    if size is not None and size > limit("WT041", "most"):
        yield Hit(name="gradient_accumulation_steps", sentence=f"an update takes {size:,} examples on each device")


# ── length ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@check(
    "WT042",
    "length-left-to-default",
    Severity.NOTE,
    looks_for="No `max_length`: TRL then cuts at 1,024 tokens, Axolotl drops rows longer than 512.",
    why="What is cut is the end: the answer's last words and its end token. Nothing is said.",
    mend="set it to the longest row, rounded up; `welltuned data FILE --model M` shows the lengths",
    evidence=("L001", "L005"),
)
def length_left_to_default(config: Config) -> Iterator[Hit]:
    if (
        config.tool not in (Tool.TRL, Tool.AXOLOTL)
        or config.given("max_length")
        or config.method in (None, Method.GRPO)
    ):
        return
    default = config.whole("max_length")
    if default is not None and not (config.method is Method.SFT and config.stage == "Trainer"):
        what = "dropped" if config.tool is Tool.AXOLOTL else "cut"
        sentence = f"{config.key('max_length')} is not set: rows longer than {default:,} tokens are {what}"
        yield Hit(name="max_length", sentence=sentence)


@check(
    "WT043",
    "length-cuts-rows",
    Severity.WARNING,
    looks_for="Local data of which more than 1 % of the rows cannot fit max_length, even at 6 characters a token.",
    why="A cut row ends without its answer's end: the model learns not to stop. Usual "
    "text has 3 to 5 characters a token, "
    "so what is found here is the least that is cut.",
    mend="raise max_length, or drop the long rows; `welltuned data FILE --model M` counts them in tokens",
    evidence=("L007",),
    share=0.01,
    characters=6,
)
def length_cuts_rows(config: Config) -> Iterator[Hit]:
    length, sizes = config.whole("max_length"), config.look.characters
    if not length or not sizes or config.method is None:
        return
    cut = sum(size > length * limit("WT043", "characters") for size in sizes)
    if cut / len(sizes) > limit("WT043", "share"):
        sentence = (
            f"at least {cut / len(sizes):.0%} of the rows do not fit {config.key('max_length')} "
            f"{length:,}: the longest has {max(sizes):,} characters"
        )
        yield Hit(name="max_length", sentence=sentence)


@check(
    "WT044",
    "length-beyond-context",
    Severity.WARNING,
    looks_for="max_length above the context length in the local model's config.json.",
    why="Positions past the context were never seen in training.",
    mend="lower max_length to the model's context, or extend the context on purpose",
    evidence=("L015",),
)
def length_beyond_context(config: Config) -> Iterator[Hit]:
    length, context = config.whole("max_length"), config.look.context_length
    if length and context and length > context:
        yield Hit(
            name="max_length",
            sentence=f"{config.key('max_length')} {length:,} is above the model's context of {context:,}",
        )
