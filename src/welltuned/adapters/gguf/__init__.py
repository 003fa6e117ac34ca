"""Models and adapters as GGUF files, which llama.cpp and what is built on it (Ollama, LM Studio, ...) run.

Written with the `gguf` package. An architecture is exported only if it is known here and its tensors all have a place.
"""
