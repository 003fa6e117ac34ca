"""A training run from plan to verified adapter."""

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from welltuned.adapters.verify import TensorCheck, sha256
from welltuned.advice.plan import Plan, plan_to_yaml, require_memory
from welltuned.advice.rules import number
from welltuned.errors import InputError, RunError
from welltuned.facts.machine import Device
from welltuned.models.compiled import compile_layers
from welltuned.models.four_bit import make_room
from welltuned.models.full import FullParameters
from welltuned.models.fuse import Fused, find_head, fuse
from welltuned.models.load import load_model
from welltuned.models.lora import AdapterBank
from welltuned.models.oom import is_out_of_memory, release_memory
from welltuned.models.packed import packed_model, packs, prove_flex
from welltuned.models.parts import idle_parts
from welltuned.models.recompute import HostCheckpoints, checkpoint_layers
from welltuned.models.static import Static
from welltuned.models.tokenizer import in_short
from welltuned.recipe import OPTIMIZERS_8BIT, Method, Tune, recipe_to_yaml
from welltuned.training.averaged import finish_average
from welltuned.training.best import take_best
from welltuned.training.bystander import NoKeeper, run_files
from welltuned.training.checkpoint import Checkpoint
from welltuned.training.events import Compiled, Note, Observer, silent
from welltuned.training.grpo_server import require_server
from welltuned.training.grpo_step import grpo_objective
from welltuned.training.healing import halved
from welltuned.training.identity import identity_of, versions
from welltuned.training.in_pieces import lies_in_pieces, load_in_pieces
from welltuned.training.interrupt import interruptible
from welltuned.training.keeper import Keeper, require_disk
from welltuned.training.loop import Loop, Setting
from welltuned.training.on_machine import on_this_machine as on_this_machine
from welltuned.training.preference import METHODS, preference_objective
from welltuned.training.prepare import Prepared
from welltuned.training.prepare_together import sharing_notes
from welltuned.training.process import memory_used, return_freed_memory
from welltuned.training.ranks import ALONE, Group, Ranks
from welltuned.training.result import RunResult, beside, disk_errors, healed, summary_of, verify_and_save, watched
from welltuned.training.rundir import (
    AVERAGE,
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
from welltuned.training.starting import DTYPES, fill_loftq, same_start, trained_parts
from welltuned.training.step import Engine, Objective, Supervised, Trained
from welltuned.training.trackers import require_trackers, tracked
from welltuned.training.warming import report_of, warmed
from welltuned.training.watch import is_divergence, monitor
from welltuned.training.watcher import MakeWatch

T = TypeVar("T")
FORKED = (Method.DPO, Method.ORPO, Method.REWARD, Method.GRPO)  # whose answers are branches of a shared prompt


@dataclass(frozen=True, slots=True)
class Ready:
    """A loaded model with what trains on it and by what objective, before the first update.

    `static` and `compiled` are there where its layers are to be compiled, and once that has been tried.
    """

    engine: Engine
    objective: Objective
    fused: Fused
    notes: tuple[str, ...]
    static: Static | None = None
    compiled: Compiled | None = None

    @property
    def model(self) -> PreTrainedModel:
        return self.engine.model


def make_ready(plan: Plan, arms: Sequence[Plan] = (), ranks: Ranks = ALONE) -> Ready:
    """Load the model, put adapters on it (or free all of it), and fuse what is understood.

    Args:
        arms: the plans of several adapters in one bank, which share all but the adapters' settings with `plan`.
    """
    recipe = plan.recipe
    if recipe.tune is Tune.FULL and plan.value("dtype") != "float32":
        raise InputError("full fine-tuning trains float32 weights", where="dtype", mend="remove it, or use tune: lora")
    device = "cuda" if plan.facts.machine.device is Device.CUDA else "cpu"
    room, shards = room_of(plan), None
    lost: tuple[str, ...] = ()
    if lies_in_pieces(plan, ranks):
        cut = load_in_pieces(plan, ranks, torch.device(device))
        trained, idle, shards = cut.trained, cut.idle, cut.shards
        model = trained.model
    else:
        dtype = torch.float32 if recipe.tune is Tune.FULL else DTYPES[plan.value("dtype")]
        model = load_model(recipe.model, dtype=dtype, device=device, nf4=recipe.tune is Tune.QLORA, trust=recipe.trust)
        make_room(model, dense=room.dense_base)
        idle = idle_parts(model)
        trained = trained_parts(model, plan, idle, arms)
        lost = fill_loftq(trained, plan) if isinstance(trained, AdapterBank) else ()
    look = _look if shards is None else shards.ask
    fused = look(lambda: fuse(model, trained if isinstance(trained, AdapterBank) else None))
    head = look(lambda: find_head(model))
    notes = [*lost, *fused.sentences(), *(f"text never reaches {name}, which stays as it is" for name in idle)]
    if head is None:
        notes.append("the output head does something this engine does not know: the model's own logits are used")
    packed = look(lambda: packs(model))
    if not packed:
        notes.append("this model's own code carries state along a row, so examples run one at a time, not packed")
    if recipe.method in FORKED and model.device.type == "cuda" and (problem := prove_flex(model)) is not None:
        notes.append(f"prompts that answers share are copied for each: FlexAttention is not used ({problem})")
    static = compile_layers(model, fused) if room.compiled else None
    if room.recompute:
        checkpoint_layers(model, fused, room.layers, HostCheckpoints(model.device) if room.offload else None)
    alone = not plan.value("packing") or (shards is not None and not packed)  # so that all ranks pass equally often
    budget = 1 if alone else plan.value("token_budget")  # 1: every example by itself
    return Ready(Engine(model, trained, head, budget, ranks, shards), Supervised(), fused, tuple(notes), static)


def _look(make: Callable[[], T]) -> T:
    return make()


def train(
    prepared: Prepared,
    out: Path,
    observer: Observer = silent,
    before_training: Callable[[Ready], None] | None = None,
    make_watch: MakeWatch = monitor,
    ranks: Ranks = ALONE,
) -> RunResult:
    """Train as planned and write a Run to `out`.

    Args:
        before_training: called with the loaded model before the first update (the demo asks it for replies there).
        make_watch: makes who watches the run.
        ranks: the processes that share the run; all of them call this with the same plan. The first one writes.

    Raises:
        InputError: the plan does not fit into memory or the Run onto the disk, or `out` is not empty.
        RunError: numbers stayed not finite, a trained tensor did not move, or the result could not be written.
        Interrupted: a signal ended the run, after a save.
    """
    require_memory(prepared.plan)
    ranks.first(lambda: _require_place(prepared, out))
    with on_this_machine(prepared.plan, ranks):
        ready = loaded(prepared, ranks, observer)  # what is wrong with the model shows before anything is written
        disk = ranks.first(lambda: _require_disk(prepared.plan, ready, out))
        with run_files(out, ranks) as directory:
            ranks.first(lambda: begin(directory, prepared, identity_of(prepared)))
            notes = (*disk, *sharing_notes(prepared, ranks))
            course = Course(prepared, ready, directory, observer, make_watch, notes=notes)
            return course.run(before_training)


def _require_place(prepared: Prepared, out: Path) -> None:
    require_trackers(prepared.recipe)
    require_server(prepared.plan)
    require_free(out)


def loaded(prepared: Prepared, ranks: Ranks, observer: Observer) -> Ready:
    """Model, adapters and objective of a prepared run, the same on all ranks."""
    with ranks.patient():
        if lies_in_pieces(prepared.plan, ranks):  # its passes wait for other ranks
            ready = make_ready(prepared.plan, ranks=ranks)
        else:
            ready = ranks.each(lambda: make_ready(prepared.plan, ranks=ranks))
        same_start(ready.engine.trained, ranks)
        ready = with_objective(ready, prepared, observer if ranks.is_first else silent)
        if ready.static is None:
            return ready
        return replace(ready, compiled=warmed(ready.engine, ready.static, ready.fused, prepared))


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
        ready, directory, ranks = self.ready, self.directory, self.ready.engine.ranks
        start_hashes = _hashes(ready.engine.trained) if ranks.is_first else {}
        setting, heard = self._setting()
        alive = interruptible(quiet=not ranks.is_first)
        with alive as asked, disk_errors(directory.path), heard as observer:
            loop = Loop(setting, observer, self.make_watch, asked)
            if ranks.first(lambda: self.found is None):
                self._open(loop, before_training)
            else:
                loop.restore(self.found)
            if ready.compiled is not None:
                loop.tell(ready.compiled)
            for text in (*self.notes, *((directory.lock_note,) if directory.lock_note else ())):
                loop.tell(Note(text))
            return_freed_memory()
            try:
                with packed_model(ready.model):
                    loop.run()
                    self._require_result(loop, from_best=take_best(loop))
                    averaged = finish_average(loop, beside(directory.path / AVERAGE), self._origin())
                with ranks.patient():
                    return self._finished(loop, start_hashes, averaged)
            except BaseException:
                with suppress(Exception):  # what ended the run is what is told
                    setting.keeper.join()
                raise

    def _setting(self) -> tuple[Setting, AbstractContextManager[Observer]]:
        """What the loop works on, and who hears of it: on ranks beside the first no files and nobody."""
        ready, directory, plan = self.ready, self.directory, self.prepared.plan
        made = partial(Setting, ready.engine, ready.objective, self.prepared, directory)
        if not ready.engine.ranks.is_first:
            return made(NoKeeper(), Origin("", {}, {})), nullcontext(silent)
        started = read_started(directory.path)
        keeper = Keeper(directory.path, plan.value("save_total_limit"), directory.sync_metrics)
        setting = made(keeper, Origin(started.run, started.identity, versions()))
        return setting, tracked(self.observer, plan, directory.path, started.run)

    def _open(self, loop: Loop, before_training: Callable[[Ready], None] | None) -> None:
        """What stands at the beginning of a new run's files, and what is asked of the model as it starts."""
        prepared, directory = self.prepared, self.directory
        directory.cut_metrics(0)
        directory.cut_samples(-1)
        for text in (*prepared.notes, *(text for text in self.ready.notes if text not in prepared.plan.warnings)):
            loop.tell(Note(text))

        def asked() -> None:
            keep_rows(directory.path, prepared)
            if before_training is not None:
                before_training(self.ready)
            self._ask(loop, When.BEFORE)

        loop.ranks.first(asked)

    def _require_result(self, loop: Loop, *, from_best: bool) -> None:
        if is_divergence(loop.at.ended, loop.watch.findings) and not from_best:
            run = self.directory.path
            mend = f"lower learning_rate in {run / RECIPE} and: welltuned resume {run} --accept-changes"
            raise RunError(f"{loop.at.ended}; no better weights were kept, so there is no result; {mend}")

    def _ask(self, loop: Loop, when: When) -> None:
        """Have some held-out prompts answered, for the report; that it fails is no reason to end a run."""
        asked = questions(self.prepared)
        if not asked or self.ready.engine.shards is not None:  # one process alone cannot ask a model in pieces
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
        at, engine = loop.at, replace(self.ready.engine, token_budget=loop.at.token_budget)
        device = self.prepared.plan.facts.machine.device
        result = RunResult(
            path=self.directory.path,
            engine=engine,
            updates=at.step,
            before=at.before,
            after=at.last if at.last is not None else at.before,
            checks=self._saved(loop, engine, start_hashes),
            seconds=at.elapsed + loop.since_save(),
            tokens_per_second=at.tokens / at.seconds if at.seconds else 0.0,
            peak_memory=max(loop.ranks.gather(lambda: memory_used(device).peak)),
            diverged=at.ended if is_divergence(at.ended, loop.watch.findings) else None,
        )
        loop.ranks.first(lambda: self._write_summary(loop, result, averaged))
        return result

    def _saved(self, loop: Loop, engine: Engine, start_hashes: dict[str, str]) -> tuple[TensorCheck, ...]:
        prepared, directory, pieces = self.prepared, self.directory, loop.numbers.pieces
        if pieces is None:
            return loop.ranks.first(lambda: verify_and_save(engine, prepared, directory, start_hashes, loop.at))
        from welltuned.training.gathered import save_gathered

        assert isinstance(loop.ranks, Group)
        return save_gathered(pieces, prepared, directory, loop.at, loop.ranks)

    def _write_summary(self, loop: Loop, result: RunResult, averaged: dict[str, Any] | None) -> None:
        summary = summary_of(self.prepared, self.ready.fused, self.ready.notes, result)
        self._ask(loop, When.AFTER)
        self.directory.write_json(
            RUN,
            {
                **summary,
                **({} if averaged is None else {"ema": averaged}),
                **watched(loop.at, loop),
                "diverged": result.diverged,
                "healed": healed(loop.at),
                "saving": asdict(loop.setting.keeper.cost),
                "processes": loop.ranks.size,
                **report_of(self.ready.compiled, self.ready.static),
            },
        )
        remember_speed(self.prepared.plan, result.tokens_per_second, loop.at.seconds)


def _require_disk(plan: Plan, ready: Ready, out: Path) -> tuple[str, ...]:
    trained, final = ready.engine.trained.flat_KP.nbytes, 1
    if isinstance(ready.engine.trained, FullParameters) and ready.engine.trained.in_pieces:
        trained, final = trained * ready.engine.ranks.size, 2  # gathered, and from there saved
    eight_bit = plan.value("optim") in OPTIMIZERS_8BIT
    moments = number("memory_adam_8bit_bytes" if eight_bit else "memory_adam_bytes") / number("memory_master_bytes")
    kept = 1 + moments + ("ema_decay" in plan.choices)  # weights, two moments, an average
    note = require_disk(out, int(kept * trained), final * trained, plan.value("save_total_limit"))
    return () if note is None else (note,)


def _hashes(trained: Trained) -> dict[str, str]:
    """What full fine-tuning starts from; an adapter bank remembers its own start."""
    if isinstance(trained, AdapterBank) or trained.in_pieces:  # of pieces the base's digest is compared
        return {}
    return {name: sha256(tensor) for name, tensor in trained.tensors().items()}
