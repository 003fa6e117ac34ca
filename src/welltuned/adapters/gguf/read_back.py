"""What was written, read by another reader than ours: transformers'."""

import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

_NOT_LLAMAS = ("model_type", "architectures", "sliding_window", "transformers_version")


def read_back(path: Path, config: PretrainedConfig) -> PreTrainedModel:
    """The model of a GGUF file, in float32.

    The configuration is given, not read: transformers' reader leaves out some of it (Qwen 3's head size, Gemma's
    scale of the queries) and would put its defaults there.
    """
    known = copy.deepcopy(config)
    if config.model_type == "mistral":  # GGUF files it under Llama, and the reader knows it by no other name
        known = LlamaConfig(**{key: value for key, value in config.to_dict().items() if key not in _NOT_LLAMAS})
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, config=known, dtype=torch.float32
    )
    return model.eval()
