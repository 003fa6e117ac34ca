"""Whether the decoder layers are compiled, and from what length of run that would win its warm-up back."""

from welltuned.advice.rules import cited, number
from welltuned.advice.settle import duration_words
from welltuned.choice import Choice
from welltuned.facts.machine import Device


def choose_compile(device: Device, seconds: float | None, *, dora: bool, cut: bool) -> Choice:
    """`torch_compile`: off unless the user asks for it, as long as no GPU has measured what it brings.

    Args:
        seconds: the forecast of the whole run, None where there is none. cut: whether the model lies in pieces.
    """
    least, warm_up = duration_words(compiling_pays_from()), duration_words(number("compile_seconds"))
    pays = f"a warm-up of about {warm_up} would be won back from {least} on, at a gain of {number('compile_gain'):.0%}"
    pays += ", which is reckoned by bytes and was measured on no GPU: it is yours to ask for"
    if device is Device.CPU:
        why = "on a CPU the time goes into products and attention, which compiling leaves as they are; elsewhere "
    elif dora:
        why = "DoRA takes the norms of its rows anew in each pass, which is not compiled; elsewhere "
    elif cut:
        why = "a layer of a model in pieces is gathered as its turn comes, which is not compiled; elsewhere "
    else:
        why = "" if seconds is None else f"your run is forecast at {duration_words(seconds)}; "
    return Choice(value=False, reason=why + pays, evidence=cited("compile_gain", "compile_seconds"))


def compiling_pays_from() -> float:
    """Seconds of training from which the gain is more than the warm-up."""
    return number("compile_seconds") / number("compile_gain")


def most_lengths() -> int:
    """Static lengths that are worth a warm-up each."""
    return int(number("compile_lengths"))


def most_padding() -> float:
    """Share of padding beyond which static lengths cost more than compiling is put to bring."""
    return number("compile_gain")
