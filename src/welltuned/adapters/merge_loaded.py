"""Merging in memory, for bases that cannot be merged from file to file: GGUF, experts, GPT-2, trained biases."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from welltuned.kernels.grouped import NF4Stack
from welltuned.models.adapter_file import load_adapter
from welltuned.models.experts import LoraExperts, NF4Experts
from welltuned.models.frozen import NF4Linear, frozen_weight
from welltuned.models.load import load_model
from welltuned.models.lora import AdapterBank, LoraLinear


@torch.no_grad()
def merge_loaded(
    base: str, adapter: Path, folder: Path, *, dtype: torch.dtype, nf4: bool, trained_dtype: torch.dtype
) -> None:
    """Load the base once, add the adapter to one weight after the other, and save.

    Args:
        nf4: quantise the base as it was for training, and merge into what that stands for.
    """
    model = load_model(base, dtype=trained_dtype if nf4 else dtype, nf4=nf4)
    bank = load_adapter(model, adapter)
    for name, module in bank.modules.items():
        plain = (
            _merged_linear(module, dtype) if isinstance(module, LoraLinear) else _merged_experts(module, bank, dtype)
        )
        _put(model, name, plain)
    for name, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            _put(model, name, _linear(module.frozen.dense(dtype), module._parameters["bias"], dtype))
        elif isinstance(module, NF4Experts):
            _put(model, name, _dense_experts(module, dtype))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).clone()  # trained biases are views of the adapters' buffer
        parameter.requires_grad_(False)
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size="2GB")


def _put(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent).register_module(leaf, module)


def _merged_linear(module: LoraLinear, dtype: torch.dtype) -> nn.Module:
    scale = float(module.projection.scale_K[0])
    weight = frozen_weight(module.base).dense(torch.float32)
    weight = weight + scale * (module.lora_B[0].float() @ module.lora_A[0].float())
    if module.magnitude_KO is not None:
        weight *= (module.magnitude_KO[0].float() / weight.norm(dim=1))[:, None]
    if isinstance(module.base, NF4Linear):
        return _linear(weight, module.base._parameters.get("bias"), dtype)
    stored = weight.t() if isinstance(module.base, Conv1D) else weight
    module.base.get_parameter("weight").data = stored.to(dtype).contiguous()
    return module.base


def _linear(weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    outputs, inputs = weight_OI.shape
    with torch.device("meta"):
        linear = nn.Linear(inputs, outputs, bias=bias_O is not None)
    linear.weight = nn.Parameter(weight_OI.to(dtype).contiguous(), requires_grad=False)
    if bias_O is not None:
        linear.bias = nn.Parameter(bias_O.detach().to(dtype), requires_grad=False)
    return linear


def _merged_experts(module: LoraExperts, bank: AdapterBank, dtype: torch.dtype) -> nn.Module:
    base = _dense_experts(module.base, dtype) if isinstance(module.base, NF4Experts) else module.base
    for leaf in module.adapted:
        a_ERI, b_EOR = (module.get_parameter(f"{leaf}_lora_{x}")[0].float() for x in "AB")
        added = module.scale_K[0] * (b_EOR @ a_ERI)
        parameter = base.get_parameter(leaf)
        parameter.data = (parameter.data.float() + (added.mT if module.layout.transposed else added)).to(dtype)
    return base


def _dense_experts(module: NF4Experts, dtype: torch.dtype) -> nn.Module:
    for leaf in module.layout.stacks:
        frozen: NF4Stack = module.frozen[leaf]
        w_EOI = torch.stack([weight.dense(dtype) for weight in frozen.weights])
        stored = w_EOI.mT.contiguous() if module.layout.transposed else w_EOI
        module.base._parameters[leaf] = nn.Parameter(stored, requires_grad=False)
    return module.base
