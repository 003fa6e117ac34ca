"""A training run from plan to verified adapter."""

import gc
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import welltuned
from welltuned.adapters.verify import TensorCheck, check_tensors, require_learned, sha256
from welltuned.advice.plan import Plan, plan_to_yaml, require_memory
from welltuned.errors import InputError, RunError
from welltuned.facts.machine import Device
from welltuned.models.adapter_file import save_adapter
from welltuned.models.full import FullParameters
from welltuned.models.fuse import Fused, checkpoint_layers, find_head, fuse
from welltuned.models.load import load_model
from welltuned.models.lora import AdapterBank, Bias, Init, LoraSettings, attach, find_targets
from welltuned.models.packed import packed_model, packs
from welltuned.models.parts import idle_parts, within
from welltuned.recipe import Tune, recipe_to_yaml
from welltuned.training.events import Evaluated, Event, Note, Observer, Updated, silent
from welltuned.training.optimizer import AdamWSettings, FlatAdamW, Schedule, Scheduler, clip_
from welltuned.training.prepare import Prepared
from welltuned.training.process import allocator_keeps_memory, memory_used
from welltuned.training.rundir import ADAPTER, MODEL, PLAN, RECIPE, RUN, RunDir, require_free
from welltuned.training.speed import remember_speed
from welltuned.training.step import Engine, Evaluation, Objective, Supervised, Trained

MOST_ORIGINS = 1_000  # held-out rows named in run.json
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    """What a finished run found. `before` and `after` are None where no row was held out."""

    path: Path
    engine: Engine
    updates: int
    before: Evaluation | None
    after: Evaluation | None
    checks: tuple[TensorCheck, ...]
    seconds: float
    tokens_per_second: float
    peak_memory: int


def make_ready(plan: Plan) -> Ready:
    """Load the model, put adapters on it (or free all of it), and fuse what is understood."""
    recipe = plan.recipe
    if recipe.tune is Tune.FULL and plan.value("dtype") != "float32":
        raise InputError("full fine-tuning trains float32 weights", where="dtype", mend="remove it, or use tune: lora")
    device = "cuda" if plan.facts.machine.device is Device.CUDA else "cpu"
    dtype = torch.float32 if recipe.tune is Tune.FULL else DTYPES[plan.value("dtype")]
    model = load_model(recipe.model, dtype=dtype, device=device, nf4=recipe.tune is Tune.QLORA)
    idle = idle_parts(model)
    trained: Trained = (
        FullParameters(model, frozen=idle) if recipe.tune is Tune.FULL else attach(model, _reached(model, plan, idle))
    )
    fused = fuse(model, trained if isinstance(trained, AdapterBank) else None)
    head = find_head(model)
    notes = [*fused.sentences(), *(f"text never reaches {name}, which stays as it is" for name in idle)]
    if head is None:
        notes.append("the output head does something this engine does not know: the model's own logits are used")
    if not packs(model):
        notes.append("this model's own code carries state along a row, so examples run one at a time, not packed")
    if plan.value("gradient_checkpointing"):
        checkpoint_layers(model, fused)
    budget = plan.value("token_budget") if plan.value("packing") else 1  # 1: every example by itself
    return Ready(Engine(model, trained, head, budget), Supervised(), fused, tuple(notes))


def _reached(model: PreTrainedModel, plan: Plan, idle: tuple[str, ...]) -> LoraSettings:
    """The LoRA settings without the targets in parts that text never reaches: they could not learn."""
    settings = lora_settings(plan)
    if not idle:
        return settings
    targets = tuple(name for name in find_targets(model, settings.target_modules) if not within(name, idle))
    if not targets:
        what = f"all of the targets lie in {', '.join(idle)}, which text never reaches"
        raise InputError(what, where="target_modules", mend="name layers of the language model")
    return replace(settings, target_modules=targets)


def lora_settings(plan: Plan) -> LoraSettings:
    """The plan's LoRA choices as the adapter bank takes them."""
    targets = plan.value("target_modules")
    return LoraSettings(
        r=plan.value("r"),
        lora_alpha=plan.value("lora_alpha"),
        lora_dropout=plan.value("lora_dropout"),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_rslora=plan.value("use_rslora"),
        bias=Bias(plan.value("bias")),
        init=Init(str(plan.value("init_lora_weights")).lower()),
        seed=plan.value("seed"),
    )


def train(
    prepared: Prepared,
    out: Path,
    observer: Observer = silent,
    before_training: Callable[[Ready], None] | None = None,
) -> RunResult:
    """Train as planned and write a Run to `out`.

    Args:
        before_training: called with the loaded model before the first update (the demo asks it for replies there).

    Raises:
        InputError: the plan does not fit into memory, or `out` is not empty.
        RunError: a loss is not finite, or a trained tensor did not move.
    """
    plan, started = prepared.plan, time.time()
    if plan.recipe.adapter is not None:
        raise InputError("going on from an adapter is not built yet", where="adapter", mend="merge it into the base")
    require_memory(plan)
    require_free(out)
    with allocator_keeps_memory(plan.facts.machine.device):
        ready = make_ready(plan)  # what is wrong with the model shows here, before anything is written
        with closing(RunDir(out)) as directory:

            def tell(event: Event) -> None:
                directory.record(event)
                observer(event)

            directory.write(RECIPE, recipe_to_yaml(plan.recipe))
            directory.write(PLAN, plan_to_yaml(plan))
            for text in (*prepared.notes, *(text for text in ready.notes if text not in plan.warnings)):
                tell(Note(text))
            start_hashes = _hashes(ready.engine.trained)
            if before_training is not None:
                before_training(ready)
            with packed_model(ready.model):
                before = _evaluated(ready, prepared, 0, tell)
                seconds, tokens, after = _loop(ready, prepared, tell)
            result = RunResult(
                path=out,
                engine=ready.engine,
                updates=plan.updates,
                before=before,
                after=after if after is not None else before,
                checks=_verify_and_save(ready.engine, prepared, directory, start_hashes),
                seconds=time.time() - started,
                tokens_per_second=tokens / seconds,
                peak_memory=memory_used(plan.facts.machine.device).peak,
            )
            directory.write_json(RUN, _summary(prepared, ready, result))
            remember_speed(plan, result.tokens_per_second, seconds)
    return result


