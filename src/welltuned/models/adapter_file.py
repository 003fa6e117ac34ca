"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

A stack of experts is a parameter, which PEFT names in `target_parameters` and wraps: of two stacks of one module the
later one lies outside, so its tensors are the module's own and the other's are within `base_layer`. All experts lie in
one A [experts · r, in] and one B [out, r · experts], in which the expert is the last index.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.pytorch_utils import Conv1D

from welltuned.errors import InputError, RunError
from welltuned.models.experts import expert_stacks
from welltuned.models.lora import MAGNITUDE, AdapterBank, attach
from welltuned.models.lora_settings import ALL_LINEAR, FROM_WEIGHTS, Bias, LoraSettings, by_pattern
from welltuned.models.reward import SCORE, add_score
from welltuned.models.saved import named_modules, tied_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What PEFT computes other than plain LoRA, or in more places than the tensors' names tell.
_REFUSED = (
    *("use_dora", "modules_to_save", "alpha_pattern", "lora_bias"),
    *("layer_replication", "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
    *("arrow_config", "kasa_config", "monteclora_config"),
)
# PEFT 0.21 takes these names for the experts' own in most families whose experts transformers fuses on loading
# (Qwen3-MoE, DeepSeek, GLM-4, ...), by whatever path: dense layers and shared experts would go without. It finds them
# as parameters ("….weight").
_TAKEN_FOR_EXPERTS = ("gate_proj", "up_proj", "down_proj")
_NAME_PATTERN = re.compile(r"\^?(?:\.\*)?[\w.\\|$-]+(?:\.\*[\w.\\|$-]+){0,2}")  # few ".*": each multiplies the time
UNDERSTOOD = ("use_dora", "modules_to_save", "alpha_pattern")
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others (PiSSA, OLoRA, ...) change the base weights


def save_adapter(bank: AdapterBank, folder: Path, base: str, k: int = 0) -> None:
    """Write adapter k for PEFT, vLLM and llama.cpp's converter, then read it back and compare every byte.

    Raises:
        RunError: what was read back differs from what is in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = without_start(bank, k) if bank.settings[k].init in FROM_WEIGHTS else bank.tensors(k)
    tensors = {_to_file(name, bank): _as_file(name, t).cpu().clone() for name, t in named.items()}
    for other, saved in tied_names(bank.model, bank.saved).items():
        tensors[f"{_PREFIX}{other}.weight"] = tensors[f"{_PREFIX}{saved}.weight"].clone()
    write_adapter(folder, _config(bank, base, k), tensors)


def without_start(bank: AdapterBank, k: int = 0) -> dict[str, Tensor]:
    """What an adapter that began at a part of the weights adds to them: B A - B0 A0, as factors of twice the rank.

    A = [A; A0] and B = [B, -B0], so that the first half is what was trained, and the second how it began.
    """
    start, found = bank.tensors_at_start(k), {}
    for name, tensor in bank.tensors(k).items():
        began = start[name].to(tensor.device)
        if name.endswith("lora_A"):
            tensor = torch.cat([tensor, began])
        elif name.endswith("lora_B"):
            tensor = torch.cat([tensor, -began], dim=1)
        found[name] = tensor
    return found


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter by PEFT's names, then read it back and compare every byte.

    Raises:
        RunError: what was read back differs from what is in memory.
    """
    weights = folder / WEIGHTS
    save_file(dict(tensors), folder / (WEIGHTS + ".tmp"), metadata={"format": "pt"})
    os.replace(folder / (WEIGHTS + ".tmp"), weights)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    again = read_tensors(weights)
    if again.keys() != tensors.keys() or any(not torch.equal(again[name], tensors[name]) for name in tensors):
        raise RunError(f"{weights}: what was read back is not what was saved; the disk may be full or failing")


def load_adapter(
    model: PreTrainedModel,
    folder: Path,
    *,
    dropout: float | None = None,
    saved: tuple[str, ...] = (),
    device: torch.device | str | None = None,
) -> AdapterBank:
    """Put a PEFT LoRA adapter on a model. Everything in the file must be used, and everything needed be in it.

    Args:
        dropout: to train on with; None for the file's.
        saved: modules that are trained beside the adapters; what the file does not have of them stays as it is.
        device: as in `attach`.
    """
    config, stored = read_config(folder, accept=UNDERSTOOD), read_tensors(folder / WEIGHTS)
    whole = tuple(config.get("modules_to_save") or ())
    if whole == (SCORE,) and not saved:
        add_score(model, seed=0)
        saved = whole
    elif whole and not saved:
        saved = named_modules(model, whole)
    names = _stack_names(model, config.get("target_parameters") or ())
    tensors = {_from_file(name, names, saved): tensor for name, tensor in stored.items()}
    _drop_tied(model, saved, tensors, bool(config.get("ensure_weight_tying")), str(folder))
    settings = _settings(config, tensors, set(names.values()), str(folder))
    bank = attach(model, settings if dropout is None else replace(settings, lora_dropout=dropout), saved, device)
    expected = bank.tensors()
    if not config.get("modules_to_save"):
        expected = {name: tensor for name, tensor in expected.items() if name.rpartition(".")[0] not in saved}
    for missing in sorted(expected.keys() - tensors.keys()):
        raise InputError(
            f"the adapter has no tensor {missing!r}", where=str(folder), mend="it may be for another model"
        )
    for extra in sorted(tensors.keys() - expected.keys()):
        raise InputError(f"the model has no place for {extra!r}", where=str(folder), mend="it may be for another model")
    for name, tensor in tensors.items():
        wanted = _as_file(name, expected[name]).shape
        if tensor.shape != wanted:
            what = f"{name} is {tuple(tensor.shape)} in the adapter and {tuple(wanted)} in the model"
            raise InputError(what, where=str(folder), mend="give the model that the adapter was trained on")
        expected[name].copy_(_from_file_layout(name, tensor, expected[name]))
    bank.start_KP.copy_(bank.flat_KP)
    return bank


def _drop_tied(
    model: PreTrainedModel, saved: tuple[str, ...], tensors: dict[str, Tensor], tying: bool, where: str
) -> None:
    """PEFT keeps two copies of a weight that embedding and head share; ours is one. `tying`: it says so itself."""
    for other, name in tied_names(model, saved).items():
        first, second = tensors.get(f"{name}.weight"), tensors.pop(f"{other}.weight", None)
        if first is None and second is None or tying and first is not None and second is None:
            continue
        if first is None or second is None or not torch.equal(first, second):
            alone, left = (other, name) if first is None else (name, other)
            what = f"{alone} was trained without {left}, which shares its weights in the model"
            raise InputError(what, where=where, mend="merge the adapter with PEFT first")


def split_start(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What was trained, and how it began, of what `without_start` made."""
    now, start = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(("lora_A", "lora_B")):
            side = 0 if name.endswith("lora_A") else 1
            now[name], began = (part.contiguous() for part in tensor.chunk(2, dim=side))
            start[name] = began if side == 0 else -began
    return now, start


def read_config(folder: Path, accept: Iterable[str] = ()) -> dict[str, Any]:
    """adapter_config.json, refused where it asks for more than LoRA and what `accept` names."""
    path = folder / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no {CONFIG}", where=str(folder), mend="give an adapter's folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{CONFIG} is not JSON ({_line(error)})", where=str(folder)) from error
    if not isinstance(config, dict):
        raise InputError(f"{CONFIG} is no JSON object", where=str(folder), mend="give an adapter's folder")
    if config.get("peft_type") != "LORA":
        raise InputError(f"adapters of type {config.get('peft_type')} are not understood", where=str(path))
    for key in _REFUSED:
        if config.get(key) and key not in accept and not (key == "modules_to_save" and list(config[key]) == [SCORE]):
            mend = (
                "merge it first: welltuned adapter merge" if key in UNDERSTOOD else "merge the adapter with PEFT first"
            )
            raise InputError(f"{key} is not understood here", where=str(path), mend=mend)
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        mend = "convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        raise InputError(f"an adapter begun with {start} stands on other base weights", where=str(path), mend=mend)
    for key in ("r", "lora_alpha"):
        if type(config.get(key)) not in (int, float) or not 0 < config[key] < math.inf:
            raise InputError(f"{key} is no number above 0", where=str(path), mend="give the adapter's own config")
    _check_names(config, str(path))
    if (config.get("bias") or "none") not in set(Bias):
        raise InputError(f"the bias {config['bias']!r} is not understood", where=str(path))
    return config


def _check_names(config: dict[str, Any], where: str) -> None:
    """What is compared with the model's names: lists of text, and patterns that cannot take for ever to match."""
    parameters, patterns = config.get("target_parameters") or [], config.get("rank_pattern") or {}
    alphas = config.get("alpha_pattern") or {}
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise InputError("target_parameters is no list of names", where=where)
    if not isinstance(patterns, dict) or not all(type(rank) is int and rank > 0 for rank in patterns.values()):
        raise InputError("rank_pattern does not give ranks by name", where=where)
    numbers = isinstance(alphas, dict) and all(type(a) in (int, float) and 0 < a < math.inf for a in alphas.values())
    if not numbers:
        raise InputError("alpha_pattern does not give numbers above 0 by name", where=where)
    for pattern in (*patterns, *alphas):
        if not _NAME_PATTERN.fullmatch(pattern):
            what = f"a pattern holds {pattern[:80]!r}, which is more than names and their parts"
            raise InputError(what, where=where, mend="name the modules")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by the names in it."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise InputError(f"there is no {path.name}", where=str(path.parent), mend="give an adapter's folder") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"the adapter's weights are damaged ({_line(error)})", where=str(path)) from error


def _to_file(name: str, bank: AdapterBank) -> str:
    """Our tensor's name as PEFT writes it: a trained bias of an adapted layer lies within `base_layer`."""
    module, _, leaf = name.rpartition(".")
    if module in bank.stacks:
        return f"{_PREFIX}{_wrapped(bank.stacks)[module]}.{leaf}.weight"
    if leaf.startswith("lora_"):
        return f"{_PREFIX}{name}" + ".weight" * (leaf != MAGNITUDE)
    return f"{_PREFIX}{module}.base_layer.{leaf}" if module in bank.modules else _PREFIX + name


def _from_file(name: str, stacks: Mapping[str, str], saved: tuple[str, ...] = ()) -> str:
    """PEFT's name as ours; `stacks` by the name that PEFT's wrapper has in the file."""
    if ".lora_" not in name and not name.endswith(".base_layer.weight"):
        return name.removeprefix(_PREFIX).replace(".base_layer.", ".")  # a trained module or bias, by its own name
    plain = name.removeprefix(_PREFIX).removesuffix(".weight")
    module, _, leaf = plain.rpartition(".")
    return f"{stacks[module]}.{leaf}" if module in stacks else plain.replace(".base_layer.", ".")


def _wrapped(stacks: Iterable[str]) -> dict[str, str]:
    """Where PEFT's wrappers of these stacks lie, which come in the order in which their module registers them."""
    found: dict[str, str] = {}
    for name in reversed(list(stacks)):
        module = name.rpartition(".")[0]
        outer = sum(other.rpartition(".")[0] == module for other in found)
        found[name] = module + ".base_layer" * outer
    return found


def _stack_names(model: PreTrainedModel, parameters: Iterable[str]) -> dict[str, str]:
    """The stacks that `target_parameters` names, by the name of PEFT's wrapper."""
    wanted = tuple(parameters)
    if not wanted:
        return {}
    chosen = [name for name in expert_stacks(model) if any(f".{name}".endswith(f".{ending}") for ending in wanted)]
    return {wrapper: name for name, wrapper in _wrapped(chosen).items()}


def _as_file(name: str, tensor: Tensor) -> Tensor:
    """A stack's A_ERI as [experts · r, in] and B_EOR as [out, r · experts]; anything else as it is."""
    tensor = tensor.detach()
    if tensor.dim() == 3:
        tensor = tensor.flatten(0, 1) if name.endswith("lora_A") else tensor.permute(1, 2, 0).flatten(1)
    return tensor.contiguous()


def _from_file_layout(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    if like.dim() == 3 and name.endswith("lora_B"):
        experts, outputs, r = like.shape
        return tensor.view(outputs, r, experts).permute(2, 0, 1)
    return tensor.view(like.shape)


def _config(bank: AdapterBank, base: str, k: int) -> dict[str, Any]:
    s = bank.settings[k]
    modules, parameters = _peft_places(bank)
    stacks = _shortest(bank.stacks, expert_stacks(bank.model))
    twice = 2 if s.init in FROM_WEIGHTS else 1  # see `without_start`
    more = math.sqrt(twice) if s.use_rslora else twice  # alpha with which the scale stays what it was
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if bank.saved == (SCORE,) else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": s.r * twice,
        "lora_alpha": _whole(s.lora_alpha * more),
        "lora_dropout": 0.0 if parameters else s.lora_dropout,  # PEFT refuses it on parameters, where it cannot act
        "use_rslora": s.use_rslora,
        "target_modules": peft_targets(bank.model, modules),
        "bias": str(s.bias),
        "fan_in_fan_out": any(isinstance(module.base, Conv1D) for module in bank.modules.values()),
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": [*bank.saved, *tied_names(bank.model, bank.saved)] or None,
        "use_dora": s.use_dora,
        "rank_pattern": {key: r * twice for key, r in s.rank_pattern},
        "alpha_pattern": {key: _whole(alpha * more) for key, alpha in s.alpha_pattern},
    }
    if stacks or parameters:
        config["target_parameters"] = [*stacks, *parameters]
    if stacks and s.expert_rank != s.r:
        config["rank_pattern"] |= dict.fromkeys(map(re.escape, stacks), s.expert_rank)
    return config


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _peft_places(bank: AdapterBank) -> tuple[list[str], list[str]]:
    """(modules, parameters) by which PEFT finds the adapted linear layers."""
    linears = [name for name in bank.targets if name not in bank.stacks]
    fused = [c.target_patterns for c in get_checkpoint_conversion_mapping(bank.model.config.model_type) or ()]
    if not any(pattern.endswith("gate_up_proj") for patterns in fused for pattern in patterns):
        return linears, []
    taken = [name for name in linears if name.rpartition(".")[2] in _TAKEN_FOR_EXPERTS]
    return [name for name in linears if name not in taken], [f"{name}.weight" for name in taken]


def _shortest(chosen: list[str], every: Iterable[str]) -> list[str]:
    """Endings ("experts.down_proj") that mean exactly the chosen stacks, else their full names."""
    endings = sorted({".".join(name.split(".")[-2:]) for name in chosen})
    meant = {name for name in every if name.endswith(tuple(f".{ending}" for ending in endings))}
    return endings if meant == set(chosen) else list(chosen)


def peft_targets(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """The shortest list of names that makes PEFT adapt exactly these modules: leaf names, else full paths."""
    leaves = sorted({name.rpartition(".")[2] for name in targets})
    named = {n for n, _ in model.named_modules() if n.rpartition(".")[2] in leaves}
    return leaves if named == set(targets) else list(targets)


def _settings(config: dict[str, Any], tensors: dict[str, Tensor], stacks: set[str], where: str) -> LoraSettings:
    longest = max((max(tensor.shape, default=0) for tensor in tensors.values()), default=0)
    names = tuple(sorted({n.rpartition(".")[0] for n in tensors if n.endswith("lora_A")}))
    r = int(config["r"])
    patterns = tuple((config.get("rank_pattern") or {}).items())

    def rank(name: str) -> int:
        return by_pattern(patterns, name, r)

    if max((rank(name) for name in names), default=r) > longest:  # before so much memory is asked for
        what = f"the rank is {r:,} in {CONFIG}, and the file's tensors are no larger than {longest:,}"
        raise InputError(what, where=where, mend="the two files do not belong together")
    expert_ranks = {rank(name) for name in names if name in stacks}
    if len(expert_ranks) > 1:
        what = "rank_pattern gives experts several ranks, which is not understood"
        raise InputError(what, where=where, mend="merge the adapter with PEFT first")
    linears = [name for name in names if name not in stacks]
    return LoraSettings(
        r=r,
        expert_r=next(iter(expert_ranks - {r}), None),
        lora_alpha=float(config["lora_alpha"]),
        lora_dropout=float(config.get("lora_dropout") or 0.0),
        target_modules=names or ALL_LINEAR,
        use_rslora=bool(config.get("use_rslora")),
        bias=Bias(config.get("bias") or "none"),
        rank_pattern=_used(patterns, linears),
        alpha_pattern=_used(tuple((config.get("alpha_pattern") or {}).items()), linears),
        use_dora=bool(config.get("use_dora")),
    )


def _used(patterns: Iterable[tuple[str, Any]], names: Iterable[str]) -> tuple[tuple[str, Any], ...]:
    """The patterns that name one of these layers; others may be meant for experts, or for nothing."""
    return tuple((key, value) for key, value in patterns if any(by_pattern([(key, True)], n, False) for n in names))
