"""EleutherAI's lm-evaluation-harness, given a run: its tasks and metrics are its own, the model is ours."""

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from welltuned.errors import InputError, RunError
from welltuned.finished.find import Finished, device_of_choice
from welltuned.models.resolve import SourceKind, resolve


def command(finished: Finished, tasks: str, *, out: Path | None = None, more: Sequence[str] = ()) -> list[str]:
    """The command line that evaluates the run there.

    Raises:
        InputError: the harness is not installed, or cannot load such a base.
    """
    if find_spec("lm_eval") is None:
        mend = "pip install 'welltuned[eval]' (which brings lm-eval), or leave --tasks out"
        raise InputError("lm-evaluation-harness is not installed", where="--tasks", mend=mend)
    line = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", ",".join(model_arguments(finished))]
    line += ["--tasks", tasks, "--device", device_of_choice()]
    if finished.chat_template is not None:
        line.append("--apply_chat_template")
    return [*line, *(["--output_path", str(out)] if out is not None else []), *more]


def model_arguments(finished: Finished) -> list[str]:
    """What tells the harness to load the base with the adapter on it, or the whole model."""
    source = resolve(finished.model)
    if source.kind is SourceKind.GGUF:
        mend = "export --to merged first, and give that folder: welltuned eval MERGED --tasks …"
        raise InputError("the harness loads no GGUF base", where=finished.model, mend=mend)
    name = source.name if source.path is None else str(source.path)
    dtype = "float32" if device_of_choice() == "cpu" else "bfloat16"
    arguments = [f"pretrained={name}", f"dtype={dtype}"]
    if finished.adapter is not None:
        if find_spec("peft") is None:
            raise InputError("the harness needs PEFT to load an adapter", where="--tasks", mend="pip install peft")
        arguments.append(f"peft={finished.adapter}")
    if finished.nf4 and finished.adapter is not None:
        arguments += ["load_in_4bit=True", "bnb_4bit_quant_type=nf4", "bnb_4bit_use_double_quant=True"]
        arguments.append(f"bnb_4bit_compute_dtype={'float32' if not torch.cuda.is_available() else 'bfloat16'}")
    return arguments


def run_harness(line: Sequence[str]) -> None:
    """Run it; what it prints goes where ours goes.

    Raises:
        RunError: it failed.
    """
    done = subprocess.run(list(line), check=False, stdout=sys.stderr)
    if done.returncode:
        raise RunError(f"lm-evaluation-harness failed with exit code {done.returncode}")
