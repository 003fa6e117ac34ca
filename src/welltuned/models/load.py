"""Load a causal language model from a hub id, a folder or a GGUF file.

For 4 bits each weight is quantised on its device as it is read, by transformers' own hook for quantisers, so that no
more than one is ever dense. GGUF files have a quantiser of their own there: those are read whole and quantised after.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from welltuned.errors import InputError
from welltuned.kernels.grouped import NF4Stack
from welltuned.kernels.nf4 import NF4Weight
from welltuned.models.experts import expert_stacks, layout_of, quantize_experts, quantize_stack
from welltuned.models.frozen import quantisable, quantize_linears
from welltuned.models.resolve import NO_TRUST, SourceKind, resolve
from welltuned.models.tokenizer import MEND_HUB, arguments_of, in_short, refuse_code
from welltuned.models.tokenizer import load_tokenizer as load_tokenizer
from welltuned.recipe import Trust

# Whatever transformers raises while it reads a model's files (nearly every type of exception, by which field of
# config.json is wrong) is about those files: hence the two `except Exception` below. --debug shows the traceback.


def load_config(model: str, trust: Trust = NO_TRUST) -> PretrainedConfig:
    """The model's configuration, without its weights (which need not be there)."""
    source = resolve(model, weights_needed=False, trust=trust)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(**arguments_of(source, trust))
    except Exception as error:
        refuse_code(error, model)
        what = f"the model's configuration could not be read ({in_short(error)})"
        raise InputError(what, where=model, mend=MEND_HUB) from error
    _refuse_kernels(config, model)
    return config


def _refuse_kernels(config: PretrainedConfig, model: str) -> None:
    """A configuration may name a hub repository as its attention, whose code transformers would fetch and run."""
    for part in (config, config.get_text_config()):
        name = part._attn_implementation
        if isinstance(name, str) and "/" in name:
            what = f"config.json names {name!r} as its attention, which is code from the hub"
            raise InputError(what, where=model, mend="remove attn_implementation from config.json")


def load_skeleton(model: str, trust: Trust = NO_TRUST) -> PreTrainedModel:
    """The model without its numbers ("meta"): names and shapes of a model of any size, in a second."""
    config = load_config(model, trust)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # the caller must not notice what modules draw
        try:
            skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        except Exception as error:  # nearly every type, by which field of config.json is wrong
            what = f"no model can be built from the configuration ({error!r})"
            raise InputError(what, where=model, mend="mend config.json, or give another model") from error
    return skeleton.eval()


def load_model(
    model: str, *, dtype: torch.dtype, device: str = "cpu", nf4: bool = False, trust: Trust = NO_TRUST
) -> PreTrainedModel:
    """The model in `dtype` on `device`; with `nf4` linear layers (not the head) and experts are stored in 4 bits.

    Without trust no code from a model's repository is run and no pickle is read: weights are safetensors or GGUF.
    """
    source = resolve(model, trust=trust)
    arguments = arguments_of(source, trust)
    if nf4:
        _require_bitsandbytes()
    if source.kind is not SourceKind.GGUF:
        load_config(model, trust)  # refuses what it could make transformers run
        arguments["use_safetensors"] = None if trust.pickle else True  # None: a pickle where there is nothing else
    try:
        by_weight = nf4 and source.kind is not SourceKind.GGUF and not _is_quantized(arguments)
        if by_weight:
            arguments["quantization_config"] = _NF4Config(device)
        loaded, report = AutoModelForCausalLM.from_pretrained(
            **arguments,
            dtype=dtype,  # attention is transformers' choice: SDPA, or eager where that is not possible (gpt-oss)
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    except Exception as error:
        refuse_code(error, model)
        raise InputError(f"the model could not be loaded ({in_short(error)})", where=model, mend=MEND_HUB) from error
    assert isinstance(loaded, PreTrainedModel)
    _refuse_random_weights(report, model)
    linears, stacks = (loaded.hf_quantizer.linears, loaded.hf_quantizer.stacks) if by_weight else ({}, {})
    if by_weight or source.kind is SourceKind.GGUF:
        _forget_quantizer(loaded)
    if nf4:
        quantize_linears(loaded, linears)
        quantize_experts(loaded, stacks)
    loaded.config.name_or_path = source.name if source.path is None else str(source.path)
    return loaded.to(device).eval()


def _is_quantized(arguments: dict[str, Any]) -> bool:
    """Whether the files hold a quantised model, for which transformers uses the quantiser that made it."""
    config = AutoConfig.from_pretrained(**arguments)
    return any(c.to_dict().get("quantization_config") for c in (config, config.get_text_config()))


def _require_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        mend = "pip install bitsandbytes, or use --tune lora"
        raise InputError("4-bit weights need the `bitsandbytes` package", where="tune", mend=mend) from error


def _refuse_random_weights(report: dict[str, Any], model: str) -> None:
    """transformers draws a tensor at random where the file has none, or one of another shape, and only logs it."""
    mend = "the files are incomplete, or config.json belongs to another model"
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        what = f"the weight {name} is {tuple(stored)} in the files and {tuple(wanted)} by config.json"
        raise InputError(what, where=model, mend=mend)
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"the weights lack {missing[0]}{more}", where=model, mend=mend)


