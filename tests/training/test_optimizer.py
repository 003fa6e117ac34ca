"""The rate of every update, clipping, and AdamW against torch's own on separate tensors."""

import math

import pytest
import torch

from welltuned.models.full import FullParameters
from welltuned.models.lora import Bias, LoraSettings, attach
from welltuned.training.optimizer import AdamWSettings, FlatAdamW, Schedule, Scheduler, clip_


def rates(kind, peak=1.0, warmup_steps=0, total_steps=10):
    schedule = Schedule(kind=kind, peak=peak, warmup_steps=warmup_steps, total_steps=total_steps)
    return [schedule.rate(step) for step in range(total_steps)]


def cosine(done):
    return (1 + math.cos(math.pi * done)) / 2


@pytest.mark.parametrize(
    ("kind", "warmup_steps", "golden"),
    [
        (Scheduler.LINEAR, 0, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        (Scheduler.LINEAR, 2, [1 / 3, 2 / 3, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        (Scheduler.COSINE, 0, [cosine(i / 10) for i in range(10)]),
        (Scheduler.COSINE, 2, [1 / 3, 2 / 3, *(cosine(i / 8) for i in range(8))]),
        (Scheduler.CONSTANT_WITH_WARMUP, 3, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (Scheduler.CONSTANT, 0, [1.0] * 10),
    ],
)
def test_golden_rates(kind, warmup_steps, golden):
    assert rates(kind, warmup_steps=warmup_steps) == pytest.approx(golden, rel=1e-12)
    assert rates(kind, 3e-4, warmup_steps) == pytest.approx([3e-4 * g for g in golden], rel=1e-12)


@pytest.mark.parametrize("kind", list(Scheduler))
@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 1), (1, 1), (1, 2), (5, 100), (10, 10), (20, 10)])
def test_no_update_at_rate_zero(kind, warmup_steps, total_steps):
    found = rates(kind, 2e-3, warmup_steps, total_steps)
    assert all(0 < rate <= 2e-3 for rate in found)
    if warmup_steps < total_steps:
        assert max(found) == 2e-3


@pytest.mark.parametrize("kind", [Scheduler.LINEAR, Scheduler.COSINE])
def test_decay_aims_at_zero_after_the_last_update(kind):
    schedule = Schedule(kind=kind, peak=1.0, warmup_steps=5, total_steps=50)
    found = [schedule.rate(step) for step in range(50)]
    assert found[:6] == sorted(found[:6]) and found[5:] == sorted(found[5:], reverse=True)
    assert schedule.rate(50) == pytest.approx(0, abs=1e-12) and schedule.rate(60) == pytest.approx(0, abs=1e-12)


# ── clipping ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_clip_scales_each_adapter_for_itself():
    grad = torch.tensor([[3.0, 4.0], [0.3, 0.4], [30.0, 40.0]])
    assert clip_(grad, 1.0) == pytest.approx([5.0, 0.5, 50.0])
    torch.testing.assert_close(grad, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.6, 0.8]]))


def test_clip_equals_torchs():
    draw = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=draw).requires_grad_(True) for n in (5, 40, 3)]
    for t in tensors:
        t.grad = torch.randn(t.shape, generator=draw)
    flat = torch.cat([t.grad for t in tensors])[None]
    norm = torch.nn.utils.clip_grad_norm_(tensors, 1.0)
    assert clip_(flat, 1.0) == pytest.approx([float(norm)], rel=1e-6)
    torch.testing.assert_close(flat[0], torch.cat([t.grad for t in tensors]), rtol=1e-5, atol=0)


def test_clip_off_and_clip_of_nothing():
    grad = torch.tensor([[3.0, 4.0]])
    assert clip_(grad, 0) == [5.0] and grad.tolist() == [[3.0, 4.0]]
    zero = torch.zeros(1, 4)
    assert clip_(zero, 1.0) == [0.0] and not zero.any()


def test_clip_does_not_hide_what_is_not_finite():
    assert math.isnan(clip_(torch.tensor([[math.nan, 1.0]]), 1.0)[0])
    assert math.isinf(clip_(torch.tensor([[math.inf, 1.0]]), 1.0)[0])


# ── AdamW ────────────────────────────────────────────────────────────────────────────────────────────────────────────

