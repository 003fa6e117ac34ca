"""What to beware of in a plan, the weightiest first. Advice warns; it does not overrule."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from welltuned.advice.activations import MemorySetting
from welltuned.advice.learning_rate import family_of
from welltuned.advice.memory import MemoryForecast, forecast_memory
from welltuned.advice.rate import moves_nothing, rate_setting
from welltuned.advice.rules import number, rule
from welltuned.advice.settle import counted, shown
from welltuned.advice.sharding import more_processes
from welltuned.choice import Choice, SetBy
from welltuned.facts.data import DatasetFacts
from welltuned.facts.machine import Device, MachineFacts
from welltuned.facts.model import ModelFacts
from welltuned.recipe import OPTIMIZERS_8BIT, Method, Recipe, Tune

_Weighed = tuple[float, str]


def all_warnings(
    recipe: Recipe,
    model: ModelFacts,
    data: DatasetFacts,
    machine: MachineFacts,
    choices: Mapping[str, Choice],
    memory: MemoryForecast,
    updates: int,
    problems: Sequence[tuple[float, str]] | None = None,
) -> tuple[str, ...]:
    """Sentences, the weightiest first. `problems` are the audit's, weighed; without them the facts must do."""
    found = [
        *_of_memory(recipe, model, machine, choices, memory),
        *(_of_data(model, data, choices) if problems is None else problems),
        *_of_user_values(choices, updates),
        *_of_run(recipe, model, data, machine, choices, updates),
    ]
    return tuple(text for _, text in sorted(found, key=lambda weighed: -weighed[0]))


def _of_memory(
    recipe: Recipe, model: ModelFacts, machine: MachineFacts, choices: Mapping[str, Choice], memory: MemoryForecast
) -> Iterator[_Weighed]:
    if memory.fits is False:
        need, limit = memory.total_bytes / 1e9, (memory.limit_bytes or 0) / 1e9
        ways = more_processes(recipe, machine) + ways_to_fit(recipe, model, machine.device, choices, memory)
        yield 100, f"does not fit: needs about {need:.1f} GB of {limit:.1f} GB; {ways}"
    if recipe.tune is Tune.QLORA and not recipe.tune_given:
        limit = (memory.limit_bytes or 0) / 1e9
        yield 75, f"LoRA does not fit into {limit:.1f} GB, so the base is kept in 4 bits; `tune: lora` forbids it"


def ways_to_fit(
    recipe: Recipe, model: ModelFacts, device: Device, choices: Mapping[str, Choice], memory: MemoryForecast
) -> str:
    """What would make the run fit, with its forecast, or the smallest need that was found."""
    spec = rule("token_budget_cpu")
    half = recipe.tune is Tune.FULL and device is Device.CUDA  # an adapter's frozen base may be bfloat16
    base = MemorySetting(
        tune=recipe.tune,
        dtype="bfloat16" if half else choices["dtype"].value,
        device=device,
        micro_tokens=int(spec.low),
        checkpointing=True,
        r=choices["r"].value if "r" in choices else int(number("lora_rank_floor")),
    )
    yours = choices["optim"].set_by is SetBy.USER
    eight_bit = choices["optim"].value in OPTIMIZERS_8BIT if yours else recipe.tune is Tune.FULL
    ways = [
        ("shorter examples and recomputed activations", replace(base, eight_bit=eight_bit)),
        ("--tune lora with them", replace(base, tune=Tune.LORA)),
        ("--tune qlora with them", replace(base, tune=Tune.QLORA)),
    ]
    needs = [(words, forecast_memory(model, setting).total_bytes) for words, setting in ways]
    for words, total in needs:
        if total <= (memory.limit_bytes or 0):
            return f"{words} ({int(spec.low)} tokens) would need {total / 1e9:.1f} GB"
    return f"even qlora with {int(spec.low)} tokens needs {needs[-1][1] / 1e9:.1f} GB: choose a smaller model"


