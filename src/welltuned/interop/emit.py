"""The same plan for another tool: `welltuned plan ... --emit trl|axolotl|llamafactory|unsloth`."""

from dataclasses import dataclass
from enum import StrEnum

from welltuned.advice.plan import Plan
from welltuned.errors import InputError
from welltuned.recipe import Method


class Target(StrEnum):
    TRL = "trl"
    AXOLOTL = "axolotl"
    LLAMAFACTORY = "llamafactory"
    UNSLOTH = "unsloth"


METHODS = {
    Target.TRL: frozenset(Method),
    Target.UNSLOTH: frozenset(Method) - {Method.REWARD},
    Target.LLAMAFACTORY: frozenset({Method.SFT, Method.DPO, Method.ORPO, Method.KTO}),
    Target.AXOLOTL: frozenset({Method.SFT, Method.DPO}),
}
"""What is written for whom. (Axolotl has more; its rows of other methods are no chat messages.)"""

FORMS = {
    Target.TRL: ("sigmoid", "ipo", "hinge", "robust", "sigmoid_norm"),
    Target.UNSLOTH: ("sigmoid", "ipo", "hinge", "robust", "sigmoid_norm"),
    Target.LLAMAFACTORY: ("sigmoid", "ipo", "hinge", "simpo"),
    Target.AXOLOTL: ("sigmoid",),
}
"""Of DPO's losses, those that are written for whom."""


@dataclass(frozen=True, slots=True)
class Emitted:
    """A script or a configuration, and what it cannot say: a sentence each, which stand in it too."""

    text: str
    missing: tuple[str, ...]


def emit(plan: Plan, target: Target) -> Emitted:
    """The plan for `target`. The first rows of its data are read, to write how they are brought into form.

    Raises:
        InputError: the method is not written for the target, or the data cannot be had by it (stdin).
    """
    method = plan.recipe.method
    if method not in METHODS[target]:
        others = ", ".join(str(other) for other in Target if method in METHODS[other])
        raise InputError(f"{method} is not emitted for {target}", where="--emit", mend=f"it is for: {others}")
    form = plan.value("loss_type") if method is Method.DPO else ""
    if form not in FORMS[target] and method is Method.DPO:
        others = ", ".join(FORMS[target])
        raise InputError(f"loss_type {form} is not emitted for {target}", where="--emit", mend=f"it has: {others}")
    if target in (Target.TRL, Target.UNSLOTH):
        from welltuned.interop.emit_python import emit_script

        script = emit_script(plan, unsloth=target is Target.UNSLOTH)
        return Emitted(script.text, script.missing)
    if target is Target.AXOLOTL:
        from welltuned.interop.emit_axolotl import emit_axolotl as written_for
    else:
        from welltuned.interop.emit_llamafactory import emit_llamafactory as written_for
    written = written_for(plan)
    return Emitted(written.text, written.missing)
