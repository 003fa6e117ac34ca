"""From a recipe to a plan for `method: grpo`: prompts, rewards and the plan. No weights are loaded."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from welltuned.advice.plan import Plan, make_plan, with_problems
from welltuned.data.dataset import open_sources
from welltuned.data.prompts import GroupMixture, Prompt, Prompts, read_prompts
from welltuned.errors import InputError
from welltuned.facts.adapter import read_adapter_facts
from welltuned.facts.data import DatasetFacts, prompt_facts
from welltuned.facts.machine import MachineFacts, read_machine_facts
from welltuned.facts.model import ModelFacts, read_model_facts
from welltuned.objectives.rewards import Reward, load_rewards, require_columns
from welltuned.objectives.rewards.answers import final_number
from welltuned.recipe import Recipe
from welltuned.training.prepare import Prepared, digests_of, others_parts, trusted
from welltuned.training.speed import known_speed
from welltuned.training.start_adapter import start_adapter

SHOWN = 3  # rows named in a note


def prepare_grpo(
    recipe: Recipe, machine: MachineFacts | None = None, *, planned: Plan | None = None, weights_needed: bool = True
) -> Prepared:
    """Find the rewards, read and render the prompts, and plan; `planned` and `weights_needed` as in `prepare`.

    Raises:
        InputError: anything in the recipe, the rewards, the model's folder or the data that training could not use.
    """
    from welltuned.models.tokenizer import load_tokenizer

    rewards = load_rewards(recipe.rewards or (), recipe.reward_weights)
    start = start_adapter(recipe)
    model = read_model_facts(recipe.model, weights_needed=weights_needed, trust=recipe.trust)
    sources = open_sources(recipe)
    tokenizer = load_tokenizer(recipe.model, recipe.trust)
    prompts = read_prompts(recipe, tokenizer, sources)
    _check_vocabulary(prompts, model.vocabulary)
    require_columns(rewards, prompts.columns)
    notes = _answer_notes(rewards, (*prompts.train, *prompts.held_out))
    machine = machine or (planned.facts.machine if planned is not None else read_machine_facts(ask_gpu=True))
    plan, prompts = _planned(recipe, prompts, model, machine)
    recipe = replace(recipe, tune=plan.recipe.tune)  # the advice may have taken 4-bit weights, where nobody chose
    report = prompts.audit()
    problems = report.problems()
    weighed = [(problem.weight, problem.sentence) for problem in problems]
    weighed += others_parts(recipe, plan)
    started = (start.note,) if start is not None and start.note is not None else ()
    plan = planned or with_problems(plan, weighed)
    return Prepared(
        recipe=recipe,
        plan=plan,
        tokenizer=tokenizer,
        chat_template=prompts.chat_template,
        train=prompts.train,
        held_out=prompts.held_out,
        held_out_conversations=(),
        mixture=grouped(prompts, plan),
        audit=report,
        notes=(*trusted(recipe), *prompts.notes, *notes, *started, *(problem.sentence for problem in problems)),
        rewards=rewards,
        data_digests={**digests_of(sources, start), **_code(rewards)},
    )


def grouped(prompts: Prompts, plan: Plan) -> GroupMixture:
    """Which prompts make an update, which the plan counts in completions."""
    mixed = prompts.mixture
    return GroupMixture(
        mixed.rows, mixed.quotas, plan.value("seed"), plan.value("num_generations"), plan.value("num_iterations")
    )


def _planned(recipe: Recipe, prompts: Prompts, model: ModelFacts, machine: MachineFacts) -> tuple[Plan, Prompts]:
    """The plan, and the prompts that leave room for a completion. Those left out make it another plan."""
    adapter = None if recipe.adapter is None else read_adapter_facts(recipe.adapter)
    while True:
        facts = _facts(prompts)
        plan = make_plan(recipe, model, facts, machine, adapter=adapter)
        speed = known_speed(plan)
        plan = plan if speed is None else make_plan(recipe, model, facts, machine, speed, adapter)
        completion = plan.value("max_completion_length")
        limits = [
            (model.context_length, "the model's context"),
            (recipe.hyperparameters.get("max_length"), "max_length"),
        ]
        known = [(limit, name) for limit, name in limits if limit is not None]
        if not known:
            return plan, prompts
        limit, name = min(known)
        room = f"{name} of {limit:,} less max_completion_length {completion:,}"
        within = prompts.within(limit - completion, room)
        if within is prompts:
            return plan, prompts
        prompts = within


def _facts(prompts: Prompts) -> DatasetFacts:
    def lengths(rows: Sequence[Prompt]) -> list[int]:
        return [len(row.ids) for row in rows]

    answers = [row.answer_tokens for row in prompts.train if row.answer_tokens]
    return prompt_facts(lengths(prompts.train), lengths(prompts.held_out), prompts.formats, answers or None)


def _check_vocabulary(prompts: Prompts, embedding: int | None) -> None:
    for row in (*prompts.train, *prompts.held_out):
        if embedding is not None and int(row.ids.max()) >= embedding:
            what = f"the row has token {int(row.ids.max())}, and the model's embedding ends with {embedding - 1}"
            raise InputError(what, where=row.origin, mend="use the tokenizer that belongs to the model")


def _answer_notes(rewards: Sequence[Reward], rows: Sequence[Prompt]) -> list[str]:
    """Sentences on rows that a comparing reward cannot judge, or only ever as wrong.

    Raises:
        InputError: no row has an answer, or none has a number.
    """
    comparing = [reward for reward in rewards if reward.needs_answer]
    if not comparing:
        return []
    without = [row for row in rows if row.answer is None]
    if len(without) == len(rows):
        what = f"the reward {comparing[0].name} compares with the row's answer, and no row has one"
        mend = "name its column with `--map answer=COLUMN`, or use a reward that needs none"
        raise InputError(what, where=rows[0].origin, mend=mend)
    notes = [f"{_named(without)} have no answer: {comparing[0].name} does not apply to them"] if without else []
    if any(reward.name.startswith("numeric") for reward in comparing):
        wordy = [row for row in rows if row.answer is not None and final_number(row.answer) is None]
        if len(wordy) + len(without) == len(rows):
            raise InputError("the reward numeric finds no number in any row's answer", where=wordy[0].origin)
        if wordy:
            notes.append(f"the answers of {_named(wordy)} hold no number: numeric gives every completion 0 there")
    return notes


def _named(rows: Sequence[Prompt]) -> str:
    more = ", …" if len(rows) > SHOWN else ""
    return f"{len(rows):,} rows ({', '.join(row.origin for row in rows[:SHOWN])}{more})"


def _code(rewards: Sequence[Reward]) -> dict[str, str]:
    """A digest of each file of rewards: other rewards make another run."""
    files = {reward.where for reward in rewards if reward.where}
    return {file: hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest() for file in sorted(files)}
