"""Parts 1 and 2 of the GPU benchmark: is it right? Attention, the head's loss, and whole models in bf16."""

import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_scale import Scale, long_rows, matrix_ceiling, ragged_rows, sentence, time_median
from gpu_systems import Running, build_model, dense_copy, engine, peft_sdpa
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from welltuned.kernels.attention import attention_reference, packed_attention
from welltuned.kernels.token_loss import Head, token_loss

# --- attention: seconds and errors by each way ---


def check_attention(scale: Scale) -> list[dict[str, Any]]:
    """Each way on long and ragged rows. A way that is not for this device or these heads says so.

    Errors are taken on the ragged rows, against plain products in fp32 (on long rows those would take 20 GB; there the
    losses of whole models are compared).
    """
    found = []
    for rows, examples in (("long", long_rows(scale)), ("ragged", ragged_rows(scale))):
        lengths = [len(e.ids) for e in examples]
        inputs = _attention_inputs(scale, sum(lengths))
        for way, (attend, kernel, window) in attention_ways(scale).items():
            result: dict[str, Any] = {"rows": rows, "way": way}
            function = partial(attend, lengths=lengths)
            try:
                with nullcontext() if kernel is None else sdpa_kernel(kernel):
                    result["seconds"] = time_median(partial(_attention, inputs, function), scale)
                    if rows == "ragged":
                        result["errors"] = _attention_errors(inputs, function, lengths, window)
            except Exception as error:
                result["problem"] = sentence(error)
            found.append(result)
    return found


def attention_ways(scale: Scale) -> dict[str, tuple[Callable[..., Tensor], SDPBackend | None, int | None]]:
    """The engine's packed attention, without and with a sliding window, and SDPA for each example by each kernel."""
    window = 64 // scale.shrink
    ways: dict[str, tuple[Callable[..., Tensor], SDPBackend | None, int | None]] = {
        "packed": (packed_attention, None, None),
        "packed, window": (partial(packed_attention, window=window), None, window),
        "SDPA, flash": (_sdpa, SDPBackend.FLASH_ATTENTION, None),
    }
    return ways | ({"SDPA, cuDNN": (_sdpa, SDPBackend.CUDNN_ATTENTION, None)} if scale.cuda else {})


def attention_is_right(found: list[dict[str, Any]], scale: Scale) -> bool:
    """The packed ways ran, as near to fp32 as the type allows."""
    packed = [a for a in found if a["way"].startswith("packed")]
    limit = 1e-5 if scale.dtype is torch.float32 else 2e-2
    return all("problem" not in a and max(a.get("errors", {"": 0.0}).values()) < limit for a in packed)


def fastest_kernel(found: list[dict[str, Any]], scale: Scale) -> SDPBackend | None:
    """The SDPA kernel that PEFT is given: the fastest on long rows."""
    timed = [a for a in found if a["rows"] == "long" and a["way"].startswith("SDPA") and "seconds" in a]
    if not scale.cuda or not timed:
        return None
    return attention_ways(scale)[min(timed, key=lambda a: a["seconds"])["way"]][1]


def _attention_inputs(scale: Scale, n: int) -> list[Tensor]:
    """q, k, v, and the gradient of the output."""
    heads, groups = scale.shape["num_attention_heads"], scale.shape["num_key_value_heads"]
    draw = torch.Generator(scale.device).manual_seed(0)
    shapes = [(s[0], s[1], scale.shape["head_dim"]) for s in ((heads, n), (groups, n), (groups, n), (n, heads))]
    return [torch.randn(*s, generator=draw, device=scale.device).to(scale.dtype) for s in shapes]


def _attention(inputs: list[Tensor], attend: Callable[..., Tensor]) -> list[Tensor]:
    """Forward and backward: output and the gradients of q, k, v."""
    leaves = [t.detach().requires_grad_(True) for t in inputs[:3]]
    out = attend(*leaves, scale=leaves[0].shape[-1] ** -0.5)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


def _attention_errors(
    inputs: list[Tensor], attend: Callable[..., Tensor], lengths: list[int], window: int | None
) -> dict[str, float]:
    exact = _attention([t.float() for t in inputs], partial(_plain, lengths=lengths, window=window))
    return {
        name: distance(a, b)
        for name, a, b in zip(("out", "dq", "dk", "dv"), _attention(inputs, attend), exact, strict=True)
    }


def _per_example(one: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    parts = zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True)
    return torch.cat([one(*part).transpose(0, 1) for part in parts])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    def one(*qkv: Tensor) -> Tensor:
        batch_of_one = [t[None] for t in qkv]
        return F.scaled_dot_product_attention(*batch_of_one, is_causal=True, scale=scale, enable_gqa=True)[0]

    return _per_example(one, q, k, v, lengths)


