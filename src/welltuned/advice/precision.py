"""The number format of weights and activations: what the machine computes fast, and what training can bear."""

from welltuned.advice.rules import cited
from welltuned.choice import Choice
from welltuned.facts.machine import Device, MachineFacts
from welltuned.recipe import Tune


def choose_dtype(tune: Tune, machine: MachineFacts) -> Choice:
    if tune is Tune.FULL:
        why = "every weight is trained, and bfloat16 would round small updates away"
        return Choice(value="float32", reason=why, evidence=cited("dtype_cpu_native_needs"))
    if machine.device is Device.CUDA:
        value = "bfloat16" if machine.native_bf16 else "float32"
        why = f"{machine.gpu_name} computes in bfloat16" if machine.native_bf16 else "the GPU has no native bfloat16"
    else:
        value = "bfloat16" if machine.native_bf16 else "float32"
        unit = "AMX" if machine.amx_bf16 else "AVX512-BF16"
        has = f"multiplies bfloat16 natively ({unit})" if machine.native_bf16 else "would have to emulate bfloat16"
        why = f"your processor {has}"
        if machine.native_bf16 and not machine.amx_bf16:
            why += "; where that was measured it was twice as fast as float32, with the same held-out loss"
    base = ", and the 4-bit weights are expanded to it" if tune is Tune.QLORA else ""
    return Choice(value=value, reason=why + base, evidence=cited("dtype_cpu_native_needs"))
