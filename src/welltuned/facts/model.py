"""ModelFacts: what is known of a model from its configuration and its files' headers, without torch."""

import json
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from welltuned.errors import InputError
from welltuned.facts.architecture import (
    Architecture,
    LinearShape,
    architecture_from_config,
    is_meant,
    stored_linears,
    stored_parameters,
)
from welltuned.facts.weights import StoredTensor, gguf_config, gguf_header, safetensors_headers
from welltuned.models.resolve import NO_TRUST, ModelSource, SourceKind, resolve
from welltuned.recipe import Trust


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """`parameters_exact` is False where neither the family's rule nor stored weights could be counted."""

    id: str
    source: SourceKind
    family: str
    parameters: int
    active_parameters: int
    parameters_exact: bool
    trunk_linear_parameters: int
    active_trunk_linear_parameters: int
    hidden_size: int
    layers: int
    vocabulary: int
    tied_head: bool
    attention_width: int
    key_value_width: int
    heads: int
    intermediate_size: int
    gated_mlp: bool
    norms: int
    qk_norm: bool
    plain_attention: bool
    experts: int
    active_experts: int
    context_length: int | None
    has_chat_template: bool
    dtype: str
    quantized: str | None
    lora_shapes: tuple[LinearShape, ...]

    @property
    def head_parameters(self) -> int:
        """The output head, tied or not: what every labelled token is multiplied with."""
        return self.vocabulary * self.hidden_size

    @property
    def module_names(self) -> tuple[str, ...]:
        """Names that a target may have: every linear layer that is a module of its own."""
        return tuple(dict.fromkeys(shape.name for shape in self.lora_shapes if not shape.expert))

    def adapted(self, targets: Iterable[str] | None) -> tuple[LinearShape, ...]:
        """What gets adapters; None targets every linear layer, which experts are not."""
        if targets is None:
            return tuple(shape for shape in self.lora_shapes if not shape.expert)
        return tuple(shape for shape in self.lora_shapes if any(is_meant(shape, target) for target in targets))

    def lora_parameters(self, r: int, targets: Iterable[str] | None = None, expert_r: int | None = None) -> int:
        """r · Σ(in + out) over what is targeted; None targets all linear layers. A gate and its up share one A."""
        shapes = self.adapted(targets)
        gated = any(shape.expert and shape.name == "gate_proj" for shape in shapes)
        total = 0
        for shape in shapes:
            inputs = 0 if gated and shape.expert and shape.name == "up_proj" else shape.inputs
            total += ((expert_r or r) if shape.expert else r) * (inputs + shape.outputs) * shape.count
        return total


def read_model_facts(model: str, *, weights_needed: bool = True, trust: Trust = NO_TRUST) -> ModelFacts:
    """Resolve a model and read what its configuration and headers say. Never loads a weight, never imports torch."""
    source = resolve(model, weights_needed=weights_needed, trust=trust)
    if source.kind is SourceKind.GGUF:
        return _gguf_facts(source)
    if source.kind is SourceKind.FOLDER:
        assert source.path is not None
        return _folder_facts(source, source.path)
    return _hub_facts(source)


def _gguf_facts(source: ModelSource) -> ModelFacts:
    assert source.path is not None
    header = gguf_header(source.path)
    config = gguf_config(header, source.path)
    template = isinstance(header.fields.get("tokenizer.chat_template"), str)
    return _facts(source, config, header.tensors, template, str(source.path))


def _folder_facts(source: ModelSource, path: Path) -> ModelFacts:
    config = _json(path / "config.json")
    tokenizer = path / "tokenizer_config.json"
    template = any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))
    if not template and tokenizer.is_file():
        template = bool(_json(tokenizer).get("chat_template"))
    return _facts(source, config, safetensors_headers(path), template, str(path / "config.json"))


def _hub_facts(source: ModelSource) -> ModelFacts:
    config_path = _hub_file(source.name, "config.json")
    if config_path is None:
        mend = "give the id of a transformers model"
        raise InputError("the hub repository has no config.json", where=source.name, mend=mend)
    tokenizer = _hub_file(source.name, "tokenizer_config.json")
    template = tokenizer is not None and bool(_json(tokenizer).get("chat_template"))
    template = template or _hub_file(source.name, "chat_template.jinja") is not None
    return _facts(source, _json(config_path), (), template, source.name)


def _facts(
    source: ModelSource, config: Mapping[str, Any], tensors: tuple[StoredTensor, ...], template: bool, where: str
) -> ModelFacts:
    built: Architecture = architecture_from_config(config, where)
    counted = stored_parameters(tensors, built.tied_head) if tensors else None
    linears = built.linears if built.exact else stored_linears(tensors) or built.linears
    idle = built.parameters - built.active_parameters
    parameters = built.parameters if counted is None else counted
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    dtype = next((c[key] for c in (config, inner) for key in ("dtype", "torch_dtype") if c.get(key)), "float32")
    quantization = config.get("quantization_config")
    return ModelFacts(
        id=source.name,
        source=source.kind,
        family=built.family,
        parameters=parameters,
        active_parameters=parameters - idle,
        parameters_exact=built.exact or counted is not None,
        trunk_linear_parameters=sum(shape.parameters for shape in linears),
        active_trunk_linear_parameters=sum(shape.inputs * shape.outputs * shape.active for shape in linears),
        hidden_size=built.hidden_size,
        layers=built.layers,
        vocabulary=built.vocabulary,
        tied_head=built.tied_head,
        attention_width=built.attention_width,
        key_value_width=built.key_value_width,
        heads=built.heads,
        intermediate_size=built.intermediate_size,
        gated_mlp=built.gated_mlp,
        norms=built.norms,
        qk_norm=built.qk_norm,
        plain_attention=built.plain_attention,
        experts=built.experts,
        active_experts=built.active_experts,
        context_length=built.context_length,
        has_chat_template=template,
        dtype=str(dtype).removeprefix("torch."),
        quantized=str(quantization.get("quant_method", "yes")) if isinstance(quantization, Mapping) else None,
        lora_shapes=linears,
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"not readable as JSON: {error}", where=str(path), mend="download the model again") from error
    if not isinstance(value, dict):
        raise InputError("not a JSON object", where=str(path), mend="download the model again")
    return value


# ── the hub ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _hub_file(repository: str, name: str) -> Path | None:
    """A small file of a hub repository: from the cache where it lies there, else downloaded; None if it has none."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    unreachable = InputError(
        "the model hub cannot be reached and the model is not in its cache",
        where=repository,
        mend="check the network, or give a local model folder or GGUF file",
    )
    try:
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
        if not _hub_answers():  # the hub client alone retries for 20 s and more
            if try_to_load_from_cache(repository, "config.json") is None:
                raise unreachable
            return None
        return Path(hf_hub_download(repository, name))
    except GatedRepoError as error:
        mend = "accept its licence on the hub and log in with `hf auth login`"
        raise InputError("access to this model is restricted", where=repository, mend=mend) from error
    except RepositoryNotFoundError as error:
        mend = "check the spelling; a local folder must exist; a private model needs `hf auth login`"
        raise InputError("the hub has no such model", where=repository, mend=mend) from error
    except LocalEntryNotFoundError as error:
        raise unreachable from error
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise InputError("not a hub id", where=repository, mend="write it as org/name") from error
    except (HfHubHTTPError, OSError) as error:
        raise unreachable from error


def _hub_answers() -> bool:
    """Whether the hub's name resolves. Behind a proxy only the proxy can know, so the client may try."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        return False
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or "huggingface.co"
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
