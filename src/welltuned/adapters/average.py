"""The weighted mean of several adapters of one base, and of the base itself.

What is averaged is what the adapters add to the weights, the products s B A: the mean of the factors is another thing,
since mean(B) mean(A) mixes every B with every A. The mean of products of rank r has up to the sum of the ranks; it is
kept whole (`--rank sum`) or cut to its best approximation of rank r (Eckart and Young, 1936), the lost share printed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from welltuned.adapters.files import AdapterFile, Pair, pair, tensor_names
from welltuned.adapters.scale import scale
from welltuned.errors import InputError
from welltuned.models.adapter_file import CONFIG


class Rank(StrEnum):
    SUM = "sum"  # of the adapters' ranks: nothing is lost


@dataclass(frozen=True, slots=True)
class Averaged:
    """An adapter and what its rank cost.

    Attributes:
        lost: by module, the share of the mean's squared Frobenius norm that the rank cannot hold; 0 where it can.
        lost_share: the same over all modules.
    """

    adapter: AdapterFile
    rank: int
    lost: Mapping[str, float]
    lost_share: float


def average(adapters: Sequence[AdapterFile], weights: Sequence[float], rank: int | Rank | None = None) -> Averaged:
    """The sum of `weights` times what each adapter adds; weights that sum to less than 1 leave the rest to the base.

    Args:
        rank: of the result; None for the largest of the adapters' own.

    Raises:
        InputError: adapters of different bases or shapes, or trained biases beside a base.
    """
    for other in adapters[1:]:
        _require_alike(adapters[0], other)
    if len(adapters) == 1 and rank is None:
        scaled = scale(adapters[0], weights[0])
        return Averaged(scaled, int(scaled.config["r"]), {}, 0.0)
    ranks = [max(pair(a, module).a_ERI.shape[1] for module in a.modules) for a in adapters]
    wanted = sum(ranks) if rank is Rank.SUM else max(ranks) if rank is None else int(rank)
    tensors: dict[str, Tensor] = {}
    lost: dict[str, tuple[float, float]] = {}
    for module in sorted({module for a in adapters for module in a.modules}):
        found = [(w, pair(a, module)) for w, a in zip(weights, adapters, strict=True) if module in a.modules]
        a_ERI, b_EOR, lost[module] = _refactored(module, found, wanted)
        a_name, b_name = tensor_names(module)
        tensors[a_name] = a_ERI.flatten(0, 1).contiguous()
        tensors[b_name] = b_EOR.permute(1, 2, 0).flatten(1).contiguous()
    tensors |= _biases(adapters, weights)
    config = {**adapters[0].config, "r": wanted, "lora_alpha": wanted, "use_rslora": False}
    config |= {"rank_pattern": {}, "alpha_pattern": {}, "target_modules": _targets(adapters)}
    whole = sum(total for _, total in lost.values())
    return Averaged(
        adapter=AdapterFile(adapters[0].folder, config, tensors),
        rank=wanted,
        lost={module: gone / total if total else 0.0 for module, (gone, total) in lost.items()},
        lost_share=sum(gone for gone, _ in lost.values()) / whole if whole else 0.0,
    )


def _require_alike(first: AdapterFile, other: AdapterFile) -> None:
    where, key = str(other.folder / CONFIG), "base_model_name_or_path"
    if first.config.get(key) != other.config.get(key):
        what = f"the adapter is for {other.config.get(key)}, and {first.folder} for {first.config.get(key)}"
        raise InputError(what, where=where, mend="average adapters of one base")
    for name in first.tensors.keys() & other.tensors.keys():
        if _outer(name, first.tensors[name]) != _outer(name, other.tensors[name]):
            what = f"{name} is {tuple(other.tensors[name].shape)}, and in {first.folder} it is"
            raise InputError(f"{what} {tuple(first.tensors[name].shape)}", where=where, mend="they are of other models")
    if first.config.get("target_parameters") and first.config.get("rank_pattern"):
        mend = "merge the adapters instead"
        raise InputError("adapters whose experts have a rank of their own cannot be averaged", where=where, mend=mend)


def _outer(name: str, tensor: Tensor) -> object:
    """The size that does not depend on the rank."""
    return tensor.shape[1] if ".lora_A." in name else tensor.shape[0] if ".lora_B." in name else tensor.shape


def _refactored(
    module: str, found: Sequence[tuple[float, Pair]], rank: int
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Factors of rank `rank` of the weighted sum, whose scale is 1; (squared norm lost, squared norm in all)."""
    if len({p.a_ERI.shape[0] for _, p in found}) > 1:
        raise InputError(f"{module} has different numbers of experts in the adapters", mend="they are of other models")
    a_ERI = torch.cat([p.a_ERI.double() for _, p in found], dim=1)
    b_EOR = torch.cat([w * p.scale * p.b_EOR.double() for w, p in found], dim=2)
    together = a_ERI.shape[1]
    if together <= rank:
        pad = rank - together
        whole = float(((b_EOR.mT @ b_EOR) * (a_ERI @ a_ERI.mT)).sum())
        a_ERI = torch.nn.functional.pad(a_ERI, (0, 0, 0, pad))
        return a_ERI.float(), torch.nn.functional.pad(b_EOR, (0, pad)).float(), (0.0, whole)
    q_EOR, rb_ERR = torch.linalg.qr(b_EOR)
    q_EIR, ra_ERR = torch.linalg.qr(a_ERI.mT)
    u_ERR, s_ER, v_ERR = torch.linalg.svd(rb_ERR @ ra_ERR.mT, full_matrices=False)
    root_ER = s_ER[:, :rank].sqrt()
    b = q_EOR @ u_ERR[:, :, :rank] * root_ER[:, None, :]
    a = root_ER[:, :, None] * (v_ERR[:, :rank] @ q_EIR.mT)
    missing = rank - a.shape[1]  # a matrix narrower than the rank
    a, b = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
    return a.float(), b.float(), (float((s_ER[:, rank:] ** 2).sum()), float((s_ER**2).sum()))


def _biases(adapters: Sequence[AdapterFile], weights: Sequence[float]) -> dict[str, Tensor]:
    """Trained biases are whole values, not differences: their mean needs weights that sum to 1."""
    names = {name for a in adapters for name in a.others}
    if not names:
        return {}
    if any(set(a.others) != names for a in adapters) or abs(sum(weights) - 1) > 1e-9:
        mend = "average adapters of one run without the base, or train with bias: none"
        raise InputError("trained biases cannot be averaged with the base's", where=str(adapters[0].folder), mend=mend)
    return {
        name: torch.stack([w * a.tensors[name].double() for w, a in zip(weights, adapters, strict=True)]).sum(0).float()
        for name in sorted(names)
    }


def _targets(adapters: Sequence[AdapterFile]) -> object:
    """What PEFT adapts: the adapters' own word where they agree, else every module by its full name."""
    said = [a.config.get("target_modules") for a in adapters]
    if all(s == said[0] for s in said):
        return said[0]
    modules = {module for a in adapters for module in a.modules}
    return sorted(module.removeprefix("base_model.model.") for module in modules)
