"""Fine-tune language models with LoRA, QLoRA or in full, with every hyperparameter chosen from evidence.

Importing the package costs nothing: each public name brings its module, and torch with it, when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "LoraSettings",
    "__version__",
    "attach",
    "average",
    "evaluate",
    "export",
    "inspect",
    "load",
    "merge",
    "plan",
    "resume",
    "scale",
    "sweep",
    "train",
    "verify",
    "write_report",
]

_HOMES = {
    "attach": "welltuned.models.lora",
    "LoraSettings": "welltuned.models.lora",
} | {name: "welltuned.api" for name in __all__ if name not in ("LoraSettings", "attach", "__version__")}

if TYPE_CHECKING:
    from welltuned.api import (
        average,
        evaluate,
        export,
        inspect,
        load,
        merge,
        plan,
        resume,
        scale,
        sweep,
        train,
        verify,
        write_report,
    )
    from welltuned.models.lora import LoraSettings, attach
else:

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
