"""A training run from plan to verified adapter."""

import gc
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

import welltuned
from welltuned.adapters.verify import TensorCheck, check_tensors, require_learned, sha256
from welltuned.advice.plan import Plan, plan_to_yaml, require_memory
from welltuned.errors import InputError, RunError
from welltuned.facts.machine import Device
from welltuned.models.adapter_file import save_adapter
from welltuned.models.fingerprint import fingerprint
from welltuned.models.four_bit import make_room
from welltuned.models.fuse import Fused, find_head, fuse
from welltuned.models.load import load_model
from welltuned.models.lora import AdapterBank
from welltuned.models.oom import is_out_of_memory, release_memory
from welltuned.models.packed import packed_model, packs
from welltuned.models.parts import idle_parts
from welltuned.models.recompute import HostCheckpoints, checkpoint_layers
from welltuned.models.tokenizer import in_short
from welltuned.recipe import Method, Tune, recipe_to_yaml
from welltuned.training.averaged import finish_average
from welltuned.training.best import take_best
from welltuned.training.checkpoint import Checkpoint, Position
from welltuned.training.durable import BESIDE, remove_folder, settle_folder
from welltuned.training.events import Note, Observer, silent
from welltuned.training.grpo_step import grpo_objective
from welltuned.training.healing import halved
from welltuned.training.identity import identity_of, versions
from welltuned.training.interrupt import interruptible
from welltuned.training.keeper import Keeper, require_disk
from welltuned.training.loop import Loop, Setting
from welltuned.training.preference import METHODS, preference_objective
from welltuned.training.prepare import Prepared
from welltuned.training.process import allocator_keeps_memory, memory_used, return_freed_memory
from welltuned.training.rundir import (
    ADAPTER,
    AVERAGE,
    MODEL,
    PLAN,
    RECIPE,
    RUN,
    STARTED,
    RunDir,
    Started,
    read_started,
    require_free,
)
from welltuned.training.settings import adamw_settings as adamw_settings
from welltuned.training.settings import room_of
from welltuned.training.shown import When, ask, keep_replies, keep_rows, questions
from welltuned.training.snapshot import Origin
from welltuned.training.speed import remember_speed
from welltuned.training.starting import DTYPES, fill_loftq, save_model, score_at_start, trained_parts
from welltuned.training.step import Engine, Evaluation, Objective, Supervised, Trained
from welltuned.training.trackers import require_trackers, tracked
from welltuned.training.watch import is_divergence, monitor
from welltuned.training.watcher import MakeWatch

MOST_ORIGINS = 1_000  # held-out rows named in run.json


@dataclass(frozen=True, slots=True)
class Ready:
    """A loaded model with what trains on it and by what objective, before the first update."""

    engine: Engine
    objective: Objective
    fused: Fused
    notes: tuple[str, ...]

    @property
    def model(self) -> PreTrainedModel:
        return self.engine.model


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


def make_ready(plan: Plan, arms: Sequence[Plan] = ()) -> Ready:
    """Load the model, put adapters on it (or free all of it), and fuse what is understood.

    Args:
        arms: the plans of several adapters in one bank, which share all but the adapters' settings with `plan`.
    """
    recipe = plan.recipe
    if recipe.tune is Tune.FULL and plan.value("dtype") != "float32":
        raise InputError("full fine-tuning trains float32 weights", where="dtype", mend="remove it, or use tune: lora")
    device = "cuda" if plan.facts.machine.device is Device.CUDA else "cpu"
    dtype = torch.float32 if recipe.tune is Tune.FULL else DTYPES[plan.value("dtype")]
    model = load_model(recipe.model, dtype=dtype, device=device, nf4=recipe.tune is Tune.QLORA, trust=recipe.trust)
    room = room_of(plan)
    make_room(model, dense=room.dense_base)
    idle = idle_parts(model)
    trained: Trained = trained_parts(model, plan, idle, arms)
    lost = fill_loftq(trained, plan) if isinstance(trained, AdapterBank) else ()
    fused = fuse(model, trained if isinstance(trained, AdapterBank) else None)
    head = find_head(model)
    notes = [*lost, *fused.sentences(), *(f"text never reaches {name}, which stays as it is" for name in idle)]
    if head is None:
        notes.append("the output head does something this engine does not know: the model's own logits are used")
    if not packs(model):
        notes.append("this model's own code carries state along a row, so examples run one at a time, not packed")
    if room.recompute:
        checkpoint_layers(model, fused, room.layers, HostCheckpoints(model.device) if room.offload else None)
    budget = plan.value("token_budget") if plan.value("packing") else 1  # 1: every example by itself
    return Ready(Engine(model, trained, head, budget), Supervised(), fused, tuple(notes))


