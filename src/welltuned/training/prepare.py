"""From a recipe to a plan: read the model's facts, the data and the machine, and choose. No weights are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from welltuned.advice.plan import Plan, make_plan, with_problems
from welltuned.data.audit import Audit
from welltuned.data.build import RowsRead, unwatched
from welltuned.data.conversation import Conversation
from welltuned.data.dataset import Dataset, open_sources, read_dataset
from welltuned.data.mix import Mixture
from welltuned.data.render import Example
from welltuned.errors import InputError
from welltuned.facts.data import facts_of
from welltuned.facts.machine import MachineFacts, read_machine_facts
from welltuned.facts.model import ModelFacts, read_model_facts
from welltuned.recipe import Method, Recipe, Tune

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_PARTS = 12  # weight among the plan's warnings of a part that runs on the model's own code: it costs time only


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that training needs but the weights.

    Attributes:
        chat_template: the template that rows were rendered with, which inference must use too; None for plain text.
        train: all training rows, read when they are asked for; `mixture` says which of them make an update.
        held_out_conversations: those of the held-out rows, for replies before and after; read when asked for.
        notes: sentences about the data that the user should see; those that warn are among the plan's warnings too.
    """

    recipe: Recipe
    plan: Plan
    tokenizer: "PreTrainedTokenizerBase"
    chat_template: str | None
    train: Sequence[Example]
    held_out: Sequence[Example]
    held_out_conversations: Sequence[Conversation]
    mixture: Mixture
    audit: Audit
    notes: tuple[str, ...]


def prepare(recipe: Recipe, machine: MachineFacts | None = None, progress: RowsRead = unwatched) -> Prepared:
    """Read, render, audit and plan; `progress` is told of the rows as they are rendered.

    Raises:
        InputError: anything in the recipe, the model's folder or the data that training could not use.
    """
    from welltuned.models.foresee import foresee
    from welltuned.models.load import load_tokenizer

    if recipe.method is not Method.SFT:
        raise InputError(f"training by {recipe.method} is not built yet", where="method", mend="use sft")
    model_facts = read_model_facts(recipe.model)
    sources = open_sources(recipe)
    tokenizer = load_tokenizer(recipe.model)
    dataset = read_dataset(recipe, tokenizer, sources=sources, embedding=model_facts.vocabulary, progress=progress)
    plan, dataset = _planned(recipe, dataset, model_facts, machine or read_machine_facts(ask_gpu=True))
    report = dataset.audit(model_facts.context_length)
    problems = report.problems()
    weighed = [(problem.weight, problem.sentence) for problem in problems]
    left = foresee(recipe.model, _targets(plan), nf4=recipe.tune is Tune.QLORA)
    weighed += [(PLAIN_PARTS, sentence) for sentence in left]
    return Prepared(
        recipe=recipe,
        plan=with_problems(plan, weighed),
        tokenizer=tokenizer,
        chat_template=dataset.chat_template,
        train=dataset.train,
        held_out=dataset.held_out,
        held_out_conversations=dataset.held_out_conversations(),
        mixture=replace(dataset.mixture, seed=plan.value("seed")),
        audit=report,
        notes=(*dataset.notes, *(problem.sentence for problem in problems)),
    )


def _targets(plan: Plan) -> str | tuple[str, ...] | None:
    """What will get adapters; None where all of the model is trained."""
    if plan.recipe.tune is Tune.FULL:
        return None
    wanted = plan.value("target_modules")
    return wanted if isinstance(wanted, str) else tuple(wanted)


def _planned(recipe: Recipe, dataset: Dataset, model: ModelFacts, machine: MachineFacts) -> tuple[Plan, Dataset]:
    """The plan, and the data within its max_length. Rows left out for their length make it another plan."""
    while True:
        facts = facts_of(dataset)
        plan = make_plan(recipe, model, facts, machine)
        longest = plan.value("max_length")
        within = dataset.within(longest)
        if len(within.train) == len(dataset.train):
            # Held-out rows are cut as the training rows are, or where the model itself ends.
            bound = "max_length" in recipe.hyperparameters or facts.length_max > longest
            return plan, within.held_out_within(longest if bound else model.context_length)
        dataset = within
