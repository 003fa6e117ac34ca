"""Which modules an adapter stands on, by the names that a user gives."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from torch import nn
from transformers import PreTrainedModel

from welltuned.errors import InputError
from welltuned.models.experts import expert_stacks, has_stacks
from welltuned.models.frozen import LEFT_ALONE, is_projection
from welltuned.models.lora_settings import ALL_LINEAR

_LAYER = re.compile(r"\.(\d+)\.")


def linear_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear projection of the trunk by name; neither the head nor routers."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if is_projection(module) and module is not head and name.rsplit(".", 1)[-1] not in LEFT_ALONE
    }


def find_targets(model: PreTrainedModel, wanted: str | tuple[str, ...], layers: tuple[int, ...] = ()) -> list[str]:
    """Names of what to adapt, in the model's order. A wanted name or layer that matches nothing is an error.

    Args:
        layers: numbers of the decoder layers to stay within; () for all that is named.
    """
    named = _named(model, wanted)
    numbers = {name: int(found[1]) for name in named if (found := _LAYER.search(name))}
    for layer in layers:
        if layer not in numbers.values():
            there = f"the targets lie in layers 0 to {max(numbers.values(), default=0)}"
            raise InputError(f"there is nothing to adapt in layer {layer}", where="layers_to_transform", mend=there)
    return [name for name in named if not layers or numbers.get(name) in layers]


def _named(model: PreTrainedModel, wanted: str | tuple[str, ...]) -> list[str]:
    linears = linear_modules(model)
    if wanted == ALL_LINEAR:
        return list(linears)
    endings = (wanted,) if isinstance(wanted, str) else wanted
    stacks = expert_stacks(model)
    found: set[str] = set()
    for ending in endings:
        matches = {name for name in linears if ending == ALL_LINEAR or _ends(name, ending)}
        matches |= {name for name in stacks if _means_stack(name, ending)}
        if not matches:
            raise _no_match(model, ending, linears, stacks)
        found |= matches
    return [name for name in (*linears, *stacks) if name in found]


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _means_stack(name: str, ending: str) -> bool:
    """By its module ("experts") or with it ("experts.down_proj"): "down_proj" alone is a dense layer's name."""
    return _ends(name.rpartition(".")[0], ending) or ("." in ending and _ends(name, ending))


def _no_match(model: PreTrainedModel, ending: str, linears: Iterable[str], stacks: Iterable[str]) -> InputError:
    for name, module in model.named_modules():
        if has_stacks(module) and not any(stack.startswith(f"{name}.") for stack in stacks) and _ends(name, ending):
            what = f"{name} keeps its experts in a way that no adapter of ours can stand on"
            return InputError(what, where="target_modules", mend=f"leave {ending!r} out")
    known = {name.rsplit(".", 1)[-1] for name in linears} | {".".join(name.rsplit(".", 2)[-2:]) for name in stacks}
    near = [name for name in known if _ends(name, ending)] or get_close_matches(ending, sorted(known), 1)
    hint = f"did you mean {near[0]!r}?" if near else f"this model has {', '.join(sorted(known))}"
    return InputError(f"{ending!r} matches no linear layer of the model", where="target_modules", mend=hint)
