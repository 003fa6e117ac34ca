"""Parts of a model that text never reaches: towers for images or sound, and what joins them to the language model."""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from welltuned.errors import InputError


@torch.no_grad()
def idle_parts(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the large parts of which no module runs when the model reads text; found by letting it read some.

    Only whole parts count: the children of the model and of its base model that have modules of their own. An expert
    that these few tokens were not sent to is not idle.
    """
    reached: set[str] = set()
    handles = [
        module.register_forward_pre_hook(partial(_note, reached, name)) for name, module in model.named_modules()
    ]
    try:
        model(input_ids=torch.arange(1, 5, device=model.device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    base = next(name for name, module in model.named_modules() if module is model.base_model)
    children = [*model.named_children(), *((f"{base}.{n}", m) for n, m in model.base_model.named_children() if base)]
    return tuple(
        name for name, part in children if _is_large(part) and not any(within(other, (name,)) for other in reached)
    )


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder layers in order; [] where it keeps them otherwise than in a list."""
    count = model.config.num_hidden_layers
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return list(next(lists, ()))


def require_layers(model: PreTrainedModel, where: str) -> list[nn.Module]:
    """The same for a key, `where`, that needs them.

    Raises:
        InputError: there is no such list.
    """
    found = decoder_layers(model)
    if not found:
        mend = f"leave {where} out, or set it to false or none"
        raise InputError("no list of decoder layers was found", where=where, mend=mend)
    return found


def _note(reached: set[str], name: str, *_: Any) -> None:
    reached.add(name)


def _is_large(part: nn.Module) -> bool:
    return bool(part._modules) and any(True for _ in part.parameters())


def within(name: str, parts: tuple[str, ...]) -> bool:
    """Whether the module or parameter of this name belongs to one of the parts."""
    return any(name == part or name.startswith(part + ".") for part in parts)
