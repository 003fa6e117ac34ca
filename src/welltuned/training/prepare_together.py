"""The same plan and the same rows on all ranks: the first one plans, the others read what it planned with."""

from collections.abc import Callable

import torch

from welltuned.advice.plan import plan_from_yaml, plan_to_yaml
from welltuned.choice import SetBy
from welltuned.errors import InputError
from welltuned.facts.machine import Device
from welltuned.training.identity import differences, identity_of
from welltuned.training.in_pieces import lies_in_pieces
from welltuned.training.prepare import Prepared, prepare
from welltuned.training.ranks import Ranks


def prepare_together(make: Callable[[], Prepared], ranks: Ranks) -> Prepared:
    """What `make` prepares on the first rank, and the same on the others.

    The first goes ahead, so that on one machine the others find its rows in the cache.

    Raises:
        InputError: on all ranks, what `make` raises; or ranks do not see the same model, rows or tokenizer, as machines
            with other files would.
    """
    if ranks.alone:
        return make()
    made: list[Prepared] = []

    def planned() -> str:
        made.append(make())
        return plan_to_yaml(made[0].plan)

    def read() -> Prepared:
        plan = plan_from_yaml(text)
        return prepare(plan.recipe, planned=plan)

    with ranks.patient():
        text = ranks.first(planned)
        prepared = ranks.each(lambda: made[0] if made else read())
        identities = ranks.gather(lambda: identity_of(prepared))
    for rank, identity in enumerate(identities):
        changed = differences(identities[0], identity)
        if changed:
            mend = "give every machine the same files"
            raise InputError(f"process {rank} sees other input than process 0: {changed[0]}", mend=mend)
    return prepared


def sharing_notes(prepared: Prepared, ranks: Ranks) -> tuple[str, ...]:
    """What a user of other trainers would take for granted, and is not so here."""
    if ranks.alone:
        return ()
    size = prepared.plan.value("effective_batch_size")
    notes = [f"{ranks.size} processes share every update of {size} rows"]
    if lies_in_pieces(prepared.plan, ranks):
        chosen = prepared.plan.choices["fsdp"]
        why = "" if chosen.set_by is SetBy.USER else f", since {chosen.reason}"
        notes.append(f"a model in pieces: each of {ranks.size} processes keeps a part of every weight{why}")
        notes.append("none of them alone can answer prompts for the report; welltuned chat does it afterwards")
    given = ("per_device_train_batch_size", "gradient_accumulation_steps")
    if any(prepared.plan.choices[name].set_by is SetBy.USER for name in given):
        product = " × ".join(str(prepared.plan.value(name)) for name in given)
        notes.append(
            f"effective_batch_size is {size} ({product}) for all {ranks.size} processes together, not for each; "
            "set it to say otherwise"
        )
    machine, threads = prepared.plan.facts.machine, torch.get_num_threads()
    if machine.device is Device.CPU and 2 * threads * ranks.here <= machine.cores:  # torchrun sets it to 1
        notes.append(
            f"each process uses {threads} of this machine's {machine.cores} cores; "
            f"OMP_NUM_THREADS={machine.cores // ranks.here} would use all"
        )
    return tuple(notes)
