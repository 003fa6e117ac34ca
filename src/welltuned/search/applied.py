"""What a search does with every key of a recipe: it applies it, or says that it does otherwise, or refuses it.

A key that stands in none of the tables is refused, so that no new one can be ignored in silence.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from welltuned.advice.plan import Plan
from welltuned.advice.settle import shown
from welltuned.choice import SetBy
from welltuned.errors import InputError
from welltuned.recipe import OPTIMIZERS_8BIT, POLICIES, Method, Recipe, Tune
from welltuned.recipe.read import recipe_to_dict

RATE = "learning_rate"
METHODS = (Method.SFT, Method.DPO, Method.ORPO)

APPLIED = frozenset(
    [
        # what is trained, and on what: the same preparation as a run's
        *("model", "data", "method", "tune", "data_weights", "data_rows", "eval_data", "eval_fraction", "group_by"),
        *("format", "map", "subset", "split", "memory", "instruction_part", "response_part", "chat_template"),
        *("chat_template_kwargs", "trust_remote_code", "allow_pickle", "loss_on", "assistant_only_loss"),
        *("max_length", "packing", *POLICIES),
        # every arm's own
        *("learning_rate", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "init_lora_weights"),
        *("use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "loraplus_lr_ratio", "seed"),
        *("effective_batch_size", "num_train_epochs", "max_steps", "warmup_steps", "lr_scheduler_type"),
        *("weight_decay", "adam_beta1", "adam_beta2", "optim", "max_grad_norm", "bias"),
        *("beta", "loss_type", "label_smoothing", "simpo_gamma"),
        # a matter of memory, for the rows of all arms together
        *("per_device_train_batch_size", "gradient_accumulation_steps", "token_budget", "gradient_checkpointing"),
        *("checkpointed_layers", "offload_checkpoints", "dense_base", "dtype"),
        # in rounds, each an update of every arm
        *("save_steps", "save_total_limit"),
    ]
)

REFUSED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "fsdp": ("a search runs in one process", "remove it"),
        "adapter": ("a search begins with new adapters", "remove it"),
        "ema_decay": (
            "a search keeps averages of its own, to compare arms by",
            "remove it; train with it once the search has chosen",
        ),
        "torch_compile": (
            "how the rows of a search's arms lie changes from round to round",
            "remove it; train with it once the search has chosen",
        ),
        **dict.fromkeys(
            ("modules_to_save", "embedding_learning_rate"),
            ("what is trained whole belongs to the base that all arms share", "remove it"),
        ),
    }
)
"""Why it cannot be, and what to do instead."""

OTHER_METHODS = frozenset(
    [
        *("rewards", "reward_weights", "num_generations", "max_completion_length", "temperature", "top_p", "epsilon"),
        *("epsilon_high", "scale_rewards", "mask_truncated_completions", "num_iterations"),
        *("vllm_server_base_url", "vllm_importance_sampling_clip_max"),
        *("desirable_weight", "undesirable_weight", "center_rewards_coefficient"),
    ]
)
"""Of methods that cannot be searched, which are refused as such."""


def _given(plan: Plan, name: str) -> bool:
    return plan.choices[name].set_by is SetBy.USER


def _best(plan: Plan) -> str | None:
    if not plan.value("load_best_model_at_end"):
        return None
    return "arms are compared by the weights after their last update, and those are the result, not the best before"


def _patience(plan: Plan) -> str | None:
    if plan.value("early_stopping_patience"):
        return "an arm ends when it cannot win any more, not after evaluations without a better one"
    return "an arm that diverges ends, whatever the patience" if _given(plan, "early_stopping_patience") else None


def _evaluations(plan: Plan) -> str | None:
    return "arms are judged at the same shares of their runs instead" if _given(plan, "eval_steps") else None


def _not_finite(plan: Plan) -> str | None:
    if plan.recipe.on_nonfinite is None:
        return None
    return "an arm whose numbers are not finite ends, and the others go on; none goes back to a checkpoint"


def _trackers(plan: Plan) -> str | None:
    if not plan.recipe.report_to:
        return None
    return f"{', '.join(plan.recipe.report_to)} will be told the winner's run once the search has ended, no other arm's"


TOLD: Mapping[str, Callable[[Plan], str | None]] = MappingProxyType(
    {
        "load_best_model_at_end": _best,
        "early_stopping_patience": _patience,
        "eval_steps": _evaluations,
        "on_nonfinite": _not_finite,
        "report_to": _trackers,
    }
)
"""What a search does otherwise than a run, as a sentence; None where that makes no difference."""


def told(plan: Plan, replaced: Sequence[str], centred: bool) -> tuple[str, ...]:
    """What a search does otherwise than a run of this plan would, a sentence each.

    Args:
        replaced: what arms have other values of. centred: whether the recipe's rate is the middle of those tried.
    """
    found = [f"{name}: {text}" for name, make in TOLD.items() if (text := make(plan)) is not None]
    given = plan.recipe.hyperparameters
    if centred and RATE in given:
        found.append(f"{RATE}: yours, {shown(given[RATE])}, is the middle of what is tried")
    found += [f"{name}: the arms' values replace yours, {shown(given[name])}" for name in replaced if name in given]
    if "seed" in replaced and plan.recipe.eval_data is None:
        found.append(
            "seed: all arms share the held-out rows that your recipe's seed chose; a run of another has others"
        )
    return tuple(found)


def require_searchable(plan: Plan) -> None:
    """Refuse what arms on one base cannot be.

    Raises:
        InputError: the first such setting.
    """
    recipe = plan.recipe
    if recipe.method not in METHODS:
        known = ", ".join(map(str, METHODS))
        raise InputError(f"{recipe.method} cannot be searched", where="method", mend=f"these can: {known}")
    if recipe.tune is Tune.FULL:
        what = "a full model for each arm would not share a base"
        raise InputError(what, where="tune", mend="use lora or qlora")
    _require_known(recipe)
    if plan.value("bias") != "none":
        raise InputError("biases belong to the base that all arms share", where="bias", mend="use bias: none")
    if str(plan.value("init_lora_weights")).lower() == "loftq":
        raise InputError("a bank of arms does not start at what 4 bits lose", where="init_lora_weights")
    if plan.value("optim") in OPTIMIZERS_8BIT:
        what = "an arm's rows come and go in one buffer, whose moments are in fp32: adapters' are small"
        raise InputError(what, where="optim", mend="use adamw")
    if not plan.facts.dataset.heldout_rows:
        what = "no rows are held out, so that arms cannot be compared"
        raise InputError(what, where="eval_fraction", mend="give a share such as 0.1, or --eval-data")


def _require_known(recipe: Recipe) -> None:
    for name in recipe_to_dict(recipe):
        if name in REFUSED:
            what, mend = REFUSED[name]
            raise InputError(what, where=name, mend=mend)
        if name not in APPLIED and name not in TOLD:
            raise InputError("a search does nothing with it", where=name, mend="remove it")
