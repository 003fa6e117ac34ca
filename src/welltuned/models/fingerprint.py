"""What a base model's weights were, in a few bytes a tensor: another model's, or changed ones, are told from them."""

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from welltuned.models.experts import LoraExperts, NF4Experts
from welltuned.models.frozen import NF4Linear
from welltuned.models.lora import LoraLinear

_NOT_THE_BASE: tuple[type[nn.Module], ...] = (LoraLinear, LoraExperts, NF4Linear, NF4Experts)
_SAMPLES = 4096  # numbers of a tensor that are looked at, evenly spread


def fingerprint(model: PreTrainedModel, trained: Collection[str] = ()) -> dict[str, str]:
    """A digest of each of the model's own weights, by name; of adapters, 4-bit weights and what `trained` names none.

    Numbers are rounded to bfloat16 first, so that it does not depend on the format in which the model was loaded.
    """
    found: dict[str, str] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        plain = name.replace(".base", "") if name.endswith(".base") else name
        if isinstance(module, _NOT_THE_BASE):
            continue
        for leaf, parameter in module._parameters.items():
            full = f"{plain}.{leaf}" if plain else leaf
            if parameter is None or full in trained or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            found[full] = digest(parameter)
    return found


@torch.no_grad()
def digest(tensor: Tensor) -> str:
    """Of the shape and of evenly spread numbers."""
    flat = tensor.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).round().long()
    taken = flat[index.to(flat.device)].to(torch.bfloat16).cpu().contiguous().view(torch.uint8)
    return hashlib.blake2b(str(tuple(tensor.shape)).encode() + taken.numpy().tobytes(), digest_size=8).hexdigest()
