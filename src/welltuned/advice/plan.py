"""The plan: every hyperparameter with its reason, the memory and time it will take, and what to beware of.

Choices depend on each other in one direction, each on the user's value where there is one: length → rank → epochs →
batch → memory → number of updates → learning rate → schedule. A user's value is never changed; where it lies outside
the sound range a warning says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from welltuned.advice import batch as batches
from welltuned.advice import lora, preference, reinforcement, schedule, variants
from welltuned.advice.activations import MemorySetting
from welltuned.advice.codec import from_plain, to_plain
from welltuned.advice.compiling import choose_compile
from welltuned.advice.effort import TimeForecast, forecast_time
from welltuned.advice.epoch import Epoch, epoch_of
from welltuned.advice.length import choose_max_length
from welltuned.advice.memory import Fitted, MemoryForecast, fit_memory, trained_parameters
from welltuned.advice.precision import choose_dtype
from welltuned.advice.rate import choose_rate, rate_setting
from welltuned.advice.room import fixed_by, room_choices
from welltuned.advice.rules import cited, number, rule
from welltuned.advice.safekeeping import Course, safekeeping_choices
from welltuned.advice.settle import counted, settle, shown
from welltuned.advice.sharding import more_processes, must_be_cut, sharding_choices, ways_to_hold
from welltuned.advice.warn import all_warnings, ways_to_fit
from welltuned.choice import Choice
from welltuned.data.stream import steps_per_run
from welltuned.errors import InputError
from welltuned.facts.adapter import AdapterFacts
from welltuned.facts.data import DatasetFacts
from welltuned.facts.machine import Device, MachineFacts
from welltuned.facts.model import ModelFacts
from welltuned.recipe import FULL_SHARD, OPTIMIZERS_8BIT, Method, PlainLoader, Recipe, Tune


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    model: ModelFacts
    dataset: DatasetFacts
    machine: MachineFacts
    adapter: AdapterFacts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will do. `choices` are in the order in which they are shown."""

    recipe: Recipe
    choices: Mapping[str, Choice]
    facts: Facts
    memory: MemoryForecast
    time: TimeForecast
    warnings: tuple[str, ...]

    def value(self, name: str) -> Any:
        """The chosen value of a hyperparameter."""
        return self.choices[name].value

    @property
    def updates(self) -> int:
        """Updates of the whole run: what the epochs make, or max_steps where that is fewer."""
        return self.time.updates

    def to_json(self) -> dict[str, Any]:
        """The document that `plan --json` prints."""
        return {
            "choices": {name: to_plain(choice) for name, choice in self.choices.items()},
            "facts": self._facts_json(),
            "memory": {
                "total_bytes": self.memory.total_bytes,
                "parts": dict(self.memory.parts),
                "fits": self.memory.fits,
            },
            "warnings": list(self.warnings),
        }

    def _facts_json(self) -> dict[str, Any]:
        """The facts, with the shares that follow from them, and the run's size."""
        facts, data = to_plain(self.facts), self.facts.dataset
        shares = {"supervised_share": data.supervised_share, "masked_share": 1 - data.supervised_share}
        facts["dataset"] |= {name: round(share, 4) for name, share in shares.items()}
        return {**facts, "run": to_plain(self.time)}


class PlanLine(NamedTuple):
    """One row of the printed plan, all text; `span` is empty where a range has no meaning."""

    name: str
    value: str
    span: str
    reason: str
    evidence: str


def plan_lines(plan: Plan) -> list[PlanLine]:
    """The choices as text, for the command line and the report."""
    return [
        PlanLine(
            name=name,
            value=shown(choice.value),
            span="" if choice.low is None else f"{shown(choice.low)}–{shown(choice.high)}",
            reason=choice.reason,
            evidence=" ".join(choice.evidence),
        )
        for name, choice in plan.choices.items()
    ]


def plan_to_yaml(plan: Plan) -> str:
    """The run's plan.yaml: everything that the plan knows, readable and complete."""
    text: str = yaml.safe_dump(to_plain(plan), sort_keys=False, allow_unicode=True, width=120)
    return text


