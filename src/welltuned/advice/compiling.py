"""Whether the decoder layers are compiled: only where the run is long enough to win the warm-up back."""

from welltuned.advice.rules import cited, number
from welltuned.advice.settle import duration_words
from welltuned.choice import Choice
from welltuned.facts.machine import Device


def choose_compile(device: Device, seconds: float | None, *, dora: bool, cut: bool) -> Choice:
    """`torch_compile`; `seconds` is the forecast of the whole run, None where there is none; `cut` by FSDP2."""
    least, evidence = compiling_pays_from(), cited("compile_gain", "compile_seconds")
    gain, warm_up = f"{number('compile_gain'):.0%}", duration_words(number("compile_seconds"))
    pays = f"a warm-up of about {warm_up} is won back from {duration_words(least)} on, at a gain put at {gain} by bytes"
    pays += " and not measured"
    if device is Device.CUDA and seconds is not None and not (dora or cut):
        won = "long enough" if seconds >= least else "too short"
        reason = f"your run is forecast at {duration_words(seconds)}, which is {won}: {pays}"
        return Choice(value=seconds >= least, reason=reason, evidence=evidence)
    why = "how long the run will take is not known"
    if device is Device.CPU:
        why = "on a CPU the time goes into products and attention, which compiling leaves as they are"
    elif dora:
        why = "DoRA takes the norms of its rows anew in each pass, which is not compiled"
    elif cut:
        why = "a layer of a model in pieces is gathered as its turn comes, which is not compiled"
    return Choice(value=False, reason=f"{why}; elsewhere {pays}", evidence=evidence)


def compiling_pays_from() -> float:
    """Seconds of training from which the gain is more than the warm-up."""
    return number("compile_seconds") / number("compile_gain")


def most_lengths() -> int:
    """Static lengths that are worth a warm-up each."""
    return int(number("compile_lengths"))


def most_padding() -> float:
    """Share of padding beyond which static lengths cost more than compiling is put to bring."""
    return number("compile_gain")
