"""The plan's values as the loop's parts take them."""

from welltuned.advice.plan import Plan
from welltuned.training.optimizer import AdamWSettings, Schedule, Scheduler


def schedule_of(plan: Plan) -> Schedule:
    return Schedule(
        kind=Scheduler(plan.value("lr_scheduler_type")),
        peak=plan.value("learning_rate"),
        warmup_steps=plan.value("warmup_steps"),
        total_steps=plan.updates,
    )


def adamw_settings(plan: Plan) -> AdamWSettings:
    return AdamWSettings(
        beta1=plan.value("adam_beta1"), beta2=plan.value("adam_beta2"), weight_decay=plan.value("weight_decay")
    )
