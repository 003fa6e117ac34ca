"""What another tool cannot express of a plan, one sentence each: it stands in the emitted file and on stderr."""

from collections.abc import Iterator, Sequence

from welltuned.advice.plan import Plan
from welltuned.advice.settle import counted
from welltuned.facts.architecture import EXPERTS
from welltuned.interop.emit_rows import Look, Shape
from welltuned.models.resolve import DEMO_ALIAS, DEMO_HUB_ID
from welltuned.recipe import Recipe, Tune

_OWN = ("embedding_learning_rate", "ema_decay")  # no trainer's own argument


def model_there(recipe: Recipe) -> str:
    """The model under a name that other tools know."""
    return DEMO_HUB_ID if recipe.model.lower() == DEMO_ALIAS else recipe.model


def missing_everywhere(plan: Plan, looks: Sequence[Look], shape: Shape) -> Iterator[str]:
    """What holds for every target."""
    recipe = plan.recipe
    if recipe.model.lower() == DEMO_ALIAS:
        yield f"the model is {DEMO_HUB_ID} from the hub; {DEMO_ALIAS} here is a 4-bit copy of it"
    elif recipe.model.lower().endswith(".gguf"):
        yield f"{recipe.model} is a GGUF file: name the folder or the hub id of the same model there"
    per_device, budget = plan.value("per_device_train_batch_size"), plan.value("token_budget")
    yield (
        f"token_budget {budget:,}: their micro-batch is a number of rows ({per_device}), padded to the longest; "
        "if memory runs out, halve it and double the accumulation"
    )
    if plan.value("packing"):
        yield (
            "packing is off: theirs makes one example of many rows, so that an update would hold more than "
            f"{plan.value('effective_batch_size')} rows, and the run have fewer updates than the rate was chosen for"
        )
    if plan.value("warmup_steps"):
        yield "warmup_steps: their first update has a rate of 0; here none has"
    if recipe.adapter is not None:
        yield f"adapter {recipe.adapter}: load it there yourself (PEFT: PeftModel.from_pretrained, is_trainable=True)"
    yield from _rows(plan, looks, shape)
    if recipe.tune is not Tune.FULL and EXPERTS in plan.value("target_modules"):
        yield f"adapters on the {EXPERTS}: name their parameters in PEFT's target_parameters yourself"
    given = [name for name in _OWN if name in plan.choices]
    if given:
        yield f"{', '.join(given)}: not written, since their names and meanings differ there; set them yourself"
    if recipe.tune is Tune.QLORA:
        yield "the adapters of a 4-bit base may be kept in bfloat16 there; here they are float32"


def _rows(plan: Plan, looks: Sequence[Look], shape: Shape) -> Iterator[str]:
    recipe = plan.recipe
    dropped = [f"{key}: {policy}" for key, policy in recipe.policies.items() if policy != "keep"]
    if dropped:
        yield f"policies for rows with a defect ({', '.join(dropped)}): every row is trained there; mend the file"
    extras = {extra for look in looks for extra in look.extras}
    if "train" in extras:
        yield "the `train` or `weight` of single messages: every answer is trained there"
    if others := sorted(extras - {"train"}):
        yield f"further fields of messages ({', '.join(others)}) are passed on; see that the chat template writes them"
    if shape is Shape.PLAIN:
        yield "the model has no chat template: prompt and completion are joined as plain texts"


def _alike(recipe: Recipe) -> str:
    return "that share a prompt" if recipe.group_by is None else f"with the same `{recipe.group_by}`"


def other_rows_held_out(plan: Plan) -> str:
    """For targets whose script splits by prompt or group too."""
    count = counted(plan.facts.dataset.heldout_rows, "row")
    return f"held out: {count} or so, those {_alike(plan.recipe)} on one side as here, but not the same rows"


def split_by_row(plan: Plan) -> str:
    """For targets that know only a share of the rows."""
    what = (
        f"held out: the same share ({held_out_share(plan):.2%}) by single rows; rows {_alike(plan.recipe)} can be on "
    )
    return what + "both sides, which makes the held-out loss look better"


def held_out_share(plan: Plan) -> float:
    data = plan.facts.dataset
    return round(data.heldout_rows / (data.heldout_rows + data.rows), 4)


def mixture_differs(plan: Plan) -> str | None:
    """Of scripts, which take as many rows of each dataset, but the same ones in every epoch."""
    parts = plan.facts.dataset.mixture
    if all(part.rows == part.rows_of_epoch for part in parts):
        return None
    return "rows of a dataset that is taken in part: the same ones in every epoch; here they take turns"
