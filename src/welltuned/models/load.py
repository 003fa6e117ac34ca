"""Load a causal language model and its tokenizer from a hub id, a folder or a GGUF file."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from welltuned.errors import InputError
from welltuned.models.frozen import quantize_linears
from welltuned.models.resolve import ModelSource, SourceKind, resolve
from welltuned.recipe import Tune


def _where(source: ModelSource) -> tuple[str, dict[str, Any]]:
    if source.kind is SourceKind.GGUF:
        return str(source.path.parent), {"gguf_file": source.path.name}
    return str(source.path) if source.path is not None else source.id, {}