def _forget_quantizer(model: PreTrainedModel) -> None:
    """transformers keeps a model marked as quantised, and then refuses to save it, even a GGUF that is dense by now."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.__dict__.pop("quantization_config", None)
    model.config.__dict__.pop("_is_quantized", None)


# ── 4 bits, a weight at a time ───────────────────────────────────────────────────────────────────────────────────────

_NF4 = "welltuned_nf4"


@register_quantization_config(_NF4)
class _NF4Config(QuantizationConfigMixin):  # type: ignore[misc]
    """What transformers passes on to the quantiser: where weights are to be quantised."""

    def __init__(self, device: str):
        self.quant_method = _NF4
        self.device = device


@register_quantizer(_NF4)
class _NF4Quantizer(HfQuantizer):  # type: ignore[misc]
    """Takes weights as they are read and keeps their codes; the modules are replaced afterwards.

    Attributes:
        waiting: what has not been read yet, by the parameter's name: the module that it belongs to.
        linears: quantised weights by module name. stacks: quantised stacks of experts by parameter name.
    """

    def __init__(self, quantization_config: _NF4Config, **more: Any):
        super().__init__(quantization_config, **more)
        self.waiting: dict[str, nn.Module] = {}
        self.linears: dict[str, NF4Weight] = {}
        self.stacks: dict[str, NF4Stack] = {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        self.waiting = {f"{name}.weight": model.get_submodule(name) for name in quantisable(model)}
        self.waiting |= {name: model.get_submodule(name.rpartition(".")[0]) for name in expert_stacks(model)}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        return param_name in self.waiting  # no longer once it is read: then its shape is compared with the module's

    def get_quantize_ops(self) -> "_Quantize":
        return _Quantize(self)

    def take(self, name: str, value: Tensor) -> Tensor:
        """Quantise one weight; what stands in its place until the modules are replaced has its shape and no numbers."""
        module, device = self.waiting.pop(name), self.quantization_config.device
        layout = layout_of(module)
        if layout is not None:
            self.stacks[name] = quantize_stack(value, layout.transposed, device)
        else:
            w_OI = value.t() if isinstance(module, Conv1D) else value
            self.linears[name.removesuffix(".weight")] = NF4Weight.quantize(w_OI.to(device))
        return value.to("meta")

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantize(ConversionOps):  # type: ignore[misc]
    def __init__(self, quantizer: _NF4Quantizer):
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Tensor]:
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        return {name: self.quantizer.take(name, tensor) for name, tensor in tensors.items()}
