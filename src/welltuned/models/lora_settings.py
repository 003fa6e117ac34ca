"""What an adapter is asked to be: rank, strength, places, start. PEFT's names and meanings."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

ALL_LINEAR = "all-linear"
T = TypeVar("T")


class Init(StrEnum):
    """How A and B start; B at zero but for the last three.

    PISSA, OLORA: at a part of the weights W, which is taken off them, so that the model starts at what it was:
    y = x (W - s B0 A0 + s B A)^T. LOFTQ: at what 4 bits lose of W.
    """

    KAIMING = "true"  # PEFT's init_lora_weights=True
    GAUSSIAN = "gaussian"
    PISSA = "pissa"
    OLORA = "olora"
    LOFTQ = "loftq"


FROM_WEIGHTS = frozenset({Init.PISSA, Init.OLORA})  # what a start takes off the base


def parse_init(value: object) -> tuple[Init, int | None] | None:
    """The start that a value of `init_lora_weights` means, with PiSSA's iterations; None for one that is unknown.

    >>> parse_init(True), parse_init("pissa_niter_4")
    ((<Init.KAIMING: 'true'>, None), (<Init.PISSA: 'pissa'>, 4))
    """
    text = str(value).lower()
    iterations = re.fullmatch(r"pissa_niter_(\d{1,3})", text)
    if iterations is not None:
        return Init.PISSA, int(iterations[1])
    return (Init(text), None) if text in set(Init) else None


class Bias(StrEnum):
    NONE = "none"
    LORA_ONLY = "lora_only"
    ALL = "all"


def by_pattern(patterns: Iterable[tuple[str, T]], name: str, default: T) -> T:
    """The value of the first pattern that names the module, as PEFT reads patterns: as endings of names."""
    return next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", name)), default)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """PEFT's names and meanings.

    Args:
        target_modules: "all-linear", or name endings, each of which must match. Experts are no linear layers: they are
            named by their module ("experts") or, as in PEFT's `target_parameters`, by a stack ("experts.down_proj").
        expert_r: the rank of every expert's own adapter; None for r.
        rank_pattern, alpha_pattern: (pattern, value) for linear layers with a rank or an alpha of their own.
        layers_to_transform: numbers of the decoder layers that are adapted; () for all.
        svd_iterations: of PiSSA's randomised decomposition; None for the exact one.
    """

    r: int = 16
    expert_r: int | None = None
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    use_rslora: bool = False
    bias: Bias = Bias.NONE
    init: Init = Init.KAIMING
    seed: int = 3407
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    use_dora: bool = False
    svd_iterations: int | None = None

    @property
    def scale(self) -> float:
        return self._scale(self.r, self.lora_alpha)

    @property
    def expert_rank(self) -> int:
        return self.expert_r or self.r

    @property
    def expert_scale(self) -> float:
        return self._scale(self.expert_rank, self.lora_alpha)

    def rank_of(self, name: str) -> int:
        """The rank of the linear layer of this name."""
        return by_pattern(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        return by_pattern(self.alpha_pattern, name, self.lora_alpha)

    def scale_of(self, name: str) -> float:
        """What B A of the linear layer of this name is multiplied by."""
        return self._scale(self.rank_of(name), self.alpha_of(name))

    def _scale(self, r: int, alpha: float) -> float:
        return alpha / (math.sqrt(r) if self.use_rslora else r)
