"""Load a causal language model and its tokenizer from a hub id, a folder or a GGUF file."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from welltuned.errors import InputError
from welltuned.models.frozen import quantize_linears
from welltuned.models.resolve import ModelSource, SourceKind, resolve

# Whatever transformers raises while it reads a model's files (nearly every type of exception, by which field of
# config.json is wrong) is about those files: hence the two `except Exception` below. --debug shows the traceback.
_MEND_HUB = "check the id and the network, or give a local folder or GGUF file"


def _arguments(source: ModelSource) -> dict[str, Any]:
    if source.kind is SourceKind.GGUF:
        assert source.path is not None
        return {"pretrained_model_name_or_path": str(source.path.parent), "gguf_file": source.path.name}
    name = source.name if source.path is None else str(source.path)
    return {"pretrained_model_name_or_path": name, "trust_remote_code": False}  # unset, transformers asks on stdin


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model: a hub id, a folder, a GGUF file or the demo's alias."""
    source = resolve(model)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**_arguments(source))
    except Exception as error:
        raise InputError(f"no tokenizer could be loaded ({_in_short(error)})", where=model, mend=_MEND_HUB) from error
    return tokenizer


def load_model(model: str, *, dtype: torch.dtype, device: str = "cpu", nf4: bool = False) -> PreTrainedModel:
    """The model in `dtype` on `device`; with `nf4` every linear layer but the head is stored in 4 bits.

    No code from a model's repository is run and no pickle is read: weights are safetensors or GGUF.
    """
    source = resolve(model)
    arguments = _arguments(source)
    if nf4:
        _require_bitsandbytes()
    if source.kind is not SourceKind.GGUF:
        arguments["use_safetensors"] = True
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            **arguments,
            dtype=dtype,
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    except Exception as error:
        raise InputError(f"the model could not be loaded ({_in_short(error)})", where=model, mend=_MEND_HUB) from error
    assert isinstance(loaded, PreTrainedModel)
    _refuse_random_weights(report, model)
    if source.kind is SourceKind.GGUF:
        _forget_gguf(loaded)
    if nf4:
        quantize_linears(loaded)
    loaded.config.name_or_path = source.name if source.path is None else str(source.path)
    return loaded.to(device).eval()


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


def _forget_gguf(model: PreTrainedModel) -> None:
    """transformers dequantises a GGUF on loading but keeps it marked as quantised, and then refuses to save it."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.__dict__.pop("quantization_config", None)


def _in_short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