def plan_from_yaml(text: str, where: str = "plan.yaml") -> Plan:
    """The plan that `plan_to_yaml` wrote."""
    try:
        plan = from_plain(Plan, yaml.load(text, Loader=PlainLoader))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        mend = "it is written by `welltuned train`; do not edit it"
        raise InputError(f"not a plan that can be read ({error})", where=where, mend=mend) from error
    assert isinstance(plan, Plan)
    return plan


def with_problems(plan: Plan, problems: Sequence[tuple[float, str]]) -> Plan:
    """The plan with what the audit of its data found, weighed (0 to 100), among its warnings."""
    facts = plan.facts
    warnings = all_warnings(
        *(plan.recipe, facts.model, facts.dataset, facts.machine, plan.choices, plan.memory, plan.updates), problems
    )
    return replace(plan, warnings=warnings)


def require_memory(plan: Plan) -> None:
    """Refuse a run whose forecast does not fit, before anything is downloaded."""
    if plan.memory.fits is False:
        what = f"the run needs about {plan.memory.total_bytes / 1e9:.1f} GB and has "
        what += f"{(plan.memory.limit_bytes or 0) / 1e9:.1f} GB"
        what += _in_each(plan)
        raise InputError(
            what,
            where="memory",
            mend=more_processes(plan.recipe, plan.facts.machine)
            + ways_to_fit(plan.recipe, plan.facts.model, plan.facts.machine.device, plan.choices, plan.memory),
        )


def _in_each(plan: Plan) -> str:
    """What several processes would change, or did."""
    machine = plan.facts.machine
    if "fsdp" in plan.choices and plan.value("fsdp") == FULL_SHARD and machine.processes > 1:
        return f" in each of {machine.processes} processes, though each keeps only a part of every weight"
    if machine.processes > 1:
        return " in each process, which holds the whole model"
    return ""


# ── making one ───────────────────────────────────────────────────────────────────────────────────────────────────────


def make_plan(
    recipe: Recipe,
    model: ModelFacts,
    data: DatasetFacts,
    machine: MachineFacts,
    flops_per_second: float | None = None,
    adapter: AdapterFacts | None = None,
) -> Plan:
    """Choose everything that the recipe leaves open.

    `flops_per_second` is what a run like it has reached here, `adapter` the one that training goes on from.
    Where LoRA does not fit, 4-bit weights do, and the recipe names no `tune`, the plan is QLoRA's.
    """
    plan = _plan(recipe, model, data, machine, flops_per_second, adapter)
    given = recipe.hyperparameters.get("fsdp")
    if plan.memory.fits or recipe.tune_given or recipe.tune is not Tune.LORA or given == FULL_SHARD:
        return plan
    smaller = _plan(replace(recipe, tune=Tune.QLORA), model, data, machine, flops_per_second, adapter)
    return smaller if smaller.memory.fits else plan


