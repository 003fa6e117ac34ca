"""Configurations of which it is known, without building a model, that every part of it runs on our code.

Only what is plain: families that `foresee` was seen to leave nothing of (tests/models/test_whole.py compares the two),
and configurations that hold nothing but what is listed here, with values of the right kind. Anything else is built.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from welltuned.recipe import ALL_LINEAR

_FAMILIES = frozenset({"llama", "qwen2", "qwen3", "granite"})


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _switch(value: Any) -> bool:
    return isinstance(value, bool)


def _token(value: Any) -> bool:
    tokens = value if isinstance(value, list) else [value]
    return all(token is None or isinstance(token, int) for token in tokens)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _rotation(value: Any) -> bool:
    """Plain rotary positions, or Llama 3's stretched ones."""
    if value is None:
        return True
    if not isinstance(value, dict) or value.get("rope_type", "default") not in ("default", "llama3"):
        return False
    numbers = ["rope_theta"]
    if value.get("rope_type") == "llama3":
        numbers += ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
        if not all(name in value for name in numbers[1:]):
            return False
    return all(name == "rope_type" or name in numbers and _number(item) for name, item in value.items())


_KEYS: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"), _count
    )
    | dict.fromkeys(
        ("vocab_size", "max_position_embeddings", "head_dim", "pretraining_tp", "max_window_layers"), _count
    )
    | dict.fromkeys(("rms_norm_eps", "rope_theta", "initializer_range"), _number)
    | dict.fromkeys(("attention_bias", "tie_word_embeddings", "use_cache"), _switch)
    | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"), _token)
    | dict.fromkeys(("model_type", "transformers_version", "_name_or_path", "_model_name_or_path"), _text)
    | dict.fromkeys(("rope_scaling", "rope_parameters"), _rotation)
    | {
        "architectures": lambda value: isinstance(value, list) and len(value) == 1 and _text(value[0]),
        "attention_dropout": lambda value: value == 0,
        "dtype": lambda value: value in ("float32", "bfloat16", "float16"),
        "torch_dtype": lambda value: value in ("float32", "bfloat16", "float16"),
        "hidden_act": lambda value: value == "silu",
        "mlp_bias": lambda value: value is False,
        "sliding_window": lambda value: value is None,
        "use_sliding_window": lambda value: value is False,
        "layer_types": lambda value: isinstance(value, list) and set(value) == {"full_attention"},
    }
)
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rms_norm_eps")


def is_whole(config: Mapping[str, Any], target_modules: str | tuple[str, ...] | None) -> bool:
    """Whether nothing will stay on the model's own code. False also where it is not known."""
    if target_modules not in (None, ALL_LINEAR) or config.get("model_type") not in _FAMILIES:
        return False
    if not all(key in _KEYS and _KEYS[key](value) for key, value in config.items()):
        return False
    if any(key not in config for key in _NEEDED):
        return False
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    layers = config.get("layer_types", ())
    return (
        heads % config.get("num_key_value_heads", heads) == 0
        and hidden % heads == 0
        and config.get("head_dim", hidden // heads) % 2 == 0
        and len(layers) in (0, config["num_hidden_layers"])
        and config.get("pad_token_id", 0) in (None, *range(config["vocab_size"]))
    )
