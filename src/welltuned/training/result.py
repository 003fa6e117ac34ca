"""The end of a run: what was trained compared with its start, saved, and what run.json says of it."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

import welltuned
from welltuned.adapters.verify import TensorCheck, check_tensors, require_learned, sha256
from welltuned.advice.plan import Plan
from welltuned.errors import RunError
from welltuned.models.adapter_file import save_adapter
from welltuned.models.fingerprint import fingerprint
from welltuned.models.fuse import Fused
from welltuned.models.load import load_model
from welltuned.models.lora import AdapterBank
from welltuned.training.checkpoint import Position
from welltuned.training.durable import BESIDE, remove_folder, settle_folder
from welltuned.training.loop import Loop
from welltuned.training.prepare import Prepared
from welltuned.training.rundir import ADAPTER, MODEL, RunDir
from welltuned.training.starting import save_model, score_at_start
from welltuned.training.step import Engine, Evaluation

MOST_ORIGINS = 1_000  # held-out rows named in run.json


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a finished run found.

    Attributes:
        engine: None where it was trained in another process.
        before, after: None where no row was held out.
        diverged: why training ended early, where it diverged; the result is the best weights before that.
    """

    path: Path
    engine: Engine | None
    updates: int
    before: Evaluation | None
    after: Evaluation | None
    checks: tuple[TensorCheck, ...]
    seconds: float
    tokens_per_second: float
    peak_memory: int
    diverged: str | None = None


def watched(at: Position, loop: Loop) -> dict[str, Any]:
    """What the monitor said, and decided."""
    findings = [finding.to_json() for finding in loop.watch.findings]
    return {"stop_reason": at.ended, "best_step": loop.watch.best_step, "findings": findings}


def healed(at: Position) -> dict[str, Any]:
    """What the run did about its own faults."""
    return {
        "updates_left_out": at.skipped,
        "returns_to_a_checkpoint": at.returns,
        "rate_factor": at.rate_factor,
        "token_budget": at.token_budget,
    }


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the disk refuses ends a run with a sentence."""
    try:
        yield
    except OSError as error:
        place = error.filename or path
        raise RunError(f"{place} could not be written ({error.strerror}); what was saved before is intact") from error
    except SafetensorError as error:  # the disk's own words are within: "... I/O error: No space left on device ..."
        reason = str(error).rpartition("I/O error: ")[2]
        raise RunError(f"{path} could not be written ({reason}); what was saved before is intact") from error


def verify_and_save(
    engine: Engine, prepared: Prepared, directory: RunDir, start_hashes: dict[str, str], at: Position
) -> tuple[TensorCheck, ...]:
    """Compare every trained tensor with its start, and write the result: beside its place, durable, then renamed."""
    trained, plan = engine.trained, prepared.plan
    made = at.step - at.skipped
    if isinstance(trained, AdapterBank):
        checks = check_tensors(trained.tensors(), trained.tensors_at_start())
        require_learned(checks, made)
        with beside(directory.path / ADAPTER) as folder:
            save_adapter(trained, folder, base=str(engine.model.config.name_or_path))
        return checks
    with reloaded(plan) as start:
        changed = [name for name, digest in start_hashes.items() if sha256(start[name]) != digest]
        if changed:
            raise RunError(f"the base model on disk changed while it was trained ({changed[0]})")
        checks = check_tensors(trained.tensors(), start)
    require_learned(checks, made)
    with beside(directory.path / MODEL) as folder:
        save_model(engine.model, plan.recipe.method, folder)
        prepared.tokenizer.save_pretrained(folder)
    return checks


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A folder to be filled, which gets its name once all in it is on the disk."""
    place = target.with_name(target.name + BESIDE)
    if place.exists():
        remove_folder(place)
    yield place
    settle_folder(place, target)


@contextmanager
def reloaded(plan: Plan) -> Iterator[dict[str, torch.Tensor]]:
    """The base model's parameters once more from disk, to compare with; freed afterwards."""
    base = load_model(plan.recipe.model, dtype=torch.float32, trust=plan.recipe.trust)
    try:
        yield {name: p.detach() for name, p in base.named_parameters()} | dict(score_at_start(plan, base))
    finally:
        del base
        gc.collect()


def _base_weights(engine: Engine | None) -> dict[str, str]:
    """What the adapter stands on, so that it is not put on another base later."""
    if engine is None or not isinstance(engine.trained, AdapterBank):
        return {}
    if engine.shards is not None:
        return dict(engine.shards.base_weights)
    return fingerprint(engine.model, [slot.name for slot in engine.trained.slots])


def summary_of(prepared: Prepared, fused: Fused, notes: Sequence[str], result: RunResult) -> dict[str, Any]:
    """What run.json says of a result; `notes` are those of the loaded model."""

    def loss(found: Evaluation | None) -> dict[str, float] | None:
        if found is None:
            return None
        return {"loss": found.loss, "standard_error": found.standard_error, **found.measures}

    return {
        "format": 1,
        "model": prepared.recipe.model,
        "method": str(prepared.recipe.method),
        "tune": str(prepared.recipe.tune),
        "chat_template": prepared.chat_template,
        "chat_template_kwargs": prepared.recipe.chat_template_kwargs,
        "updates": result.updates,
        "held_out": {
            "rows": len(prepared.held_out),
            "origins": [e.origin for e in prepared.held_out[:MOST_ORIGINS]],
            "before": loss(result.before),
            "after": loss(result.after),
        },
        "seconds": round(result.seconds, 1),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "peak_memory_bytes": result.peak_memory,
        "memory_forecast_bytes": prepared.plan.memory.total_bytes,
        "base_weights": _base_weights(result.engine),
        "fused": dict(fused.done),
        "notes": [*prepared.notes, *notes],
        "mixture": asdict(prepared.mixture),
        "audit": prepared.audit.to_json(),
        "trained_tensors": [asdict(check) for check in result.checks],
        "versions": {
            "welltuned": welltuned.__version__,
            **{name: version(name) for name in ("torch", "transformers", "numpy")},
        },
    }
