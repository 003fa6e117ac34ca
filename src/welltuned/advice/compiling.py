"""Whether the decoder layers are compiled: only where the run is long enough to win the warm-up back."""

from welltuned.advice.rules import cited, number
from welltuned.advice.settle import duration_words
from welltuned.choice import Choice
from welltuned.facts.machine import Device
from welltuned.recipe import Method


def choose_compile(device: Device, method: Method, seconds: float | None, *, dora: bool, cut: bool) -> Choice:
    """`torch_compile`; `seconds` is the forecast of the whole run, None where there is none; `cut` by FSDP2."""
    least = compiling_pays_from()
    gain, warm_up = f"{number('compile_gain'):.0%}", duration_words(number("compile_seconds"))
    unmeasured = f"its gain is put at {gain}, by bytes and not measured"
    if device is Device.CPU:
        reason = "on a CPU the time goes into products and attention, which compiling leaves as they are"
    elif method is Method.GRPO:
        reason = "how long answers will be is not known, and layers are compiled for a few lengths of packed rows"
    elif dora:
        reason = "DoRA takes the norms of its rows anew in each pass, which is not compiled"
    elif cut:
        reason = "a layer of a model in pieces is gathered as its turn comes, which is not compiled"
    elif seconds is None:
        reason = f"how long the run will take is not known; {unmeasured}"
    else:
        run = f"your run is forecast at {duration_words(seconds)}"
        won = "long enough to win back" if seconds >= least else "too short to win back"
        reason = f"{run}, {won} a warm-up of about {warm_up}: from {duration_words(least)} on; {unmeasured}"
        return Choice(value=seconds >= least, reason=reason, evidence=cited("compile_gain", "compile_seconds"))
    return Choice(value=False, reason=reason, evidence=cited("compile_gain", "compile_seconds"))


def compiling_pays_from() -> float:
    """Seconds of training from which the gain is more than the warm-up."""
    return number("compile_seconds") / number("compile_gain")