def _plan(
    recipe: Recipe,
    model: ModelFacts,
    data: DatasetFacts,
    machine: MachineFacts,
    flops_per_second: float | None,
    adapter: AdapterFacts | None,
) -> Plan:
    choices: dict[str, Choice] = {"dtype": settle(recipe, "dtype", choose_dtype(recipe.tune, machine))}
    targets = lora.adapter_choices(choices, recipe, model, data, adapter)
    epoch = _objective(choices, recipe, model, data)
    max_steps: int | None = recipe.hyperparameters.get("max_steps")
    advised = _advised_batch(choices, recipe, epoch, data.rows, max_steps)
    pair = epoch.typical * epoch.sequences
    size = batches.choose_batch(recipe, advised, pair, 1).effective.value  # the budget cuts, never sizes
    fitted = _fitted(choices, recipe, model, data, epoch, machine, size, targets)
    pair = min(epoch.typical, choices["max_length"].value) * epoch.sequences
    cut = batches.choose_batch(recipe, advised, pair, fitted.token_budget)
    choices["effective_batch_size"] = cut.effective
    choices["per_device_train_batch_size"], choices["gradient_accumulation_steps"] = cut.per_device, cut.accumulation
    if recipe.method is Method.GRPO:
        reinforcement.require_whole_groups(size, choices["num_generations"].value)
    updates = _updates(choices, recipe, epoch.examples, size, max_steps)
    trained = trained_parameters(model, _memory_setting(choices, recipe, model, machine, targets))
    time = forecast_time(
        *(model, epoch, machine, recipe.method, recipe.tune),
        dtype=choices["dtype"].value,
        trained=trained,
        recomputed=fitted.share,
        updates=updates,
        batch=size,
        max_length=choices["max_length"].value,
        flops_per_second=flops_per_second,
    )
    _rate_and_schedule(choices, recipe, model, data, epoch, size, time, trained)
    dora = bool(recipe.hyperparameters.get("use_dora"))
    in_pieces = "fsdp" in choices and choices["fsdp"].value == FULL_SHARD
    compiling = choose_compile(machine.device, time.seconds, dora=dora, cut=in_pieces)
    choices["torch_compile"] = settle(recipe, "torch_compile", compiling)
    ordered = {name: choices[name] for name in _ORDER if name in choices}
    assert len(ordered) == len(choices), set(choices) - set(ordered)
    return Plan(
        recipe=recipe,
        choices=MappingProxyType(ordered),
        facts=Facts(model=model, dataset=data, machine=machine, adapter=adapter),
        memory=fitted.forecast,
        time=time,
        warnings=all_warnings(recipe, model, data, machine, ordered, fitted.forecast, updates),
    )


