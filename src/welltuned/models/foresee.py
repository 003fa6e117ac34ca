"""What will stay on the model's own code, said before any weights are read.

For plain configurations of well-known families that is known to be nothing. Else the model is built without its weights
(3 s, most of them torch's), and what was found is kept beside the cached tokens.
"""

import json
from typing import Any

from welltuned.models.memo import file_digest, remembered, versions
from welltuned.models.resolve import NO_TRUST, ModelSource, SourceKind, resolve
from welltuned.models.whole import is_whole
from welltuned.recipe import ALL_LINEAR, Trust

ONE_BY_ONE = "this model's own code carries state along a row, so examples run one at a time, not packed"


def foresee(
    model: str,
    target_modules: str | tuple[str, ...] | None = ALL_LINEAR,
    *,
    nf4: bool = False,
    trust: Trust = NO_TRUST,
) -> tuple[str, ...]:
    """Sentences on what cannot be made faster, as `Fused.sentences` says them after loading.

    Args:
        target_modules: what will get adapters; None for full fine-tuning.
        nf4: whether the base will be stored in 4 bits, experts included.

    Raises:
        InputError: no model can be built from the configuration.
    """
    source = resolve(model, weights_needed=False, trust=trust)
    if source.kind is SourceKind.FOLDER and is_whole(_config(source), target_modules):
        return ()

    def build() -> list[str]:
        from welltuned.models.skeleton import left_plain

        return list(left_plain(model, target_modules, nf4=nf4, trust=trust))

    content = _content(source)
    if content is None:
        return tuple(build())
    parts = {"content": content, "targets": target_modules, "nf4": nf4, **versions()}
    return tuple(remembered("foreseen", parts, build))


def _config(source: ModelSource) -> dict[str, Any]:
    """Empty where it cannot be read: whoever builds the model says what is wrong with it."""
    assert source.path is not None
    try:
        config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _content(source: ModelSource) -> Any:
    """What the configuration depends on; None where only the hub knows."""
    if source.path is None:
        return None
    if source.kind is SourceKind.FOLDER:
        return file_digest(source.path / "config.json")
    stat = source.path.stat()
    return [str(source.path.resolve()), stat.st_size, stat.st_mtime_ns]
