"""An adapter made stronger or weaker: alpha is multiplied, and with it what is added to every weight."""

import math
from dataclasses import replace
from typing import Any

from welltuned.adapters.files import AdapterFile
from welltuned.errors import InputError


def scale(adapter: AdapterFile, by: float) -> AdapterFile:
    """The same adapter with `lora_alpha` and every value of `alpha_pattern` multiplied; no tensor changes.

    Half of alpha is the mean of the base and the tuned weights: W + s/2 BA = (W + (W + s BA)) / 2.

    Raises:
        InputError: `by` is not above 0, or the adapter trained biases, which alpha does not scale.
    """
    if not (math.isfinite(by) and by > 0):
        raise InputError(f"an adapter cannot be scaled by {by:g}", where="--by", mend="0 is the base model itself")
    if adapter.others:
        what = f"the adapter trained {adapter.others[0]}, which alpha does not scale"
        raise InputError(what, where=str(adapter.folder), mend="train with bias: none")
    config = {**adapter.config, "lora_alpha": _tidy(adapter.config["lora_alpha"] * by)}
    patterns = adapter.config.get("alpha_pattern")
    if patterns:
        config["alpha_pattern"] = {key: _tidy(value * by) for key, value in patterns.items()}
    return replace(adapter, config=config)


def _tidy(value: float) -> Any:
    return int(value) if float(value).is_integer() else value
