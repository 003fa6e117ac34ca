"""A safetensors file that is written piece by piece."""

import json
import struct
from collections.abc import Mapping

import torch
from torch import Tensor

_DTYPES = {torch.float32: "F32", torch.uint8: "U8"}


def header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """What a file begins with that holds tensors of these number formats and shapes, one after the other."""
    found, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        found[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(found).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def data(tensor: Tensor) -> memoryview:
    """The bytes of one of them."""
    return tensor.detach().cpu().contiguous().view(-1).numpy().data.cast("B")
