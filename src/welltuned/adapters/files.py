"""An adapter's files without its model: configuration and tensors, as PEFT names them, and what they multiply to."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from welltuned.errors import InputError
from welltuned.models.adapter_file import CONFIG, WEIGHTS, read_config, read_tensors, write_adapter

ORIGIN = "welltuned.json"  # what an adapter or a merged model was made from: the keys of run.json that inference needs
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """`tensors` by PEFT's names. `folder` is where they were read, or will be."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def modules(self) -> list[str]:
        """Names of what is adapted, each with a pair of tensors."""
        return sorted(name.removesuffix(_A) for name in self.tensors if name.endswith(_A))

    @property
    def others(self) -> list[str]:
        """Tensors that belong to no pair: trained biases."""
        paired = {module + end for module in self.modules for end in (_A, _B)}
        return sorted(set(self.tensors) - paired)


@dataclass(frozen=True, slots=True)
class Pair:
    """One module's factors: a_ERI, b_EOR, whose product times `scale` is what is added to the weights [E, O, I].

    E is 1 for a linear layer and the number of experts for a stack of them.
    """

    a_ERI: Tensor
    b_EOR: Tensor
    scale: float


def read_adapter(folder: Path, accept: Iterable[str] = ()) -> AdapterFile:
    """Read an adapter's folder; every A needs its B. `accept`: keys of its configuration beyond plain LoRA."""
    adapter = AdapterFile(folder, read_config(folder, accept), read_tensors(folder / WEIGHTS))
    for name in adapter.tensors:
        other = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        if other not in adapter.tensors:
            raise InputError(f"the adapter has no tensor {other!r}", where=str(folder), mend="its file is not whole")
    if not adapter.modules:
        raise InputError("the adapter holds no tensors", where=str(folder / WEIGHTS), mend="its file is not whole")
    for name, tensor in adapter.tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{name} holds numbers that are not finite", where=str(folder), mend="train it again")
    return adapter


def save(adapter: AdapterFile, folder: Path, origin: Mapping[str, Any]) -> None:
    """Write the adapter with a note of what it was made from."""
    write_adapter(folder, adapter.config, {name: t.contiguous() for name, t in adapter.tensors.items()})
    (folder / ORIGIN).write_text(json.dumps(origin, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def pair(adapter: AdapterFile, module: str) -> Pair:
    """The factors of one module, in float32, with the scale that PEFT gives them."""
    a, b = adapter.tensors[module + _A].float(), adapter.tensors[module + _B].float()
    config = adapter.config
    plain = module.removeprefix("base_model.model.")
    r = int(_by_pattern(config.get("rank_pattern"), plain, config["r"]))
    alpha = float(_by_pattern(config.get("alpha_pattern"), plain, config["lora_alpha"]))
    if a.shape[0] % r or b.shape[1] != a.shape[0]:
        what = f"{plain} has factors {tuple(a.shape)} and {tuple(b.shape)}, which are not of rank {r}"
        raise InputError(what, where=str(adapter.folder / CONFIG), mend="the configuration is not this adapter's")
    experts = a.shape[0] // r
    a_ERI = a.view(experts, r, -1)
    b_EOR = b.view(len(b), r, experts).permute(2, 0, 1)
    return Pair(a_ERI, b_EOR, alpha / (math.sqrt(r) if config.get("use_rslora") else r))


def tensor_names(module: str) -> tuple[str, str]:
    """The names of a module's A and B."""
    return module + _A, module + _B


def _by_pattern(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def product_norms(pairs: Mapping[str, Pair]) -> dict[str, float]:
    """The Frobenius norm of s B A for each module, from products of rank size: |BA|^2 = <B'B, AA'>."""
    norms = {}
    for name, p in pairs.items():
        a_ERI, b_EOR = p.a_ERI.double(), p.b_EOR.double()
        squared = ((b_EOR.mT @ b_EOR) * (a_ERI @ a_ERI.mT)).sum()
        norms[name] = abs(p.scale) * math.sqrt(max(float(squared), 0.0))
    return norms
