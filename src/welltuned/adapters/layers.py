"""Where an adapter learned: how much it adds to the weights, module by module and layer by layer."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from welltuned.adapters.files import AdapterFile, pair, product_norms

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Learned:
    """How much one module's weights changed.

    Attributes:
        change: Frobenius norm of what is added to the weights, s B A.
        relative: the same over the norm of the weights; None where the base was not looked at.
    """

    module: str
    change: float
    relative: float | None = None


def learned(adapter: AdapterFile, weights: Mapping[str, float] | None = None) -> list[Learned]:
    """Every adapted module, those that changed most first.

    Args:
        weights: Frobenius norms of the base's weights by module.
    """
    norms = product_norms({module: pair(adapter, module) for module in adapter.modules})
    found = []
    for module, change in norms.items():
        name = module.removeprefix("base_model.model.").replace(".base_layer", "")
        size = (weights or {}).get(name)
        found.append(Learned(name, change, None if not size else change / size))
    return sorted(found, key=lambda one: -(one.change if one.relative is None else one.relative))


def by_layer(found: Iterable[Learned]) -> dict[str, float]:
    """The share of all squared change that lies in each decoder layer, in the model's order; they sum to 1."""
    squares: dict[str, float] = {}
    for one in found:
        number = _LAYER.search(one.module + ".")
        key = number[1] if number else one.module
        squares[key] = squares.get(key, 0.0) + one.change**2
    whole = math.fsum(squares.values())
    ordered = sorted(squares, key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else 0, key))
    return {key: squares[key] / whole if whole else 0.0 for key in ordered}


def by_kind(found: Iterable[Learned]) -> dict[str, float]:
    """The same by kind of projection (q_proj, down_proj, ...), the largest first."""
    squares: dict[str, float] = {}
    for one in found:
        kind = one.module.rpartition(".")[2]
        squares[kind] = squares.get(kind, 0.0) + one.change**2
    whole = math.fsum(squares.values())
    return {key: squares[key] / whole if whole else 0.0 for key in sorted(squares, key=lambda key: -squares[key])}
