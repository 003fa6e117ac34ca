"""What follows from a config's settings: batch, updates, the LoRA scale, the model's size."""

import math
import re
from collections.abc import Mapping

from welltuned.advice.lint.config import Config

_SIZE = re.compile(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([mb])(?![a-z0-9])")
_FAMILIES: Mapping[str, str] = {
    "qwen3.5": "qwen3_5",
    "qwen3.6": "qwen3_5",
    "qwen3": "qwen3",
    "smollm": "llama",
    "llama": "llama",
    "deepseek": "deepseek_v3",
    "kimi": "kimi_k2",
    "gpt-oss": "gpt_oss",
}
_MIXTURES = re.compile(
    r"\d+x\d|-a\d+(\.\d+)?b|mixtral|moe|gpt-oss|deepseek-v|llama-4|kimi|maverick|scout|glm-?4\.[567]|jamba|dbrx"
    r"|qwen3-next|minimax",
    re.IGNORECASE,
)
_ACTIVE = re.compile(r"-a(\d+(?:\.\d+)?)b", re.IGNORECASE)
_UNDERSCORE = re.compile(r"(?<=-)(\d)_(\d)(?=b)")  # stablelm-2-1_6b
_LARGEST = 2e12  # a "parameter count" above it was no size


def parameters(config: Config) -> int | None:
    """Total parameters: counted where the model is local, else as the model's name says ("7b", "8x7B", "135M").

    >>> [parameters_in_name(name) for name in ("Mistral-7B-v0.1", "SmolLM2-135M", "Mixtral-8x7B", "gpt2", "qwen-8bit")]
    [7000000000, 135000000, 56000000000, None, None]
    """
    if config.look.parameters is not None:
        return config.look.parameters
    return parameters_in_name(config.text("model"))


def parameters_in_name(model: str) -> int | None:
    name = _UNDERSCORE.sub(r"\1.\2", model.rsplit("/", 1)[-1].lower()).replace("_", "-")
    sizes = []
    for copies, size, unit in _SIZE.findall(name):
        count = int(copies or 1) * float(size) * (1e9 if unit == "b" else 1e6)
        if count <= _LARGEST:
            sizes.append(round(count))
    return max(sizes, default=None)


def family(config: Config) -> str:
    """The model_type as the configuration or the name has it; "" where neither says."""
    if config.look.family is not None:
        return config.look.family
    name = config.text("model").lower()
    return next((family for word, family in _FAMILIES.items() if word in name), "")


def active_parameters(config: Config) -> int | None:
    """What one token passes through, where a mixture's name says it (30B-A3B); else all parameters."""
    found = _ACTIVE.search(config.text("model"))
    return round(float(found.group(1)) * 1e9) if found else parameters(config)


def is_mixture(config: Config) -> bool:
    return bool(_MIXTURES.search(config.text("model")))


def alpha_equivalent(config: Config) -> float | None:
    """The alpha with which 1/r scaling would do the same: what the rate must be multiplied with to compare runs."""
    alpha, rank = config.number("lora_alpha"), config.number("r")
    if alpha is None or alpha <= 0:
        return None
    if config.on("use_rslora"):
        return alpha * math.sqrt(rank) if rank is not None and rank > 0 else None
    return None if "use_rslora" in config.unread else alpha


def batch(config: Config) -> int | None:
    """Examples of one update on one device."""
    whole = config.whole("effective_batch_size")
    if whole is not None:
        return whole
    micro, steps = config.whole("per_device_train_batch_size"), config.whole("gradient_accumulation_steps")
    return micro * steps if micro is not None and steps is not None else None


def updates(config: Config) -> int | None:
    """Updates of the run: max_steps, or what the local rows make in the epochs; None where that is not known."""
    most = config.whole("max_steps")
    if most is not None and most > 0:
        return most
    if "max_steps" in config.unread or config.on("packing"):
        return None
    size, epochs = batch(config), config.number("num_train_epochs")
    if not config.look.rows_are_all or not config.look.rows or not size or size < 1 or epochs is None:
        return None
    if size > config.look.rows:
        return None  # WT036's
    return max(1, math.ceil(config.look.rows / size * epochs))


def warmup_updates(config: Config, run: int | None) -> float | None:
    """Updates of warm-up; a share is turned into updates where the run's length is known."""
    steps = config.number("warmup_steps")
    ratio = config.number("warmup_ratio") or (steps if steps is not None and 0 < steps < 1 else None)
    if steps is not None and steps >= 1:
        return steps
    if ratio:
        return ratio * run if run is not None else None
    return 0.0 if not {"warmup_steps", "warmup_ratio"} & set(config.unread) else None


def warmup_share(config: Config) -> float | None:
    """Warm-up as a share, where it is given as one."""
    steps, ratio = config.number("warmup_steps"), config.number("warmup_ratio")
    if steps is not None and steps >= 1:
        return None
    return ratio or (steps if steps is not None and 0 < steps < 1 else None)


def evaluates(config: Config) -> bool | None:
    """Whether the run is evaluated on held-out data: None where the file leaves it open."""
    held_out, when = has_held_out(config), config.value("eval_strategy")
    if held_out is None or config.is_open("eval_strategy"):
        return None
    return held_out and when not in (None, False, "no", "off")


def has_held_out(config: Config) -> bool | None:
    """Whether there is held-out data; None where the file leaves it open."""
    if "no_trainer" in config.facts:
        return None
    names = ("eval_data", "eval_share", "eval_split")
    if any(name in config.unread for name in names):
        return None if not config.given("eval_data") or "eval_data" in config.settings else True
    share = config.number("eval_share")
    return bool(config.value("eval_data")) or bool(share and share > 0) or bool(config.value("eval_split"))