def _evaluated(ready: Ready, prepared: Prepared, step: int, tell: Observer) -> Evaluation | None:
    if not prepared.held_out:
        return None
    found = ready.objective.evaluate(ready.engine, prepared.held_out)
    tell(Evaluated(step, found.loss, found.standard_error, found.measures))
    return found


def _loop(ready: Ready, prepared: Prepared, tell: Observer) -> tuple[float, int, Evaluation | None]:
    """All updates; (seconds and tokens spent in updates, the last evaluation)."""
    engine, plan, rows, mixture = ready.engine, prepared.plan, prepared.train, prepared.mixture
    seed, batch, total = plan.value("seed"), plan.value("effective_batch_size"), plan.updates
    schedule = Schedule(
        kind=Scheduler(plan.value("lr_scheduler_type")),
        peak=plan.value("learning_rate"),
        warmup_steps=plan.value("warmup_steps"),
        total_steps=total,
    )
    optimizer = FlatAdamW(engine.trained.flat_KP, engine.trained.grad_KP, engine.trained.decayed, adamw_settings(plan))
    engine.trained.claim_gradients()
    per_epoch = mixture.steps_per_epoch(batch)
    seconds, tokens, last = 0.0, 0, None
    for step in range(total):
        started = time.perf_counter()
        chosen = mixture.update(batch, step)
        optimizer.zero_grad()
        keys = [_dropout_key(seed, step, i) for i in chosen]
        made = ready.objective.accumulate_gradient(engine, [rows[i] for i in chosen], keys)
        norm = clip_(engine.trained.grad_KP, plan.value("max_grad_norm"))[0]
        if not norm < float("inf"):
            raise RunError(f"the gradient of update {step + 1} is not finite; lower the learning rate")
        optimizer.step([schedule.rate(step)])
        spent = time.perf_counter() - started
        due = bool(prepared.held_out) and ((step + 1) % plan.value("eval_steps") == 0 or step + 1 == total)
        seconds, tokens = seconds + spent, tokens + made.tokens
        tell(
            Updated(
                step=step + 1,
                total_steps=total,
                loss=made.loss,
                learning_rate=schedule.rate(step),
                grad_norm=norm,
                tokens=made.tokens,
                supervised_tokens=made.supervised_tokens,
                tokens_per_second=made.tokens / spent,
                epoch=(step + 1) / per_epoch,
                memory_bytes=memory_used(plan.facts.machine.device).now,
                seconds_left=seconds / (step + 1) * (total - step - 1),
                evaluation_follows=due,
                measures=made.measures,
            )
        )
        if due:
            last = _evaluated(ready, prepared, step + 1, tell)
    return seconds, tokens, last


def adamw_settings(plan: Plan) -> AdamWSettings:
    return AdamWSettings(
        beta1=plan.value("adam_beta1"), beta2=plan.value("adam_beta2"), weight_decay=plan.value("weight_decay")
    )


def _dropout_key(seed: int, step: int, row: int) -> int:
    """Names an example's dropout masks in one update."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{row}".encode(), digest_size=7).digest())


def _hashes(trained: Trained) -> dict[str, str]:
    """What full fine-tuning starts from; an adapter bank remembers its own start."""
    if isinstance(trained, AdapterBank):
        return {}
    return {name: sha256(tensor) for name, tensor in trained.tensors().items()}


def _verify_and_save(
    engine: Engine, prepared: Prepared, directory: RunDir, start_hashes: dict[str, str]
) -> tuple[TensorCheck, ...]:
    trained, plan = engine.trained, prepared.plan
    if isinstance(trained, AdapterBank):
        checks = check_tensors(trained.tensors(), trained.tensors_at_start())
        require_learned(checks, plan.updates)
        save_adapter(trained, directory.path / ADAPTER, base=str(engine.model.config.name_or_path))
    else:
        with reloaded(plan) as start:
            changed = [name for name, digest in start_hashes.items() if sha256(start[name]) != digest]
            if changed:
                raise RunError(f"the base model on disk changed while it was trained ({changed[0]})")
            checks = check_tensors(trained.tensors(), start)
        require_learned(checks, plan.updates)
        engine.model.save_pretrained(directory.path / MODEL)
        prepared.tokenizer.save_pretrained(directory.path / MODEL)
    return checks


@contextmanager
def reloaded(plan: Plan) -> Iterator[dict[str, torch.Tensor]]:
    """The base model's parameters once more from disk, to compare with; freed afterwards."""
    base = load_model(plan.recipe.model, dtype=torch.float32)
    try:
        yield {name: p.detach() for name, p in base.named_parameters()}
    finally:
        del base
        gc.collect()


def _summary(prepared: Prepared, ready: Ready, result: RunResult) -> dict[str, Any]:
    def loss(found: Evaluation | None) -> dict[str, float] | None:
        return None if found is None else {"loss": found.loss, "standard_error": found.standard_error}

    return {
        "format": 1,
        "model": prepared.recipe.model,
        "method": str(prepared.recipe.method),
        "tune": str(prepared.recipe.tune),
        "chat_template": prepared.chat_template,
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
