"""A base larger than one device: loaded on the host, cut layer by layer, so that no device ever holds all of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from welltuned.advice.plan import Plan
from welltuned.errors import InputError
from welltuned.facts.weights import safetensors_headers
from welltuned.models.fingerprint import fingerprint
from welltuned.models.load import load_model, load_skeleton
from welltuned.models.lora import AdapterBank
from welltuned.models.parts import idle_parts
from welltuned.models.resolve import resolve
from welltuned.recipe import FULL_SHARD, Method, Recipe, Tune
from welltuned.training.ranks import Group, Ranks
from welltuned.training.shards import Shards
from welltuned.training.starting import DTYPES, trained_parts
from welltuned.training.step import Trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def lies_in_pieces(plan: Plan, ranks: Ranks) -> bool:
    """Whether each rank holds only a part of the model: what the plan says, where there are several of them."""
    return not ranks.alone and "fsdp" in plan.choices and plan.value("fsdp") == FULL_SHARD


@dataclass(frozen=True, slots=True)
class Cut:
    """A model in pieces, and what is trained of it. `idle` are parts that text never reaches."""

    trained: Trained
    idle: tuple[str, ...]
    shards: Shards


def load_in_pieces(plan: Plan, ranks: Ranks, device: torch.device) -> Cut:
    """Load the model on the host, put adapters on it (or free all of it), and cut it.

    Raises:
        InputError: what this plan trains cannot be trained in pieces; and what loading raises, on all ranks.
    """
    from welltuned.models.sharded import ShardedParameters, cut_adapted

    assert isinstance(ranks, Group)
    recipe = plan.recipe
    require_cuttable(recipe)
    dtype = DTYPES[plan.value("dtype")] if recipe.tune is not Tune.FULL else stored_dtype(recipe.model)
    model = ranks.each(lambda: load_model(recipe.model, dtype=dtype, trust=recipe.trust))
    idle = ranks.each(lambda: _idle(recipe, model))
    if recipe.tune is Tune.FULL:
        pieces = ShardedParameters(model, device, frozen=idle)
        return Cut(pieces, idle, Shards(root=pieces.root, ranks=ranks, base_weights={}))
    bank = ranks.each(lambda: trained_parts(model, plan, idle, device=device))
    assert isinstance(bank, AdapterBank)
    weights = fingerprint(model, [slot.name for slot in bank.slots]) if ranks.is_first else {}
    return Cut(bank, idle, Shards(root=cut_adapted(bank, device), ranks=ranks, base_weights=weights))


def require_cuttable(recipe: Recipe) -> None:
    """Refuse what is not trained in pieces."""
    if recipe.hyperparameters.get("torch_compile"):
        what = "the model does not fit whole into each process, and in pieces its layers are not compiled"
        raise InputError(what, where="torch_compile", mend="remove it")
    if recipe.method is not Method.SFT:
        what = f"method {recipe.method} asks more of a model than passes, and in pieces it can make nothing else"
        raise InputError(what, where="fsdp", mend="use fsdp: none; tune: qlora needs a quarter of the memory")


def stored_dtype(model: str) -> torch.dtype:
    """The number format of all of a folder's weights, so that they need not be widened here; float32 if they differ."""
    source = resolve(model)
    if source.path is None or not source.path.is_dir():
        return torch.float32
    kinds = {tensor.dtype for tensor in safetensors_headers(source.path)}
    return torch.bfloat16 if kinds == {"BF16"} else torch.float32


def _idle(recipe: Recipe, model: "PreTrainedModel") -> tuple[str, ...]:
    """Found on a model without numbers; where what it does next depends on them, on the host."""
    try:
        return idle_parts(load_skeleton(recipe.model, recipe.trust))
    except (RuntimeError, NotImplementedError, InputError):
        return idle_parts(model)
