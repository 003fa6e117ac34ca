"""AdapterFacts: what the adapter is that training goes on from, read from its configuration without torch."""

import json
from dataclasses import dataclass
from pathlib import Path

from welltuned.errors import InputError

CONFIG = "adapter_config.json"
OF_RUN = "adapter"  # where a Run keeps its own


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """`target_modules` are the last parts of the names, without repeats; empty where the file has a pattern instead."""

    folder: str
    r: int
    lora_alpha: float
    use_rslora: bool
    bias: str
    target_modules: tuple[str, ...]
    base: str | None


def read_adapter_facts(spec: str) -> AdapterFacts:
    """Of a Run, or of a folder in PEFT's format.

    Raises:
        InputError: there is none, or its configuration is not one of LoRA.
    """
    path = Path(spec).expanduser()
    folder = next((f for f in (path / OF_RUN, path) if (f / CONFIG).is_file()), None)
    if folder is None:
        mend = f"give a Run, or a folder with {CONFIG}"
        raise InputError("there is no adapter", where=f"adapter: {spec}", mend=mend)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        names = config["target_modules"]
        listed = names if isinstance(names, list) else []
        return AdapterFacts(
            folder=str(folder),
            r=int(config["r"]),
            lora_alpha=float(config["lora_alpha"]),
            use_rslora=bool(config.get("use_rslora")),
            bias=str(config.get("bias") or "none"),
            target_modules=tuple(sorted({str(name).rpartition(".")[2] for name in listed})),
            base=config.get("base_model_name_or_path"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{CONFIG} is not that of a LoRA adapter ({error!r})"
        raise InputError(what, where=str(folder), mend="give the adapter's own folder") from error
