"""Load a causal language model and its tokenizer from a hub id, a folder or a GGUF file."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from welltuned.errors import InputError
from welltuned.models.frozen import quantize_linears
from welltuned.models.resolve import ModelSource, SourceKind, resolve

_MEND_HUB = "check the id and the network, or give a local folder or GGUF file"


def _arguments(source: ModelSource) -> dict[str, Any]:
    if source.kind is SourceKind.GGUF:
        assert source.path is not None
        return {"pretrained_model_name_or_path": str(source.path.parent), "gguf_file": source.path.name}
    return {"pretrained_model_name_or_path": source.name if source.path is None else str(source.path)}


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model: a hub id, a folder, a GGUF file or the demo's alias."""
    source = resolve(model)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**_arguments(source))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"no tokenizer could be loaded ({_first_line(error)})", where=model, mend=_MEND_HUB) from error
    return tokenizer


def load_model(model: str, *, dtype: torch.dtype, device: str = "cpu", nf4: bool = False) -> PreTrainedModel:
    """The model in `dtype` on `device`; with `nf4` every linear layer but the head is stored in 4 bits.

    No code from a model's repository is run and no pickle is read: weights are safetensors or GGUF.
    """
    source = resolve(model)
    arguments = _arguments(source)
    if source.kind is not SourceKind.GGUF:
        arguments["use_safetensors"] = True
    try:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            **arguments, dtype=dtype, attn_implementation="sdpa"
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the model could not be loaded ({_first_line(error)})", where=model, mend=_MEND_HUB) from error
    if source.kind is SourceKind.GGUF:
        _forget_gguf(loaded)
    if nf4:
        quantize_linears(loaded)
    loaded.config.name_or_path = source.name if source.path is None else str(source.path)
    return loaded.to(device).eval()


def _forget_gguf(model: PreTrainedModel) -> None:
    """transformers dequantises a GGUF on loading but keeps it marked as quantised, and then refuses to save it."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.__dict__.pop("quantization_config", None)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