def train(
    prepared: Prepared,
    out: Path,
    observer: Observer = silent,
    before_training: Callable[[Ready], None] | None = None,
    make_watch: MakeWatch = monitor,
) -> RunResult:
    """Train as planned and write a Run to `out`.

    Args:
        before_training: called with the loaded model before the first update (the demo asks it for replies there).
        make_watch: makes who watches the run.

    Raises:
        InputError: the plan does not fit into memory or the Run onto the disk, or `out` is not empty.
        RunError: numbers stayed not finite, a trained tensor did not move, or the result could not be written.
        Interrupted: a signal ended the run, after a save.
    """
    require_memory(prepared.plan)
    require_trackers(prepared.recipe)
    require_free(out)
    with on_this_machine(prepared.plan):
        ready = make_ready(prepared.plan)  # what is wrong with the model shows here, before anything is written
        ready = with_objective(ready, prepared, observer)
        disk = _require_disk(prepared.plan, ready, out)
        with closing(RunDir(out)) as directory:
            begin(directory, prepared, identity_of(prepared))
            course = Course(prepared, ready, directory, observer, make_watch, notes=disk)
            return course.run(before_training)


def with_objective(ready: Ready, prepared: Prepared, observer: Observer) -> Ready:
    """The same with its method's objective. To be called before a checkpoint is restored: it may ask the model as it
    starts."""
    if prepared.recipe.method is Method.GRPO:
        return replace(ready, objective=grpo_objective(prepared, ready.engine))
    if prepared.recipe.method not in METHODS:
        return ready
    rows = prepared.train, prepared.held_out, prepared.mixture
    notes: list[str] = []
    while True:
        found: list[str] = []
        budget = ready.engine.token_budget
        try:
            objective = preference_objective(
                ready.engine, prepared.plan, *rows, found.append, lambda t: observer(Note(t))
            )
            return replace(ready, objective=objective, notes=(*ready.notes, *notes, *found))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or budget <= 1:
                raise
        release_memory()  # here the failed pass is gone, which the traceback kept alive
        ready = replace(ready, engine=replace(ready.engine, token_budget=halved(budget, None)))
        notes = [
            "asking the reference ran out of memory: micro-batches hold at most "
            f"{ready.engine.token_budget:,} tokens, not {budget:,}; the effective batch stays the same"
        ]


def begin(directory: RunDir, prepared: Prepared, identity: Mapping[str, Any], before: Started | None = None) -> None:
    """Write what the run is asked and planned to be; a run that goes on changed keeps its id."""
    run = before.run if before is not None else secrets.token_hex(8)
    with disk_errors(directory.path):
        directory.write(RECIPE, recipe_to_yaml(prepared.recipe))
        directory.write(PLAN, plan_to_yaml(prepared.plan))
        started = Started(run=run, directory=os.getcwd(), identity=identity)
        directory.write_json(STARTED, {"format": 1, "time": time.time(), **asdict(started), "versions": versions()})


