"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from welltuned.errors import InputError, RunError
from welltuned.models.lora import ALL_LINEAR, AdapterBank, Bias, LoraSettings, attach

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What PEFT computes other than plain LoRA, or in more places than the tensors' names tell.
_REFUSED = (
    *("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters", "lora_bias"),
    *("layer_replication", "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
    *("arrow_config", "kasa_config", "monteclora_config"),
)
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others (PiSSA, OLoRA, ...) change the base weights


def save_adapter(bank: AdapterBank, folder: Path, base: str, k: int = 0) -> None:
    """Write adapter k for PEFT, vLLM and llama.cpp's converter, then read it back and compare every byte.

    Raises:
        RunError: what was read back differs from what is in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_to_file(name, bank): t.detach().cpu().contiguous().clone() for name, t in bank.tensors(k).items()}
    weights = folder / WEIGHTS
    save_file(tensors, folder / (WEIGHTS + ".tmp"), metadata={"format": "pt"})
    os.replace(folder / (WEIGHTS + ".tmp"), weights)
    text = json.dumps(_config(bank, base, k), indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    again = _read(weights)
    if again.keys() != tensors.keys() or any(not torch.equal(again[name], tensors[name]) for name in tensors):
        raise RunError(f"{weights}: what was read back is not what was saved; the disk may be full or failing")


def load_adapter(model: PreTrainedModel, folder: Path) -> AdapterBank:
    """Put a PEFT LoRA adapter on a model. Everything in the file must be used, and everything needed be in it."""
    config = read_config(folder)
    tensors = {_from_file(name): tensor for name, tensor in _read(folder / WEIGHTS).items()}
    bank = attach(model, _settings(config, tensors))
    expected = bank.tensors()
    for missing in sorted(expected.keys() - tensors.keys()):
        raise InputError(
            f"the adapter has no tensor {missing!r}", where=str(folder), mend="it may be for another model"
        )
    for extra in sorted(tensors.keys() - expected.keys()):
        raise InputError(f"the model has no place for {extra!r}", where=str(folder), mend="it may be for another model")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            what = f"{name} is {tuple(tensor.shape)} in the adapter and {tuple(expected[name].shape)} in the model"
            raise InputError(what, where=str(folder), mend="give the model that the adapter was trained on")
        expected[name].copy_(tensor)
    bank.start_KP.copy_(bank.flat_KP)
    return bank


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, refused where it asks for more than LoRA."""
    path = folder / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no {CONFIG}", where=str(folder), mend="give an adapter's folder") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{CONFIG} is not JSON ({error})", where=str(folder)) from error
    if config.get("peft_type") != "LORA":
        raise InputError(f"adapters of type {config.get('peft_type')} are not understood", where=str(path))
    for key in _REFUSED:
        if config.get(key):
            raise InputError(f"{key} is not understood", where=str(path), mend="merge the adapter with PEFT first")
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        mend = "convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        raise InputError(f"an adapter begun with {start} stands on other base weights", where=str(path), mend=mend)
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise InputError(f"{key} is no number above 0", where=str(path), mend="give the adapter's own config")
    if (config.get("bias") or "none") not in set(Bias):
        raise InputError(f"the bias {config['bias']!r} is not understood", where=str(path))
    return config


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise InputError(f"there is no {path.name}", where=str(path.parent), mend="give an adapter's folder") from error
    except SafetensorError as error:
        raise InputError(f"the adapter's weights are damaged ({error})", where=str(path)) from error


def _to_file(name: str, bank: AdapterBank) -> str:
    """Our tensor's name as PEFT writes it: a trained bias of an adapted layer lies within `base_layer`."""
    module, _, leaf = name.rpartition(".")
    if leaf.startswith("lora_"):
        return f"{_PREFIX}{name}.weight"
    return f"{_PREFIX}{module}.base_layer.{leaf}" if module in bank.modules else _PREFIX + name


def _from_file(name: str) -> str:
    return name.removeprefix(_PREFIX).removesuffix(".weight").replace(".base_layer.", ".")


def _config(bank: AdapterBank, base: str, k: int) -> dict[str, Any]:
    s = bank.settings[k]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": s.r,
        "lora_alpha": int(s.lora_alpha) if float(s.lora_alpha).is_integer() else s.lora_alpha,
        "lora_dropout": s.lora_dropout,
        "use_rslora": s.use_rslora,
        "target_modules": peft_targets(bank.model, bank.targets),
        "bias": str(s.bias),
        "fan_in_fan_out": any(isinstance(module.base, Conv1D) for module in bank.modules.values()),
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def peft_targets(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """The shortest list of names that makes PEFT adapt exactly these modules: leaf names, else full paths."""
    leaves = sorted({name.rpartition(".")[2] for name in targets})
    named = {n for n, _ in model.named_modules() if n.rpartition(".")[2] in leaves}
    return leaves if named == set(targets) else list(targets)


def _settings(config: dict[str, Any], tensors: dict[str, Tensor]) -> LoraSettings:
    modules = tuple(sorted({n.rpartition(".")[0] for n in tensors if n.endswith("lora_A")}))
    return LoraSettings(
        r=int(config["r"]),
        lora_alpha=float(config["lora_alpha"]),
        lora_dropout=float(config.get("lora_dropout") or 0.0),
        target_modules=modules or ALL_LINEAR,
        use_rslora=bool(config.get("use_rslora")),
        bias=Bias(config.get("bias") or "none"),
    )