def _of_data(model: ModelFacts, data: DatasetFacts, choices: Mapping[str, Choice]) -> Iterator[_Weighed]:
    length = choices["max_length"].value
    if length < data.length_max:
        cut = max(0.01, data.share_longer_than(length))
        context = f" (the model's context is {model.context_length:,})" if model.context_length == length else ""
        longest = f"the longest has {data.length_max:,} tokens"
        yield 80, f"max_length {length:,}{context} cuts about {cut:.0%} of the rows; {longest}"
    if data.heldout_overlap:
        rows = counted(data.heldout_overlap, "held-out row")
        yield 65, f"{rows} also found in the training data: the held-out loss will flatter the run"
    if data.unsupervised_rows:
        yield 40, f"{counted(data.unsupervised_rows, 'row')} without a trained token: nothing is learned there"
    if data.duplicates:
        yield 25, f"{counted(data.duplicates, 'training row')} duplicated: what stands twice counts twice"


def _of_user_values(choices: Mapping[str, Choice], updates: int) -> Iterator[_Weighed]:
    """A user's value outside its range, weighed by how far outside."""
    for name, choice in choices.items():
        if choice.set_by is not SetBy.USER or isinstance(choice.value, str | tuple | bool) or choice.low is None:
            continue
        below = choice.value < choice.low
        if not below and choice.value <= choice.high:
            continue
        bound = choice.low if below else choice.high
        tiny = 1e-12
        distance = abs(math.log(max(choice.value, tiny) / max(bound, tiny)))
        weight = (60 if name == "learning_rate" else 30) + min(9, distance)
        span = f"{shown(choice.low)}–{shown(choice.high)}"
        side = "below" if below else "above"
        yield weight, f"{name} {shown(choice.value)} (yours) is {side} the sound range {span}: {choice.reason}"


def _why_so_few(choices: Mapping[str, Choice]) -> str:
    """The user's own values that make a run short."""
    yours = [n for n in ("num_train_epochs", "max_steps", "effective_batch_size") if n in choices]
    yours = [f"{n} {shown(choices[n].value)}" for n in yours if choices[n].set_by is SetBy.USER]
    return f"; {' and '.join(yours)} {'is' if len(yours) == 1 else 'are'} yours" if yours else ""


def _of_run(
    recipe: Recipe,
    model: ModelFacts,
    data: DatasetFacts,
    machine: MachineFacts,
    choices: Mapping[str, Choice],
    updates: int,
) -> Iterator[_Weighed]:
    if not data.heldout_rows:
        yield 70, "no held-out rows: nothing will show overfitting"
    if choices["optim"].value.startswith("paged"):
        where = "the GPU" if machine.device is Device.CUDA else "memory"
        yield 20, f"optim {choices['optim'].value} (yours): its 8-bit state stays in {where}, nothing is paged out"
    batch = choices["effective_batch_size"].value
    group = choices["num_generations"].value if "num_generations" in choices else 1
    if batch > data.rows * group:
        yield 45, f"an update of {batch} takes each of the {counted(data.rows, 'row')} more than once"
    if updates < number("updates_wanted"):
        few = f"only {counted(updates, 'update')}: below about {number('updates_wanted'):.0f} a run rarely settles"
        yield 35, few + _why_so_few(choices)
    setting = rate_setting(model, choices, batch, updates)
    beta = choices["beta"].value if "beta" in choices else 0.0
    calm = moves_nothing(recipe.method, recipe.tune, setting, choices["learning_rate"].value, beta)
    if calm is not None:
        yield 55, calm
    if recipe.tune is Tune.FULL and model.quantized:
        yield 90, f"the model's weights are stored quantised ({model.quantized}) and cannot be trained in full"
    if recipe.tune is Tune.QLORA and not machine.four_bit:
        yield 85, "4-bit weights need the `bitsandbytes` package, which is not installed here"
    rebuilt = "dense_base" in choices and choices["dense_base"].value == "rebuilt"
    if rebuilt and machine.device is Device.CPU:
        yield 22, "4-bit weights save memory on a CPU but cost time: every pass expands them again"
    if not model.parameters_exact:
        yield 20, f"the architecture {model.family} is not known here: its size is estimated as Llama's would be"
    if recipe.method is Method.SFT and family_of(model.family) is None:
        yield (
            15,
            f"no rate of a {model.family} model was measured: the rate is the average family's and its range wider",
        )
    if str(choices["lr_scheduler_type"].value).startswith("constant"):
        yield 18, "the rate's law was measured with linear decay; a constant rate wants a lower one"
    if recipe.hyperparameters.keys() >= {"max_steps", "num_train_epochs"}:
        yield (
            10,
            f"max_steps and num_train_epochs are both set: the run ends at the earlier, {counted(updates, 'update')}",
        )