@dataclass(frozen=True, slots=True)
class Course:
    """One process's part of a run: from the start, or from a checkpoint, to the verified adapter."""

    prepared: Prepared
    ready: Ready
    directory: RunDir
    observer: Observer
    make_watch: MakeWatch
    notes: tuple[str, ...] = ()
    found: Checkpoint | None = None

    def run(self, before_training: Callable[[Ready], None] | None = None) -> RunResult:
        prepared, ready, directory, plan = self.prepared, self.ready, self.directory, self.prepared.plan
        started = read_started(directory.path)
        start_hashes = _hashes(ready.engine.trained)
        keeper = Keeper(directory.path, plan.value("save_total_limit"), directory.sync_metrics)
        setting = Setting(
            engine=ready.engine,
            objective=ready.objective,
            prepared=prepared,
            directory=directory,
            keeper=keeper,
            origin=Origin(started.run, started.identity, versions()),
        )
        heard = tracked(self.observer, plan, directory.path, started.run)
        with interruptible() as asked, disk_errors(directory.path), heard as observer:
            loop = Loop(setting, observer, self.make_watch, asked)
            if self.found is None:
                directory.cut_metrics(0)
                directory.cut_samples(-1)
                for text in (*prepared.notes, *(text for text in ready.notes if text not in plan.warnings)):
                    loop.tell(Note(text))
                keep_rows(directory.path, prepared)
                if before_training is not None:
                    before_training(ready)
                self._ask(loop, When.BEFORE)
            else:
                loop.restore(self.found)
            for text in (*self.notes, *((directory.lock.note,) if directory.lock.note else ())):
                loop.tell(Note(text))
            return_freed_memory()
            try:
                with packed_model(ready.model):
                    loop.run()
                    self._require_result(loop, from_best=take_best(loop))
                    averaged = finish_average(loop, _beside(directory.path / AVERAGE), self._origin())
                return self._finished(loop, start_hashes, averaged)
            except BaseException:
                with suppress(Exception):  # what ended the run is what is told
                    keeper.join()
                raise

    def _require_result(self, loop: Loop, *, from_best: bool) -> None:
        if is_divergence(loop.at.ended, loop.watch.findings) and not from_best:
            run = self.directory.path
            mend = f"lower learning_rate in {run / RECIPE} and: welltuned resume {run} --accept-changes"
            raise RunError(f"{loop.at.ended}; no better weights were kept, so there is no result; {mend}")

    def _ask(self, loop: Loop, when: When) -> None:
        """Have some held-out prompts answered, for the report; that it fails is no reason to end a run."""
        asked = questions(self.prepared)
        if not asked:
            return
        try:
            keep_replies(self.directory.path, asked, when, ask(self.ready.model, self.prepared, asked))
        except Exception as error:
            loop.tell(Note(f"no held-out prompt could be answered for the report: {in_short(error)}"))

    def _origin(self) -> dict[str, Any]:
        """What is noted beside the average of the weights, so that it can be asked without its Run."""
        recipe = self.prepared.recipe
        named = {"model": recipe.model, "tune": str(recipe.tune), "chat_template": self.prepared.chat_template}
        return {"made": "train (ema_decay)", "from": str(self.directory.path), **named}

    def _finished(self, loop: Loop, start_hashes: dict[str, str], averaged: dict[str, Any] | None) -> RunResult:
        """Verify and save the result; run.json comes last."""
        at, device = loop.at, self.prepared.plan.facts.machine.device
        result = RunResult(
            path=self.directory.path,
            engine=replace(self.ready.engine, token_budget=at.token_budget),
            updates=at.step,
            before=at.before,
            after=at.last if at.last is not None else at.before,
            checks=verify_and_save(self.ready.engine, self.prepared, self.directory, start_hashes, at),
            seconds=at.elapsed + loop.since_save(),
            tokens_per_second=at.tokens / at.seconds if at.seconds else 0.0,
            peak_memory=memory_used(device).peak,
            diverged=at.ended if is_divergence(at.ended, loop.watch.findings) else None,
        )
        summary = summary_of(self.prepared, self.ready, result) | ({} if averaged is None else {"ema": averaged})
        self._ask(loop, When.AFTER)
        self.directory.write_json(
            RUN,
            {
                **summary,
                **_watched(at, loop),
                "diverged": result.diverged,
                "healed": _healed(at),
                "saving": asdict(loop.setting.keeper.cost),
            },
        )
        remember_speed(self.prepared.plan, result.tokens_per_second, at.seconds)
        return result