SETTINGS = AdamWSettings(beta1=0.85, beta2=0.99, eps=1e-7, weight_decay=0.3)


def gradients(shape, step, k=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + k))


def test_flat_adamw_equals_torchs_tensor_by_tensor():
    """Decay reaches matrices and not biases, and every adapter has its own rate."""
    shapes = {"a": (4, 6), "b": (6, 4), "bias": (6,)}
    sizes = [math.prod(s) for s in shapes.values()]
    flat = torch.randn(2, sum(sizes), generator=torch.Generator().manual_seed(0))
    grad = torch.zeros_like(flat)
    plain = [
        [p.view(shape).clone().requires_grad_(True) for p, shape in zip(row.split(sizes), shapes.values(), strict=True)]
        for row in flat
    ]
    plain_optimizers = [
        torch.optim.AdamW(
            [{"params": tensors[:2], "weight_decay": 0.3}, {"params": tensors[2:], "weight_decay": 0.0}],
            betas=(0.85, 0.99), eps=1e-7, lr=0.0, fused=False, foreach=False,
        )
        for tensors in plain
    ]  # fmt: skip
    flat_optimizer = FlatAdamW(flat, grad, sum(sizes[:2]), SETTINGS)
    for step in range(5):
        rate_K = [0.1 / (step + 1), 0.003 * (step + 1)]
        grad.copy_(gradients(grad.shape, step))
        for k, tensors in enumerate(plain):
            for tensor, part in zip(tensors, grad[k].split(sizes), strict=True):
                tensor.grad = part.view(tensor.shape).clone()
            for group in plain_optimizers[k].param_groups:
                group["lr"] = rate_K[k]
            plain_optimizers[k].step()
        flat_optimizer.step(rate_K)
    for row, tensors in zip(flat, plain, strict=True):
        torch.testing.assert_close(row, torch.cat([t.detach().flatten() for t in tensors]), rtol=1e-6, atol=1e-7)


def test_one_adapter_never_depends_on_another():
    """Bit for bit: the same adapter alone, and beside one with another rate."""
    start = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    both, both_grad = start.clone(), torch.zeros(2, 40)
    together = FlatAdamW(both, both_grad, 30, SETTINGS)
    alone = [start[k : k + 1].clone() for k in (0, 1)]
    alone_grad = [torch.zeros(1, 40) for _ in alone]
    separate = [FlatAdamW(p, g, 30, SETTINGS) for p, g in zip(alone, alone_grad, strict=True)]
    for step in range(4):
        both_grad.copy_(gradients((2, 40), step))
        together.step([1e-2, 3e-1])
        for k, rate in enumerate((1e-2, 3e-1)):
            alone_grad[k].copy_(gradients((2, 40), step)[k : k + 1])
            separate[k].step([rate])
    assert torch.equal(both, torch.cat(alone))


def test_a_rate_of_zero_leaves_an_adapter_where_it_is():
    flat, grad = torch.ones(2, 8), torch.ones(2, 8)
    FlatAdamW(flat, grad, 8, SETTINGS).step([0.0, 0.1])
    assert bool((flat[0] == 1).all()) and not bool((flat[1] == 1).any())


def test_zero_grad_and_gradients_left_as_they_are():
    flat, grad = torch.ones(1, 8), torch.full((1, 8), 2.0)
    optimizer = FlatAdamW(flat, grad, 4, SETTINGS)
    optimizer.step([0.1])
    assert bool((grad == 2).all())
    optimizer.zero_grad()
    assert not grad.any()


@pytest.fixture
def model():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    return Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=2))


def test_what_decays_in_an_adapter_bank(model):
    bank = attach(model, LoraSettings(r=4, bias=Bias.LORA_ONLY))
    decays = {s.name: s.start + s.size <= bank.decayed for s in bank.slots}
    assert all(decays[name] == (not name.endswith("bias")) for name in decays)
    assert sum(name.endswith("bias") for name in decays) == 3


def test_what_decays_in_full_fine_tuning(model):
    full = FullParameters(model)
    parameters = dict(model.named_parameters())
    assert {s.name for s in full.slots} == parameters.keys()
    for slot in full.slots:
        inside = slot.start + slot.size <= full.decayed
        assert inside == (parameters[slot.name].dim() > 1), slot.name
        assert parameters[slot.name].data_ptr() == full.flat_KP[0, slot.start :].data_ptr()


