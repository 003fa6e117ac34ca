"""What a model's numbers are, in a hash: the same base gives the same one, wherever its files lie."""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from welltuned.models.experts import NF4Experts
from welltuned.models.frozen import NF4Linear
from welltuned.models.reward import SCORE


def hash_base(model: PreTrainedModel) -> str:
    """sha256 of a model's numbers without its adapters and without a scalar head, and of the type it computes in."""
    found = hashlib.sha256(str(model.dtype).encode())
    for name, tensor in _tensors(model):
        plain = f".{name}".replace(".base.", ".")
        if ".lora_" not in plain and not plain.startswith(f".{SCORE}."):
            _add(found, plain, tensor)
    return found.hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors with their names, in the order of the names."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        _add(found, name, tensor)
    return found.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and what is kept in 4 bits as the numbers that it stands for."""
    yield from model.named_parameters()
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            yield name, module.frozen.dense(torch.float32)
        elif isinstance(module, NF4Experts):
            for leaf, stack in module.frozen.items():
                yield from ((f"{name}.{leaf}.{i}", w.dense(torch.float32)) for i, w in enumerate(stack.weights))


def _add(found: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    plain = tensor.detach().cpu().contiguous()
    found.update(f"{name} {tuple(plain.shape)} {plain.dtype}\n".encode())
    found.update(plain.view(-1).view(torch.uint8).numpy().data)
