"""Modules that are trained whole beside adapters: PEFT's `modules_to_save`, for embeddings and heads."""

import torch
from transformers import PreTrainedModel

from welltuned.errors import InputError
from welltuned.models.targets import linear_modules


def named_modules(model: PreTrainedModel, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Full names of the modules that these names end with; of a tied pair the first, which is trained for both.

    Raises:
        InputError: a name means no module of its own, one that adapters may stand on, or one in half precision.
    """
    found: dict[int, str] = {}
    for name in wanted:
        matches = [full for full, _ in model.named_modules() if full == name or full.endswith("." + name)]
        if len(matches) != 1 or matches[0] in linear_modules(model):
            what = f"{name!r} names {len(matches)} modules" if len(matches) != 1 else f"{name!r} takes adapters"
            raise InputError(what, where="modules_to_save", mend="name the embedding (embed_tokens) or head (lm_head)")
        matches = [_first_of_tied(model, matches[0])]
        module = model.get_submodule(matches[0])
        parameters = list(module.parameters())
        if not parameters:
            raise InputError(f"{name!r} has nothing to train", where="modules_to_save")
        if parameters[0].dtype in (torch.bfloat16, torch.float16):
            what, mend = f"{name!r} would be trained in half precision", "use dtype: float32"
            raise InputError(what, where="modules_to_save", mend=mend)
        found.setdefault(id(parameters[0]), matches[0])
    return tuple(found.values())


def _first_of_tied(model: PreTrainedModel, name: str) -> str:
    """The embedding's name for a head that shares its weight: torch lists the parameter there."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or model.get_submodule(name) is not head or head.weight is not embedding.weight:
        return name
    return next(full for full, module in model.named_modules() if module is embedding)


def tied_names(model: PreTrainedModel, saved: tuple[str, ...]) -> dict[str, str]:
    """By name, every other module whose weight is a saved one's: {"lm_head": "model.embed_tokens"}."""
    ends = {id(m): name for name, m in model.named_modules()}
    both = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    found = {}
    for name in saved:
        weight = model.get_submodule(name)._parameters.get("weight")
        for module in both:
            other = ends[id(module)]
            if other != name and weight is not None and module._parameters.get("weight") is weight:
                found[other] = name
    return found