def test_a_run_clips_and_names_its_rate(run):
    """The rate in the metrics is the schedule's, the norm that of the gradient before clipping."""
    free = run(max_grad_norm=1e9, warmup_steps=2, lr_scheduler_type="linear")
    tight = run(max_grad_norm=0.01, warmup_steps=2, lr_scheduler_type="linear")
    assert [u["learning_rate"] for u in free.updates] == rates(Scheduler.LINEAR, 2e-2, 2, 12)
    assert tight.updates[0]["grad_norm"] == free.updates[0]["grad_norm"] > 0.01
    assert tight.updates[1]["loss"] == pytest.approx(free.updates[1]["loss"], rel=1e-3)  # Adam hides the first scale
    assert tight.losses != free.losses


# ── rates of their own ───────────────────────────────────────────────────────────────────────────────────────────────


def test_loraplus_is_pefts(tiny_model_dir):
    """B's rate is a multiple of A's: the same numbers as PEFT's optimizer, with a decay that spares nothing of B."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer
    from transformers import AutoModelForCausalLM

    from welltuned.training.optimizer import Span

    def model():
        return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)

    bank = attach(model(), LoraSettings(r=3, target_modules=("q_proj", "up_proj")))
    twin = peft.get_peft_model(model(), peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    theirs = create_loraplus_optimizer(
        twin, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    spans = [Span(s.start, s.start + s.size, 16.0 if s.name.endswith("lora_B") else 1.0) for s in bank.slots]
    ours = FlatAdamW(bank.flat_KP, bank.grad_KP, bank.decayed, AdamWSettings(weight_decay=0.1), spans)
    parameters = {n.replace(".default.weight", "").removeprefix("base_model.model."): p for n, p in
                  twin.named_parameters() if p.requires_grad}  # fmt: skip
    for name, tensor in bank.tensors().items():
        parameters[name].data.copy_(tensor)
    draw = torch.Generator().manual_seed(0)
    for _ in range(4):
        bank.grad_KP.copy_(torch.randn(bank.grad_KP.shape, generator=draw))
        for slot in bank.slots:
            parameters[slot.name].grad = bank.grad_KP[0, slot.start : slot.start + slot.size].view(slot.shape).clone()
        ours.step([1e-2])
        theirs.step()
    moved = bank.flat_KP - bank.start_KP
    for name, tensor in bank.tensors().items():
        assert torch.allclose(tensor, parameters[name], rtol=1e-5, atol=1e-6), name
    assert float(moved.abs().max()) > 0.3  # B's own rate is 0.16


def test_spans_are_cut_where_the_decay_ends():
    from welltuned.training.optimizer import Span

    flat = torch.ones(1, 10)
    spans = [Span(0, 3), Span(3, 5), Span(5, 10, 2.0)]
    optimizer = FlatAdamW(flat, torch.zeros_like(flat), 7, AdamWSettings(weight_decay=0.5), spans)
    optimizer.step([0.1])
    assert flat[0].tolist() == pytest.approx([0.95] * 5 + [0.9] * 2 + [1.0] * 3)
    assert len(optimizer.steps_G) == 3  # neighbours of one rate are one group


def test_the_plan_says_which_rates(tiny_model_dir):
    """LoRA+ and what is trained whole, by the names of the tensors."""
    from types import SimpleNamespace

    from transformers import AutoModelForCausalLM

    from welltuned.training.settings import rate_spans

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    bank = attach(model, LoraSettings(r=3, use_dora=True), ("model.embed_tokens",))
    values = {"learning_rate": 1e-3, "loraplus_lr_ratio": 4.0, "embedding_learning_rate": 1e-4}
    plan = SimpleNamespace(choices=values, value=values.__getitem__)
    found = {slot.name.rpartition(".")[2]: span.factor for slot, span in
             zip(bank.slots, rate_spans(plan, bank), strict=True)}  # fmt: skip
    assert found == pytest.approx({"lora_A": 1.0, "lora_B": 4.0, "weight": 0.1, "lora_magnitude_vector": 4.0})
    assert rate_spans(SimpleNamespace(choices={}, value=None), bank) == []