def _watched(at: Position, loop: Loop) -> dict[str, Any]:
    """What the monitor said, and decided."""
    findings = [finding.to_json() for finding in loop.watch.findings]
    return {"stop_reason": at.ended, "best_step": loop.watch.best_step, "findings": findings}


def _healed(at: Position) -> dict[str, Any]:
    """What the run did about its own faults."""
    return {
        "updates_left_out": at.skipped,
        "returns_to_a_checkpoint": at.returns,
        "rate_factor": at.rate_factor,
        "token_budget": at.token_budget,
    }


@contextmanager
def on_this_machine(plan: Plan) -> Iterator[None]:
    """The allocator's settings for a run; out of memory while a model is loaded is a sentence."""
    with allocator_keeps_memory(plan.facts.machine.device):
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            mend = "close other programs, use --tune qlora, or a smaller model"
            raise RunError(f"there is not enough memory for this model; {mend}") from error


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


def _require_disk(plan: Plan, ready: Ready, out: Path) -> tuple[str, ...]:
    trained = ready.engine.trained.flat_KP.nbytes
    kept = 4 if "ema_decay" in plan.choices else 3  # weights, two moments, an average
    note = require_disk(out, kept * trained, trained, plan.value("save_total_limit"))
    return () if note is None else (note,)


def _hashes(trained: Trained) -> dict[str, str]:
    """What full fine-tuning starts from; an adapter bank remembers its own start."""
    if isinstance(trained, AdapterBank):
        return {}
    return {name: sha256(tensor) for name, tensor in trained.tensors().items()}


def verify_and_save(
    engine: Engine, prepared: Prepared, directory: RunDir, start_hashes: dict[str, str], at: Position
) -> tuple[TensorCheck, ...]:
    """Compare every trained tensor with its start, and write the result: beside its place, durable, then renamed."""
    trained, plan = engine.trained, prepared.plan
    made = at.step - at.skipped
    if isinstance(trained, AdapterBank):
        checks = check_tensors(trained.tensors(), trained.tensors_at_start())
        require_learned(checks, made)
        with _beside(directory.path / ADAPTER) as folder:
            save_adapter(trained, folder, base=str(engine.model.config.name_or_path))
        return checks
    with reloaded(plan) as start:
        changed = [name for name, digest in start_hashes.items() if sha256(start[name]) != digest]
        if changed:
            raise RunError(f"the base model on disk changed while it was trained ({changed[0]})")
        checks = check_tensors(trained.tensors(), start)
    require_learned(checks, made)
    with _beside(directory.path / MODEL) as folder:
        save_model(engine.model, plan.recipe.method, folder)
        prepared.tokenizer.save_pretrained(folder)
    return checks


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A folder to be filled, which gets its name once all in it is on the disk."""
    beside = target.with_name(target.name + BESIDE)
    if beside.exists():
        remove_folder(beside)
    yield beside
    settle_folder(beside, target)


@contextmanager
def reloaded(plan: Plan) -> Iterator[dict[str, torch.Tensor]]:
    """The base model's parameters once more from disk, to compare with; freed afterwards."""
    base = load_model(plan.recipe.model, dtype=torch.float32, trust=plan.recipe.trust)
    try:
        yield {name: p.detach() for name, p in base.named_parameters()} | dict(score_at_start(plan, base))
    finally:
        del base
        gc.collect()


def _base_weights(engine: Engine) -> dict[str, str]:
    """What the adapter stands on, so that it is not put on another base later."""
    if not isinstance(engine.trained, AdapterBank):
        return {}
    return fingerprint(engine.model, [slot.name for slot in engine.trained.slots])


def summary_of(prepared: Prepared, ready: Ready, result: RunResult) -> dict[str, Any]:
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
        "base_weights": _base_weights(ready.engine),
        "fused": dict(ready.fused.done),
        "notes": [*prepared.notes, *ready.notes],
        "mixture": asdict(prepared.mixture),
        "audit": prepared.audit.to_json(),
        "trained_tensors": [asdict(check) for check in result.checks],
        "versions": {
            "welltuned": welltuned.__version__,
            **{name: version(name) for name in ("torch", "transformers", "numpy")},
        },
    }
