"""From a recipe to a plan: read the model's facts, the data and the machine, and choose. No weights are loaded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from welltuned.advice.plan import Plan, make_plan, with_problems
from welltuned.data.audit import Audit
from welltuned.data.build import RowsRead, unwatched
from welltuned.data.conversation import Conversation
from welltuned.data.dataset import Dataset, Sources, open_sources, read_dataset
from welltuned.data.mix import Mixture
from welltuned.errors import InputError
from welltuned.facts.adapter import read_adapter_facts
from welltuned.facts.data import facts_of
from welltuned.facts.machine import MachineFacts, read_machine_facts
from welltuned.facts.model import ModelFacts, read_model_facts
from welltuned.recipe import Method, Recipe, Tune
from welltuned.training.speed import known_speed
from welltuned.training.start_adapter import StartAdapter, start_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from welltuned.objectives.rewards import Reward

TRUSTED = 95  # weight among the plan's warnings of what the user trusts others with
PLAIN_PARTS = 12  # weight among the plan's warnings of a part that runs on the model's own code: it costs time only


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that training needs but the weights.

    Attributes:
        chat_template: the template that rows were rendered with, which inference must use too; None for plain text.
        train: all training rows, read when they are asked for; `mixture` says which of them make an update.
        held_out_conversations: those of the held-out rows, for replies before and after; read when asked for.
        rewards: what rewards sampled answers (grpo, whose rows are prompts; other methods' are examples).
        notes: sentences about the data that the user should see; those that warn are among the plan's warnings too.
        data_digests: of the content of each dataset, by its name.
    """

    recipe: Recipe
    plan: Plan
    tokenizer: "PreTrainedTokenizerBase"
    chat_template: str | None
    train: Sequence[Any]
    held_out: Sequence[Any]
    held_out_conversations: Sequence[Conversation]
    mixture: Mixture
    audit: Audit
    notes: tuple[str, ...]
    data_digests: Mapping[str, str] = field(default_factory=dict)
    rewards: tuple["Reward", ...] = ()


def prepare(
    recipe: Recipe,
    machine: MachineFacts | None = None,
    progress: RowsRead = unwatched,
    *,
    planned: Plan | None = None,
    weights_needed: bool = True,
) -> Prepared:
    """Read, render, audit and plan.

    Args:
        progress: told of the rows as they are rendered.
        planned: the plan of a run that goes on, which is kept as it is: today's memory would give another.
        weights_needed: without it a folder with a configuration and a tokenizer will do.

    Raises:
        InputError: anything in the recipe, the model's folder or the data that training could not use.
    """
    from welltuned.models.tokenizer import load_tokenizer

    if recipe.method is Method.GRPO:
        from welltuned.training.grpo_prepare import prepare_grpo

        return prepare_grpo(recipe, machine, planned=planned, weights_needed=weights_needed)
    start = start_adapter(recipe)
    model_facts = read_model_facts(recipe.model, weights_needed=weights_needed, trust=recipe.trust)
    sources = open_sources(recipe)
    tokenizer = load_tokenizer(recipe.model, recipe.trust)
    dataset = read_dataset(recipe, tokenizer, sources=sources, embedding=model_facts.vocabulary, progress=progress)
    machine = machine or (planned.facts.machine if planned is not None else read_machine_facts(ask_gpu=True))
    plan, dataset = _planned(recipe, dataset, model_facts, machine)
    recipe = replace(recipe, tune=plan.recipe.tune)  # the advice may have taken 4-bit weights, where nobody chose
    require_sound(recipe, plan.value)
    report = dataset.audit(model_facts.context_length)
    problems = report.problems()
    weighed = [(problem.weight, problem.sentence) for problem in problems]
    weighed += others_parts(recipe, plan)
    started = (start.note,) if start is not None and start.note is not None else ()
    plan = planned or with_problems(plan, weighed)
    return Prepared(
        recipe=recipe,
        plan=plan,
        tokenizer=tokenizer,
        chat_template=dataset.chat_template,
        train=dataset.train,
        held_out=dataset.held_out,
        held_out_conversations=dataset.held_out_conversations(),
        mixture=replace(dataset.mixture, seed=plan.value("seed")),
        audit=report,
        notes=(*trusted(recipe), *dataset.notes, *started, *(problem.sentence for problem in problems)),
        data_digests=digests_of(sources, start),
    )


def require_sound(recipe: Recipe, chosen: Callable[[str], Any]) -> None:
    """Refuse settings under which a preference method is not defined; `chosen` gives the plan's values."""
    if recipe.method in (Method.DPO, Method.ORPO, Method.KTO) and not chosen("beta") > 0:
        raise InputError(f"a beta of 0 leaves {recipe.method} nothing to learn", where="beta", mend="give one above 0")
    if recipe.method is Method.KTO and chosen("effective_batch_size") < 2:
        what = "kto compares with answers to the update's other prompts, and an update of one row has none"
        raise InputError(what, where="effective_batch_size", mend="give 2 or more")


def others_parts(recipe: Recipe, plan: Plan) -> list[tuple[float, str]]:
    """What of the model is not ours to run, weighed for the warnings: parts on its own code, code that is trusted."""
    from welltuned.models.foresee import foresee

    told: list[tuple[float, str]] = [(TRUSTED, sentence) for sentence in trusted(recipe)]
    if recipe.trust.code:  # code of others is not run for a forecast
        return told
    left = foresee(recipe.model, targets_of(plan), nf4=recipe.tune is Tune.QLORA, trust=recipe.trust)
    if "use_dora" in plan.choices and plan.value("use_dora") and plan.facts.model.gated_mlp:
        left = (*left, "gated MLPs whose rows DoRA scales left on the model's own code: slower")
    return told + [(PLAIN_PARTS, sentence) for sentence in left]


def digests_of(sources: Sources, start: StartAdapter | None) -> dict[str, str]:
    """Of what a run reads: each dataset, and the adapter that it goes on from."""
    digests = {source.name: source.fingerprint() for source in (*sources.train, *sources.held_out)}
    return digests if start is None else {**digests, "the adapter to go on from": start.digest}


def trusted(recipe: Recipe) -> list[str]:
    """What the user allowed, said every time."""
    found = []
    if recipe.trust.code:
        found.append(f"trust_remote_code: Python code of {recipe.model} runs with all of your rights")
    if recipe.trust.pickle:
        found.append(f"allow_pickle: {recipe.model} may be read from .bin files, which are pickles")
    return found


def targets_of(plan: Plan) -> str | tuple[str, ...] | None:
    """What will get adapters; None where all of the model is trained."""
    if plan.recipe.tune is Tune.FULL:
        return None
    wanted = plan.value("target_modules")
    return wanted if isinstance(wanted, str) else tuple(wanted)


def _planned(recipe: Recipe, dataset: Dataset, model: ModelFacts, machine: MachineFacts) -> tuple[Plan, Dataset]:
    """The plan, and the data within its max_length. Rows left out for their length make it another plan."""
    adapter = None if recipe.adapter is None else read_adapter_facts(recipe.adapter)
    while True:
        facts = facts_of(dataset)
        plan = make_plan(recipe, model, facts, machine, adapter=adapter)
        speed = known_speed(plan)
        plan = plan if speed is None else make_plan(recipe, model, facts, machine, speed, adapter)
        longest = plan.value("max_length")
        within = dataset.within(longest)
        if len(within.train) == len(dataset.train):
            # Held-out rows are cut as the training rows are, or where the model itself ends.
            bound = "max_length" in recipe.hyperparameters or facts.length_max > longest or within.in_pieces
            return plan, within.held_out_within(longest if bound else model.context_length)
        dataset = within
