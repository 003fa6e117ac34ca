"""From a recipe to a plan: read the model's facts, the data and the machine, and choose. No weights are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from welltuned.advice.plan import Plan, make_plan
from welltuned.data.audit import Audit, Severity, audit
from welltuned.data.conversation import Conversation, to_conversations
from welltuned.data.render import Example, LossOn, Rendering, render_all
from welltuned.data.source import read_rows
from welltuned.data.stream import split_held_out
from welltuned.data.templates import resolve_chat_template
from welltuned.errors import InputError
from welltuned.facts.data import dataset_facts
from welltuned.facts.machine import MachineFacts, read_machine_facts
from welltuned.facts.model import read_model_facts
from welltuned.recipe import Method, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SEED = 3407


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that training needs but the weights.

    Attributes:
        chat_template: the template that rows were rendered with, which inference must use too; None for plain text.
        held_out_prompts: conversations of the held-out rows, for replies before and after.
        notes: sentences about the data that the user should see.
    """

    recipe: Recipe
    plan: Plan
    tokenizer: "PreTrainedTokenizerBase"
    chat_template: str | None
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    held_out_conversations: tuple[Conversation, ...]
    audit: Audit
    notes: tuple[str, ...]


def prepare(recipe: Recipe, machine: MachineFacts | None = None) -> Prepared:
    """Read, render, audit and plan.

    Raises:
        InputError: anything in the recipe, the model's folder or the data that training could not use.
    """
    from welltuned.models.load import load_tokenizer

    if recipe.method is not Method.SFT:
        raise InputError(f"training by {recipe.method} is not built yet", where="method", mend="use sft")
    model_facts = read_model_facts(recipe.model)
    train, held_out, notes = _conversations(recipe)
    tokenizer = load_tokenizer(recipe.model)
    rendered, rendered_held = (_render(recipe, tokenizer, c, None) for c in (train, held_out))
    _check_vocabulary([*rendered.examples, *rendered_held.examples], model_facts.vocabulary)
    notes.append(f"Trained tokens are found from {rendered.mask_from}.")
    report = audit(rendered.examples, tokenizer, conversations=train, held_out=rendered_held.examples)
    errors = [p.sentence for p in report.problems() if p.severity is Severity.ERROR]
    if errors:
        raise InputError(errors[0], where=recipe.data)
    notes += [p.sentence for p in report.problems()]
    facts = dataset_facts(
        *_counts(rendered.examples),
        *_counts(rendered_held.examples),
        format_name=str(train[0].format),
        duplicates=len(report.duplicates),
        heldout_overlap=len(report.overlap),
    )
    plan = make_plan(recipe, model_facts, facts, machine or read_machine_facts(ask_gpu=True))
    longest = plan.value("max_length")
    if facts.length_max > longest:
        rendered = _render(recipe, tokenizer, train, longest)
        notes.append(f"{len(rendered.cut)} training rows are longer than max_length {longest} and were cut.")
    # Held-out rows are cut as the training rows are, or where the model itself ends.
    bound = "max_length" in recipe.hyperparameters or facts.length_max > longest
    most = longest if bound else model_facts.context_length
    if most is not None and any(len(e.ids) > most for e in rendered_held.examples):
        rendered_held = _render(recipe, tokenizer, held_out, most)
        notes.append(f"{len(rendered_held.cut)} held-out rows are longer than {most} tokens and were cut.")
    return Prepared(
        recipe=recipe,
        plan=plan,
        tokenizer=tokenizer,
        chat_template=resolve_chat_template(tokenizer, recipe.chat_template),
        train=tuple(rendered.examples),
        held_out=tuple(rendered_held.examples),
        held_out_conversations=tuple(held_out),
        audit=report,
        notes=tuple(notes),
    )


def _conversations(recipe: Recipe) -> tuple[list[Conversation], list[Conversation], list[str]]:
    found = to_conversations(read_rows(recipe.data, recipe.subset, recipe.split))
    notes = [found.detected.sentence()]
    if recipe.eval_data is not None:
        own = to_conversations(read_rows(recipe.eval_data))
        notes.append(f"Held out: the {len(own.items)} rows of {recipe.eval_data}.")
        return list(found.items), list(own.items), notes
    split = split_held_out(found.items, recipe.eval_fraction, recipe.hyperparameters.get("seed", DEFAULT_SEED))
    notes.append(split.sentence)
    return [found.items[i] for i in split.train], [found.items[i] for i in split.held_out], notes


def _render(
    recipe: Recipe, tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Conversation], max_length: int | None
) -> Rendering:
    loss_on = LossOn.ASSISTANT if recipe.hyperparameters.get("assistant_only_loss", True) else LossOn.EVERYTHING
    return render_all(
        rows,
        tokenizer,
        loss_on=loss_on,
        max_length=max_length,
        instruction_part=recipe.instruction_part,
        response_part=recipe.response_part,
        chat_template=recipe.chat_template,
    )


def _counts(examples: Sequence[Example]) -> tuple[list[int], list[int]]:
    return [len(e.ids) for e in examples], [int(e.mask[1:].sum()) for e in examples]


def _check_vocabulary(examples: Sequence[Example], embedding: int) -> None:
    """By the tokens that the rows use: Gemma 3 1B's own tokenizer has one more than its embedding, an image's."""
    for example in examples:
        if int(example.ids.max()) >= embedding:
            what = f"the row has token {int(example.ids.max())}, and the model's embedding ends with {embedding - 1}"
            raise InputError(what, where=example.origin, mend="use the tokenizer that belongs to the model")
