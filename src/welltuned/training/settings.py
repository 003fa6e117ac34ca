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


def save_steps(plan: Plan) -> int:
    """Updates between two checkpoints."""
    value: int = plan.value("save_steps") if "save_steps" in plan.choices else 50
    return value


def save_total_limit(plan: Plan) -> int:
    """Checkpoints that are kept beside the best."""
    value: int = plan.value("save_total_limit") if "save_total_limit" in plan.choices else 2
    return value


def load_best(plan: Plan) -> bool:
    """Whether the best evaluated weights are the result, not the last ones."""
    value: bool = plan.value("load_best_model_at_end") if "load_best_model_at_end" in plan.choices else True
    return value
