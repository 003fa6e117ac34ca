"""The plan: every hyperparameter with its reason, the memory and time it will take, and what to beware of.

Choices depend on each other in one direction, each on the user's value where there is one: length → rank → epochs →
batch → memory → number of updates → learning rate → schedule. A user's value is never changed; where it lies outside
the sound range a warning says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from welltuned.advice import batch as batches
from welltuned.advice import learning_rate, lora, schedule
from welltuned.advice.activations import MemorySetting
from welltuned.advice.codec import from_plain, to_plain
from welltuned.advice.effort import TimeForecast, forecast_time
from welltuned.advice.memory import Fitted, MemoryForecast, fit_memory, trained_parameters
from welltuned.advice.rules import cited, number, rule
from welltuned.advice.settle import from_rule, settle, shown
from welltuned.advice.warn import all_warnings, ways_to_fit
from welltuned.choice import Choice
from welltuned.data.stream import steps_per_run
from welltuned.errors import InputError
from welltuned.facts.data import DatasetFacts
from welltuned.facts.machine import Device, MachineFacts
from welltuned.facts.model import ModelFacts
from welltuned.recipe import Method, Recipe, Tune, YamlLoader


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    model: ModelFacts
    dataset: DatasetFacts
    machine: MachineFacts


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
            "facts": {**to_plain(self.facts), "run": to_plain(self.time)},
            "memory": {
                "total_bytes": self.memory.total_bytes,
                "parts": dict(self.memory.parts),
                "fits": self.memory.fits,
            },
            "warnings": list(self.warnings),
        }


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
        plan = from_plain(Plan, yaml.load(text, Loader=YamlLoader))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
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
        raise InputError(
            what,
            where="memory",
            mend=ways_to_fit(plan.recipe, plan.facts.model, plan.facts.machine.device, plan.choices, plan.memory),
        )


# ── making one ───────────────────────────────────────────────────────────────────────────────────────────────────────


def make_plan(
    recipe: Recipe,
    model: ModelFacts,
    data: DatasetFacts,
    machine: MachineFacts,
    tokens_per_second: float | None = None,
) -> Plan:
    """Choose everything that the recipe leaves open. `tokens_per_second` comes from a probe, where one was run.

    Where LoRA does not fit, 4-bit weights do, and the recipe names no `tune`, the plan is QLoRA's.
    """
    plan = _plan(recipe, model, data, machine, tokens_per_second)
    if plan.memory.fits or recipe.tune_given or recipe.tune is not Tune.LORA:
        return plan
    smaller = _plan(replace(recipe, tune=Tune.QLORA), model, data, machine, tokens_per_second)
    return smaller if smaller.memory.fits else plan


def _plan(
    recipe: Recipe, model: ModelFacts, data: DatasetFacts, machine: MachineFacts, tokens_per_second: float | None
) -> Plan:
    choices: dict[str, Choice] = {}
    choices["dtype"] = settle(recipe, "dtype", _dtype(recipe.tune, machine))
    targets = _adapter(choices, recipe, model, data)
    choices["num_train_epochs"] = settle(recipe, "num_train_epochs", schedule.choose_epochs(data.rows))
    max_steps: int | None = recipe.hyperparameters.get("max_steps")
    advised = batches.advised_batch(data.rows, choices["num_train_epochs"].value, max_steps)
    size = batches.choose_batch(recipe, advised, data.length_p95, 1).effective.value  # the budget cuts, never sizes
    fitted = _fitted(choices, recipe, model, data, machine, size, targets)
    cut = batches.choose_batch(recipe, advised, min(data.length_p95, choices["max_length"].value), fitted.token_budget)
    choices["effective_batch_size"] = cut.effective
    choices["per_device_train_batch_size"], choices["gradient_accumulation_steps"] = cut.per_device, cut.accumulation
    updates = _updates(choices, recipe, data.rows, size, max_steps)
    trained = trained_parameters(model, _memory_setting(choices, recipe, machine, targets))
    time = forecast_time(
        model,
        data,
        recipe.tune,
        trained=trained,
        checkpointing=fitted.checkpointing,
        updates=updates,
        batch=size,
        max_length=choices["max_length"].value,
        tokens_per_second=tokens_per_second,
    )
    _rate_and_schedule(choices, recipe, model, data, size, time, trained)
    ordered = {name: choices[name] for name in _ORDER if name in choices}
    assert len(ordered) == len(choices), set(choices) - set(ordered)
    return Plan(
        recipe=recipe,
        choices=MappingProxyType(ordered),
        facts=Facts(model=model, dataset=data, machine=machine),
        memory=fitted.forecast,
        time=time,
        warnings=all_warnings(recipe, model, data, machine, ordered, fitted.forecast, updates),
    )


_ORDER = (
    *("learning_rate", "num_train_epochs", "max_steps", "effective_batch_size", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora"),
    *("init_lora_weights", "bias", "beta", "num_generations", "max_completion_length", "temperature"),
    *("warmup_steps", "lr_scheduler_type", "weight_decay", "optim", "adam_beta1", "adam_beta2", "max_grad_norm"),
    *("max_length", "packing", "assistant_only_loss", "token_budget", "gradient_checkpointing", "dtype"),
    *("eval_steps", "seed"),
)


def _dtype(tune: Tune, machine: MachineFacts) -> Choice:
    if tune is Tune.FULL:
        why = "every weight is trained, and bfloat16 would round small updates away"
        return Choice(value="float32", reason=why, evidence=cited("dtype_cpu_native_needs"))
    if machine.device is Device.CUDA:
        value = "bfloat16" if machine.native_bf16 else "float32"
        why = f"{machine.gpu_name} computes in bfloat16" if machine.native_bf16 else "the GPU has no native bfloat16"
    else:
        value = "bfloat16" if machine.amx_bf16 else "float32"
        has = "has AMX for bfloat16" if machine.amx_bf16 else "has no AMX, without which bfloat16 is no faster"
        why = f"your processor with {machine.cores} cores {has}"
    base = ", and the 4-bit weights are expanded to it" if tune is Tune.QLORA else ""
    return Choice(value=value, reason=why + base, evidence=cited("dtype_cpu_native_needs"))


def _adapter(
    choices: dict[str, Choice], recipe: Recipe, model: ModelFacts, data: DatasetFacts
) -> tuple[str, ...] | None:
    """The LoRA choices; the names of the targets, None for all or for full fine-tuning."""
    if recipe.tune is Tune.FULL:
        return None
    choices["target_modules"] = settle(recipe, "target_modules", lora.choose_targets(model))
    targets = lora.target_names(choices["target_modules"].value, model)
    choices["r"] = settle(recipe, "r", lora.choose_rank(model, targets, data.supervised_tokens))
    r = choices["r"].value
    choices["lora_alpha"] = settle(recipe, "lora_alpha", lora.choose_alpha(r))
    choices["use_rslora"] = settle(recipe, "use_rslora", lora.choose_rslora(r))
    choices["init_lora_weights"] = settle(recipe, "init_lora_weights", lora.choose_init())
    choices["bias"] = settle(recipe, "bias", lora.choose_bias())
    return targets


def _memory_setting(
    choices: Mapping[str, Choice], recipe: Recipe, machine: MachineFacts, targets: tuple[str, ...] | None
) -> MemorySetting:
    return MemorySetting(
        tune=recipe.tune,
        dtype=choices["dtype"].value,
        device=machine.device,
        micro_tokens=0,
        checkpointing=False,
        r=choices["r"].value if "r" in choices else 0,
        targets=targets,
    )


def _fitted(
    choices: dict[str, Choice],
    recipe: Recipe,
    model: ModelFacts,
    data: DatasetFacts,
    machine: MachineFacts,
    batch: int,
    targets: tuple[str, ...] | None,
) -> Fitted:
    """The longest example that memory allows, the micro-batch, and whether activations are recomputed."""
    user, limit = recipe.hyperparameters, recipe.memory or machine.training_memory
    step, context = int(number("length_step")), model.context_length or data.length_max
    whole = min(-(-data.length_max // step) * step, max(context, step))
    lengths = [user["max_length"]] if "max_length" in user else [whole]
    if "max_length" not in user:
        lengths += [n for n in (data.length_p99, data.length_p95) if n < whole]
    tried: list[tuple[int, Fitted]] = []
    for length in lengths:
        longest = min(length, data.length_max)
        setting = _memory_setting(choices, recipe, machine, targets)
        budget = user.get("token_budget")
        if budget is None and "per_device_train_batch_size" in user:
            budget = user["per_device_train_batch_size"] * longest
        fitted = fit_memory(
            model,
            replace(setting, lengths=tuple(sorted({min(n, length) for n in data.length_percentiles}))),
            limit=limit,
            longest=longest,
            update_tokens=min(batch * longest, max(longest, round(batch * data.length_p95))),
            token_budget=budget,
            checkpointing=user.get("gradient_checkpointing"),
        )
        tried.append((length, fitted))
        if fitted.forecast.fits:
            break
    length, fitted = tried[-1] if tried[-1][1].forecast.fits else tried[0]
    _memory_choices(choices, recipe, data, machine, length, whole, fitted, limit)
    return fitted


def _memory_choices(
    choices: dict[str, Choice],
    recipe: Recipe,
    data: DatasetFacts,
    machine: MachineFacts,
    length: int,
    whole: int,
    fitted: Fitted,
    limit: int,
) -> None:
    share, advised = data.share_longer_than(length), length if "max_length" not in recipe.hyperparameters else whole
    room = (
        f"your longest of {data.rows:,} rows has {data.length_max:,} tokens, half of them up to {data.length_median:,}"
    )
    why = f"{room}: nothing is cut" if advised >= data.length_max else f"{room}; about {share:.0%} of the rows are cut"
    evidence = cited("packing", "length_step")
    high = max(advised, whole)
    span = Choice(value=advised, low=min(data.length_p95, advised), high=high, reason=why, evidence=evidence)
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
    cost = f"recomputing costs about {number('checkpointing_cost'):.0%} more arithmetic"
    again = f"{need}; {cost}, " + (
        "but without it the run does not fit" if fitted.checkpointing else "and is not needed"
    )
    recompute = Choice(value=fitted.checkpointing, reason=again, evidence=cited("checkpointing_cost"))
    choices["gradient_checkpointing"] = settle(recipe, "gradient_checkpointing", recompute)
    choices["packing"] = settle(recipe, "packing", batches.choose_packing(data.rows, data.length_mean, data.length_max))
    if recipe.method is Method.SFT:
        loss = batches.choose_assistant_only_loss(data.supervised_tokens, data.tokens)
        choices["assistant_only_loss"] = settle(recipe, "assistant_only_loss", loss)


def _updates(choices: dict[str, Choice], recipe: Recipe, rows: int, batch: int, max_steps: int | None) -> int:
    """The run ends with its last epoch or at max_steps, whichever comes first."""
    by_epochs = steps_per_run(rows, batch, choices["num_train_epochs"].value)
    if max_steps is None:
        return by_epochs
    evidence = cited("epochs_by_rows")
    why = f"{max_steps:,} updates of {batch} are {max_steps * batch / rows:.2g} epochs of your {rows:,} rows"
    choices["max_steps"] = settle(recipe, "max_steps", Choice(value=max_steps, reason=why, evidence=evidence))
    if "num_train_epochs" in recipe.hyperparameters:
        return min(by_epochs, max_steps)
    span = choices["num_train_epochs"]
    value = round(max_steps * batch / rows, 2)
    choices["num_train_epochs"] = Choice(value=value, low=span.low, high=span.high, reason=why, evidence=evidence)
    return max_steps


def _rate_and_schedule(
    choices: dict[str, Choice],
    recipe: Recipe,
    model: ModelFacts,
    data: DatasetFacts,
    batch: int,
    time: TimeForecast,
    trained: int,
) -> None:
    updates = time.updates
    setting = learning_rate.RateSetting(
        family=model.family,
        parameters=model.parameters,
        batch=batch,
        updates=updates,
        r=choices["r"].value if "r" in choices else 1,
        alpha=choices["lora_alpha"].value if "lora_alpha" in choices else 1.0,
        use_rslora=choices["use_rslora"].value if "use_rslora" in choices else False,
        mixture=model.experts > 0,
    )
    advised = learning_rate.choose_learning_rate(recipe.method, recipe.tune, setting, data.rows)
    choices["learning_rate"] = settle(recipe, "learning_rate", advised)
    rate = choices["learning_rate"].value
    if recipe.tune is not Tune.FULL:
        dropout = lora.choose_dropout(choices["num_train_epochs"].value, data.rows)
        choices["lora_dropout"] = settle(recipe, "lora_dropout", dropout)
    shape = settle(recipe, "lr_scheduler_type", schedule.choose_schedule(updates))
    beta1, beta2 = schedule.choose_betas(updates)
    evals = schedule.choose_eval_steps(updates, float(time.tokens), data.heldout_tokens, data.heldout_rows)
    for name, choice in {
        "lr_scheduler_type": shape,
        "warmup_steps": schedule.choose_warmup(updates, shape.value),
        "weight_decay": schedule.choose_weight_decay(rate, updates),
        "optim": schedule.choose_optimizer(trained),
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        "max_grad_norm": schedule.choose_clip(batch),
        "eval_steps": evals,
        "seed": schedule.choose_seed(),
    }.items():
        choices[name] = choice if name == "lr_scheduler_type" else settle(recipe, name, choice)
    _method_choices(choices, recipe, data)


def _method_choices(choices: dict[str, Choice], recipe: Recipe, data: DatasetFacts) -> None:
    """What only preference and reinforcement learning have."""
    if recipe.method is Method.SFT:
        return
    why = f"{recipe.method} on your {data.rows:,} rows: the usual strength in released recipes; no sweep settles it"
    choices["beta"] = settle(recipe, "beta", from_rule(rule(f"{recipe.method}_beta"), why))
    if recipe.method is Method.GRPO:
        why = f"answers to each of your {data.rows:,} prompts: fewer than 4 give a poor average to compare with"
        choices["num_generations"] = settle(recipe, "num_generations", from_rule(rule("grpo_num_generations"), why))
