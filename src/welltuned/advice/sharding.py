"""Whether several processes share the model too, each with a part of every weight: only where it does not fit whole."""

from collections.abc import Sequence

from welltuned.advice.memory import MemoryForecast
from welltuned.advice.rules import cited
from welltuned.advice.settle import bytes_words, settle
from welltuned.choice import Choice
from welltuned.facts.machine import MachineFacts
from welltuned.recipe import FSDP, FULL_SHARD, Method, Recipe, Tune

WHOLE = FSDP[0]


def must_be_cut(recipe: Recipe, machine: MachineFacts) -> bool:
    """Whether the user says so, and there are processes to share it."""
    return recipe.hyperparameters.get("fsdp") == FULL_SHARD and machine.processes > 1


def ways_to_hold(recipe: Recipe, machine: MachineFacts, states: Sequence[bool]) -> list[tuple[int, bool]]:
    """(into how many parts the model is cut, whether moments take 8 bits) to try, in the order of preference.

    The first is a whole model's. Pieces come before 8 bits, since they change no number, and beside full fine-tuning's
    8 bits they do not stand: their blocks would depend on the number of processes.

    Args:
        states: whether moments take 8 bits, in the order of preference.
    """
    given = recipe.hyperparameters.get("fsdp")
    if given == WHOLE or not is_cuttable(recipe) or machine.processes == 1:
        return [(1, eight_bit) for eight_bit in states]
    cut = [(machine.processes, e) for e in states if not e or recipe.tune is not Tune.FULL]
    whole = [(1, e) for e in states]
    return [*whole[:1], *cut, *(() if must_be_cut(recipe, machine) else whole[1:])]


def is_cuttable(recipe: Recipe) -> bool:
    """Whether what this recipe trains can be trained of a model in pieces."""
    starts_whole = recipe.hyperparameters.get("init_lora_weights", True) not in (True, "gaussian")
    return recipe.method is Method.SFT and recipe.tune is not Tune.QLORA and not starts_whole


def more_processes(recipe: Recipe, machine: MachineFacts) -> str:
    """The way out of too little memory that several GPUs are, where there are some and one process was started."""
    if machine.gpus < 2 or machine.processes > 1 or not is_cuttable(recipe):
        return ""
    start = f"torchrun --nproc-per-node {machine.gpus} -m welltuned train"
    return f"each of {machine.gpus} GPUs can keep a part of the model ({start} …); or "


def sharding_choices(
    recipe: Recipe, machine: MachineFacts, limit: int, whole: MemoryForecast, cut: MemoryForecast | None
) -> dict[str, Choice]:
    """What is said of it where several processes were started, or where the user says something.

    Args:
        whole, cut: what each process takes with all of the model, and with its part, where that is tried.
    """
    if machine.processes == 1 and "fsdp" not in recipe.hyperparameters:
        return {}
    room = bytes_words(limit)
    value = FULL_SHARD if cut is not None and not whole.fits else WHOLE
    if machine.processes == 1:
        why = "there is one process, which holds the whole model whatever is said here"
    elif whole.fits:
        why = (
            f"the whole model fits into the {room} of each process, and then only one sum an update passes between them"
        )
    elif cut is not None:
        why = (
            f"the whole model would take {bytes_words(whole.total_bytes)} of the {room} that each process has; with a "
            f"part of every weight in each of {machine.processes} it is forecast to take {bytes_words(cut.total_bytes)}"
        )
    else:
        why = "of a model in pieces only sft on weights of 16 or 32 bits is trained"
    return {"fsdp": settle(recipe, "fsdp", Choice(value=value, reason=why, evidence=cited("fsdp")))}