_ORDER = (
    *("learning_rate", "num_train_epochs", "max_steps", "effective_batch_size", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora"),
    *("init_lora_weights", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save"),
    *("embedding_learning_rate", "loraplus_lr_ratio", "ema_decay"),
    *("bias", "loss_type", "beta", "label_smoothing", "simpo_gamma", "desirable_weight"),
    *("undesirable_weight", "center_rewards_coefficient", "num_generations", "max_completion_length", "temperature"),
    *("top_p", "epsilon", "epsilon_high", "scale_rewards", "mask_truncated_completions", "num_iterations"),
    "vllm_importance_sampling_clip_max",
    *("warmup_steps", "lr_scheduler_type", "weight_decay", "optim", "adam_beta1", "adam_beta2", "max_grad_norm"),
    *("max_length", "packing", "assistant_only_loss", "token_budget", "gradient_checkpointing"),
    *("checkpointed_layers", "offload_checkpoints", "dense_base", "fsdp", "torch_compile", "dtype"),
    *("eval_steps", "load_best_model_at_end", "early_stopping_patience", "save_steps", "save_total_limit", "seed"),
)


def _objective(choices: dict[str, Choice], recipe: Recipe, model: ModelFacts, data: DatasetFacts) -> Epoch:
    """What only this method chooses, its epochs, and what an epoch passes through the model."""
    if recipe.method is Method.GRPO:
        choices |= reinforcement.group_choices(recipe, model, data)
        epochs = reinforcement.choose_epochs(data.rows)
        choices["num_train_epochs"] = settle(recipe, "num_train_epochs", epochs)
        return epoch_of(recipe.method, data, choices["num_generations"].value, choices["max_completion_length"].value)
    if recipe.method is Method.SFT:
        epochs = schedule.choose_epochs(data.rows, text=data.is_text)
    else:
        choices |= preference.preference_choices(recipe, data)
        epochs = preference.choose_epochs(recipe.method, data.rows)
    choices["num_train_epochs"] = settle(recipe, "num_train_epochs", epochs)
    return epoch_of(recipe.method, data)


def _advised_batch(
    choices: Mapping[str, Choice], recipe: Recipe, epoch: Epoch, rows: int, max_steps: int | None
) -> Choice:
    if recipe.method is Method.GRPO:
        return reinforcement.advised_answers(rows, choices["num_generations"].value)
    return batches.advised_batch(epoch.examples, choices["num_train_epochs"].value, max_steps, recipe.method)


def _memory_setting(
    choices: Mapping[str, Choice],
    recipe: Recipe,
    model: ModelFacts,
    machine: MachineFacts,
    targets: tuple[str, ...] | None,
    parts: int = 1,
) -> MemorySetting:
    return MemorySetting(
        tune=recipe.tune,
        dtype=choices["dtype"].value,
        device=machine.device,
        micro_tokens=0,
        checkpointing=False,
        r=choices["r"].value if "r" in choices else 0,
        targets=targets,
        more=variants.more_parameters(model, choices, targets),
        average="ema_decay" in recipe.hyperparameters,
        parts=parts,
    )


def _fitted(
    choices: dict[str, Choice],
    recipe: Recipe,
    model: ModelFacts,
    data: DatasetFacts,
    epoch: Epoch,
    machine: MachineFacts,
    batch: int,
    targets: tuple[str, ...] | None,
) -> Fitted:
    """The longest example that memory allows, the micro-batch, and whether activations are recomputed."""
    user, limit = recipe.hyperparameters, recipe.memory or machine.training_memory
    step, context = int(number("length_step")), model.context_length or epoch.longest
    whole = min(-(-epoch.longest // step) * step, max(context, step))
    lengths = [user["max_length"]] if "max_length" in user else [whole]
    if "max_length" not in user and recipe.method is not Method.GRPO:
        lengths += [n for n in (data.length_p99, data.length_p95) if n < whole]
    tried: list[tuple[int, int, Fitted]] = []
    for length, (parts, eight_bit) in product(lengths, ways_to_hold(recipe, machine, _states(recipe))):
        longest = min(length, epoch.longest)
        setting = _memory_setting(choices, recipe, model, machine, targets, parts)
        budget = user.get("token_budget")
        if budget is None and "per_device_train_batch_size" in user:
            budget = user["per_device_train_batch_size"] * epoch.sequences * longest
        setting = replace(
            setting, lengths=tuple(sorted({min(n, length) for n in data.length_percentiles})), eight_bit=eight_bit
        )
        fitted = fit_memory(
            model,
            setting,
            limit=limit,
            longest=epoch.sequences * longest,
            update_tokens=epoch.sequences * min(batch * longest, max(longest, round(batch * epoch.typical))),
            host_limit=machine.memory_available if machine.device is Device.CUDA else 0,
            fixed=fixed_by(user, model, machine.device, budget),
        )
        tried.append((length, parts, fitted))
        if fitted.forecast.fits and (parts > 1 or not must_be_cut(recipe, machine)):
            break
    length, parts, fitted = tried[-1] if tried[-1][2].forecast.fits else _first_of_most_parts(tried)
    cut = fitted.forecast if parts > 1 else None
    choices |= sharding_choices(recipe, machine, limit, tried[0][2].forecast, cut)
    trained = trained_parameters(model, _memory_setting(choices, recipe, model, machine, targets))
    optimizer = schedule.choose_optimizer(trained, eight_bit=fitted.eight_bit and "optim" not in user, limit=limit)
    choices["optim"] = settle(recipe, "optim", optimizer)
    _memory_choices(choices, recipe, model, data, epoch, machine, length, whole, fitted, limit)
    return fitted


def _states(recipe: Recipe) -> tuple[bool, ...]:
    """Whether AdamW's moments are in 8 bits: the user's value, else in full fine-tuning where fp32 does not fit."""
    if "optim" in recipe.hyperparameters:
        return (recipe.hyperparameters["optim"] in OPTIMIZERS_8BIT,)
    return (False, True) if recipe.tune is Tune.FULL else (False,)


def _first_of_most_parts(tried: Sequence[tuple[int, int, Fitted]]) -> tuple[int, int, Fitted]:
    """Where nothing fits: what comes nearest without cutting rows."""
    most = max(parts for _, parts, _ in tried)
    return next(found for found in tried if found[1] == most)


def _memory_choices(
    choices: dict[str, Choice],
    recipe: Recipe,
    model: ModelFacts,
    data: DatasetFacts,
    epoch: Epoch,
    machine: MachineFacts,
    length: int,
    whole: int,
    fitted: Fitted,
    limit: int,
) -> None:
    advised = length if "max_length" not in recipe.hyperparameters else whole
    span = choose_max_length(recipe.method, data, epoch, advised, whole, length)
    choices["max_length"] = settle(recipe, "max_length", span)
    spec, total = rule(f"token_budget_{machine.device}"), fitted.forecast.total_bytes
    need = f"the run is forecast to take {total / 1e9:.1f} of {limit / 1e9:.1f} GB"
    budget = Choice(
        value=fitted.token_budget,
        low=min(spec.low, fitted.token_budget),
        high=max(spec.high, fitted.token_budget),
        reason=f"{need} with micro-batches of {fitted.token_budget:,} tokens; only memory and speed depend on it",
        evidence=spec.evidence,
    )
    choices["token_budget"] = settle(recipe, "token_budget", budget)
    choices |= room_choices(recipe, model, machine.device, fitted, limit)
    choices["packing"] = settle(recipe, "packing", batches.choose_packing(epoch))
    if recipe.method is Method.SFT:
        loss = batches.choose_assistant_only_loss(data.supervised_tokens, data.tokens, text=data.is_text)
        choices["assistant_only_loss"] = settle(recipe, "assistant_only_loss", loss)


def _updates(choices: dict[str, Choice], recipe: Recipe, rows: int, batch: int, max_steps: int | None) -> int:
    """The run ends with its last epoch or at max_steps, whichever comes first."""
    again = choices["num_iterations"].value if "num_iterations" in choices else 1
    by_epochs = again * steps_per_run(rows, batch, choices["num_train_epochs"].value)
    noun = "answers" if recipe.method is Method.GRPO else "rows"
    share = max_steps * batch / (rows * again) if max_steps else 0
    if max_steps is None:
        return by_epochs
    evidence = cited("epochs_by_rows")
    why = f"{counted(max_steps, 'update')} of {batch} come to {share:.2g} epochs of your {rows:,} {noun}"
    choices["max_steps"] = settle(recipe, "max_steps", Choice(value=max_steps, reason=why, evidence=evidence))
    if "num_train_epochs" in recipe.hyperparameters:
        return min(by_epochs, max_steps)
    span = choices["num_train_epochs"]
    choices["num_train_epochs"] = Choice(
        value=round(share, 2), low=span.low, high=span.high, reason=why, evidence=evidence
    )
    return max_steps


def _rate_and_schedule(
    choices: dict[str, Choice],
    recipe: Recipe,
    model: ModelFacts,
    data: DatasetFacts,
    epoch: Epoch,
    batch: int,
    time: TimeForecast,
    trained: int,
) -> None:
    updates = time.updates
    setting = rate_setting(model, choices, batch, updates)
    advised = choose_rate(recipe.method, recipe.tune, setting, data.rows, data.is_text)
    choices["learning_rate"] = settle(recipe, "learning_rate", variants.for_ratio(advised, recipe))
    rate = choices["learning_rate"].value
    choices |= variants.rate_choices(recipe, rate)
    if recipe.tune is not Tune.FULL:
        dropout = lora.choose_dropout(choices["num_train_epochs"].value, data.rows)
        choices["lora_dropout"] = settle(recipe, "lora_dropout", dropout)
    shape = settle(recipe, "lr_scheduler_type", schedule.choose_schedule(updates, recipe.method))
    beta1, beta2 = schedule.choose_betas(updates)
    evals = schedule.choose_eval_steps(updates, float(time.tokens), epoch.heldout_tokens, data.heldout_rows)
    for name, choice in {
        "lr_scheduler_type": shape,
        "warmup_steps": schedule.choose_warmup(updates, shape.value),
        "weight_decay": schedule.choose_weight_decay(rate, updates),
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        "max_grad_norm": schedule.choose_clip(batch),
        "eval_steps": evals,
        "seed": schedule.choose_seed(),
    }.items():
        choices[name] = choice if name == "lr_scheduler_type" else settle(recipe, name, choice)
    course = Course(
        updates=updates,
        eval_steps=choices["eval_steps"].value,
        heldout_rows=data.heldout_rows,
        seconds=time.seconds,
        trained=trained,
    )
    choices |= safekeeping_choices(recipe, course)
