"""The plan's values as the loop's parts take them."""

from dataclasses import dataclass

from welltuned.advice.plan import Plan
from welltuned.advice.room import CACHED
from welltuned.training.optimizer import AdamWSettings, Schedule, Scheduler, Span
from welltuned.training.step import Trained


@dataclass(frozen=True, slots=True)
class Room:
    """How the plan makes room: recomputed layers (None: all), whether their inputs wait on the host, and the base's;
    and whether layers are compiled."""

    recompute: bool
    layers: int | None
    offload: bool
    dense_base: bool
    compiled: bool = False


def room_of(plan: Plan) -> Room:
    """Of a plan of an earlier version too, which knew all layers or none."""
    chosen = {name: choice.value for name, choice in plan.choices.items()}
    return Room(
        recompute=chosen["gradient_checkpointing"],
        layers=chosen.get("checkpointed_layers"),
        offload=chosen.get("offload_checkpoints", False),
        dense_base=chosen.get("dense_base") == CACHED,
        compiled=chosen.get("torch_compile", False),
    )


def schedule_of(plan: Plan) -> Schedule:
    return Schedule(
        kind=Scheduler(plan.value("lr_scheduler_type")),
        peak=plan.value("learning_rate"),
        warmup_steps=plan.value("warmup_steps"),
        total_steps=plan.updates,
    )


def rate_spans(plan: Plan, trained: Trained) -> list[Span]:
    """Where rates differ from learning_rate: LoRA+'s B, and what is trained whole beside adapters; [] where none does.

    LoRA+: Hayou et al. 2024, arXiv 2402.12354. As in PEFT, DoRA's magnitudes and trained biases go with B.
    """
    ratio = plan.value("loraplus_lr_ratio") if "loraplus_lr_ratio" in plan.choices else 1.0
    whole = 1.0
    if "embedding_learning_rate" in plan.choices:
        whole = plan.value("embedding_learning_rate") / plan.value("learning_rate")
    if ratio == 1.0 and whole == 1.0:
        return []
    found = []
    for slot in trained.slots:
        adapter = slot.name.rpartition(".")[2]
        quick = adapter in ("lora_B", "lora_magnitude_vector", "bias")
        factor = 1.0 if adapter == "lora_A" else ratio if quick else whole
        found.append(Span(slot.start, slot.start + slot.size, factor))
    return found


def adamw_settings(plan: Plan) -> AdamWSettings:
    return AdamWSettings(
        beta1=plan.value("adam_beta1"), beta2=plan.value("adam_beta2"), weight_decay=plan.value("weight_decay")
    )