def _plain(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None) -> Tensor:
    return _per_example(partial(attention_reference, scale=scale, window=window), q, k, v, lengths)


def distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a.double() - b.double()).norm() / b.double().norm())


# --- the head's loss: 6 % of an update's arithmetic, but its passes over the logits can take longer than that ---


def time_head(scale: Scale) -> dict[str, Any]:
    """Seconds of the token loss with its gradient for one long row, and the floor of its two products."""
    m, h, v = scale.long, scale.shape["hidden_size"], scale.shape["vocab_size"]
    draw = torch.Generator(scale.device).manual_seed(0)
    hidden, weight = (torch.randn(n, h, generator=draw, device=scale.device).to(scale.dtype) for n in (m, v))
    target = torch.randint(v, (m,), generator=draw, device=scale.device)
    share = torch.full((m,), 1 / m, device=scale.device)
    once = partial(token_loss, hidden.requires_grad_(True), Head(weight * h**-0.5), target, share)
    try:
        return {"rows": m, "seconds": time_median(once, scale), "floor_seconds": 4 * m * v * h / matrix_ceiling(scale)}
    except Exception as error:
        traceback.print_exc()
        return {"rows": m, "problem": sentence(error)}


# --- whole models ---


def check_parity(scale: Scale, tune: str) -> dict[str, Any]:
    """bf16 against fp32 on one small model: the engine may not be further off than PEFT is, or hardly."""
    try:
        made = _losses_and_gradients(scale, tune)
    except Exception as error:  # the speeds are still worth measuring
        traceback.print_exc()
        return {"tune": tune, "passed": False, "errors": {}, "problem": sentence(error)}
    loss, gradient = made.pop("reference")
    errors = {name: _errors(found, loss, gradient) for name, found in made.items()}
    return {"tune": tune, "passed": passes(errors), "errors": errors, "loss": loss}


def _losses_and_gradients(scale: Scale, tune: str) -> dict[str, tuple[float, Tensor]]:
    """The reference is PEFT in fp32 on the same (dequantised) weights, each example alone and unpadded."""
    base = build_model(scale.parity_shape, torch.bfloat16, scale.device, nf4=tune == "qlora")
    exact = dense_copy(base, torch.float32)
    rows = ragged_rows(scale)[:12]
    budget = 4 * max(len(row.ids) for row in rows)
    ways = {
        "reference": (exact, partial(peft_sdpa, adapters=torch.float32, budget=1)),
        "engine, fp32": (exact, partial(engine, budget=budget)),
        "engine, bf16": (base, partial(engine, budget=budget)),
        "engine, bf16, checkpointing": (base, partial(engine, budget=budget, checkpointing=True)),
        "PEFT, bf16, adapters bf16": (base, partial(peft_sdpa, adapters=torch.bfloat16, budget=budget)),
        "PEFT, bf16, adapters fp32": (base, partial(peft_sdpa, adapters=torch.float32, budget=budget)),
    }
    return {name: _loss_and_gradient(system(model, rows)) for name, (model, system) in ways.items()}


def _loss_and_gradient(system: AbstractContextManager[Running]) -> tuple[float, Tensor]:
    """Of one adapter for every system, as if after some training (B not zero); the gradient as one fp64 vector."""
    with system as running:
        settled(running.adapter)
        loss = running.gradient()
        return loss, torch.cat([g.detach().double().flatten().cpu() for _, g in sorted(running.grads().items())])


def settled(adapter: dict[str, Tensor]) -> None:
    """Give an adapter the numbers that it might have after some training: B is not zero."""
    draw = torch.Generator().manual_seed(1)
    for name, tensor in sorted(adapter.items()):
        spread = 0.1 if name.endswith("lora_B") else 1.0  # ten times more, and bf16 loses 15 % of any gradient
        tensor.copy_(torch.randn(tensor.shape, generator=draw) * spread * tensor.shape[-1] ** -0.5)


def _errors(found: tuple[float, Tensor], loss: float, gradient: Tensor) -> dict[str, float]:
    return {
        "loss": abs(found[0] - loss) / abs(loss),
        "gradient": distance(found[1], gradient),
        "cosine": float(F.cosine_similarity(found[1], gradient, 0)),
    }


def passes(errors: dict[str, dict[str, float]]) -> bool:
    """In fp32 rounding only; in bf16 at most half as far again from the truth as PEFT with bf16 adapters."""
    exact, peft = errors["engine, fp32"], errors["PEFT, bf16, adapters bf16"]
    ours = [errors["engine, bf16"], errors["engine, bf16, checkpointing"]]
    return (
        max(exact["loss"], exact["gradient"]) < 2e-5
        and all(e["gradient"] < 1.5 * peft["gradient"] and e["cosine"] > 0.99 for e in ours)
        and all(e["loss"] < max(1.5 * peft["loss"], 1e-3) for e in ours)
    )
