"""An update of grpo on a tiny model, against the papers' formulas by the model's own forward and plain autograd."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from welltuned.data.conversation import Message
from welltuned.data.prompts import GroupMixture, Prompt
from welltuned.models import sample
from welltuned.models.full import FullParameters
from welltuned.models.fuse import find_head, fuse
from welltuned.models.lora import LoraSettings, attach
from welltuned.models.packed import packed_model
from welltuned.models.sample import Sampling
from welltuned.objectives.grpo import GrpoSettings, LossType, Scale
from welltuned.objectives.rewards import Reward
from welltuned.training import grpo_step
from welltuned.training.grpo_step import Grpo
from welltuned.training.step import Engine

V, STOP, G, LONGEST, T = 61, 3, 4, 9, 0.8


class Tokenizer:
    """Texts are the ids."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


def prompt(number, length):
    ids = np.random.default_rng(number).integers(4, V, length, dtype=np.int32)
    return Prompt(ids, (Message("user", f"prompt {number}"),), None, 0, {"number": number}, f"p.jsonl:{number}", number)


PROMPTS = [prompt(1, 7), prompt(2, 3), prompt(3, 5)]
KEYS = [101, 202, 303]


def judge(samples):
    """More even tokens are better; the third prompt's completions are all alike."""
    return [0.1 if s.row["number"] == 3 else sum(int(t) % 2 == 0 for t in s.completion.split()) for s in samples]


def new_model():
    torch.manual_seed(0)
    shape = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, initializer_range=0.2)).eval()


@pytest.fixture
def engine():
    model = new_model()
    bank = attach(model, LoraSettings(r=4, lora_alpha=8))
    bank.flat_KP += 0.1 * torch.randn(bank.flat_KP.shape, generator=torch.Generator().manual_seed(1))
    bank.start_KP = bank.flat_KP.clone()
    fuse(model, bank)
    head = find_head(model)
    with packed_model(model):
        yield Engine(model, bank, head, token_budget=64)


def objective(loss_type=LossType.DAPO, reward=judge, iterations=1, stop=(STOP,), **changes):
    settings = GrpoSettings(loss_type=loss_type, max_completion_length=LONGEST, **changes)
    sampling = Sampling(max_new_tokens=LONGEST, temperature=T, stop_ids=stop)
    rewards = [Reward("judge", 1.0, reward)]
    return Grpo(settings, sampling, rewards, Tokenizer(), generations=G, iterations=iterations)


def gradient(made, engine, rows=PROMPTS, keys=KEYS):
    engine.trained.grad_KP.zero_()
    found = made.accumulate_gradient(engine, rows, keys)
    return found, engine.trained.grad_KP.clone()


def completions(made):
    """All completions of the set at hand, in order; those without a gradient are not among them."""
    return {s: ids for group in made._sampled.groups for s, ids in zip(group.sequences, group.completions, strict=True)}


def sampled_by_hand(engine, rows=PROMPTS, keys=KEYS, stop=(STOP,)):
    engine.trained.no_dropout()
    names = [[grpo_step.name_of(key, g) for g in range(G)] for key in keys]
    sampling = Sampling(max_new_tokens=LONGEST, temperature=T, stop_ids=stop)
    made = sample.complete(engine.model, engine.head, [r.ids for r in rows], names, sampling)
    return [c for group in made for c in group]


def logprobs_by_hand(engine, row, ids):
    """Log-probabilities of a completion by the model's own forward, one sequence, without any of our layouts."""
    whole = torch.from_numpy(np.concatenate([row.ids, ids]).astype(np.int64))
    engine.model.set_attn_implementation("sdpa")
    try:
        z = engine.model(input_ids=whole[None], use_cache=False).logits[0, len(row.ids) - 1 : -1].double() / T
    finally:
        engine.model.set_attn_implementation("welltuned_packed")
    return z.log_softmax(-1).gather(1, whole[len(row.ids) :, None])[:, 0]


def loss_by_hand(engine, every, loss_type, scale=Scale.GROUP, masked=False, beta=0.0, ref=None, old=None):
    rewards = torch.tensor(
        [sum(int(t) % 2 == 0 for t in (c.ids[:-1] if c.ended else c.ids)) for c in every], dtype=torch.float64
    ).view(-1, G)
    rewards[2] = 0.1
    std = rewards.std(1, keepdim=True)
    advantage = rewards - rewards.mean(1, keepdim=True)
    advantage = (advantage / (std + 1e-4) if scale is Scale.GROUP else advantage).flatten()
    advantage[2 * G :] = 0
    counted = [len(c.ids) if c.ended or not masked else 0 for c in every]
    total = 0.0
    for s, completion in enumerate(every):
        if not counted[s]:
            continue
        lp = logprobs_by_hand(engine, PROMPTS[s // G], completion.ids)
        log_ratio = lp - (lp.detach() if old is None else old[s])
        if loss_type is LossType.GSPO:
            log_ratio = log_ratio.mean().expand(len(lp))
        ratio = log_ratio.exp()
        each = -torch.min(ratio * advantage[s], ratio.clamp(0.8, 1.28) * advantage[s])
        if beta:
            each = each + beta * ((ref[s] - lp).exp() - (ref[s] - lp) - 1)
        if loss_type is LossType.DAPO:
            total = total + each.sum() / sum(counted)
        elif loss_type is LossType.DR_GRPO:
            total = total + each.sum() / (len(every) * LONGEST)
        else:
            total = total + each.mean() / len(every)
    return total


def gradient_by_hand(engine, loss):
    engine.trained.grad_KP.zero_()
    loss.backward()
    return engine.trained.grad_KP.clone()


def close(mine, plain, rtol=2e-4):
    assert plain.abs().max() > 0
    torch.testing.assert_close(mine, plain, rtol=rtol, atol=rtol * float(plain.abs().max()))


@pytest.mark.parametrize("loss_type", LossType)
def test_equals_the_formula(engine, loss_type):
    found, mine = gradient(objective(loss_type), engine)
    every = sampled_by_hand(engine)
    loss = loss_by_hand(engine, every, loss_type)
    assert found.loss == pytest.approx(float(loss), rel=1e-5, abs=1e-7)
    close(mine, gradient_by_hand(engine, loss))
    assert found.measures["clip_ratio"] == 0
    assert found.measures["frac_reward_zero_std"] == pytest.approx(1 / 3)
    assert found.measures["completions/mean_length"] == pytest.approx(np.mean([len(c.ids) for c in every]))
    assert found.tokens == G * sum(len(p.ids) for p in PROMPTS) + sum(len(c.ids) for c in every)


@pytest.mark.parametrize("loss_type", LossType)
def test_a_second_iteration_has_ratios_and_a_third_set_is_new(engine, loss_type):
    """The set of the first call is used again after the weights moved; its ratios are to the policy that sampled."""
    made = objective(loss_type, iterations=2, beta=0.1)
    every = sampled_by_hand(engine)
    first, _ = gradient(made, engine)
    assert first.measures["kl"] == 0.0  # the reference is the start, and this is it
    with torch.no_grad():
        old = [logprobs_by_hand(engine, PROMPTS[s // G], c.ids) for s, c in enumerate(every)]
    engine.trained.flat_KP += 0.05 * torch.randn(
        engine.trained.flat_KP.shape, generator=torch.Generator().manual_seed(7)
    )
    second, mine = gradient(made, engine, keys=[7, 8, 9])
    plain = gradient_by_hand(engine, loss_by_hand(engine, every, loss_type, beta=0.1, ref=old, old=old))
    close(mine, plain, rtol=1e-3)
    assert second.measures["kl"] > 0
    assert "seconds/generation" not in second.measures
    again, same = gradient(made, engine, keys=[7, 8, 9])  # the same update, made again
    assert again.loss == second.loss and torch.equal(same, mine)
    third, _ = gradient(made, engine, keys=[10, 11, 12])
    assert third.measures["seconds/generation"] > 0 and third.measures["clip_ratio"] == 0


def test_the_reference_is_the_start_and_the_weights_come_back(engine):
    made = objective(beta=0.5)
    with torch.no_grad():
        engine.trained.flat_KP += 0.05 * torch.randn(
            engine.trained.flat_KP.shape, generator=torch.Generator().manual_seed(7)
        )
    moved = engine.trained.flat_KP.clone()
    every = sampled_by_hand(engine)
    found, mine = gradient(made, engine)
    assert torch.equal(engine.trained.flat_KP, moved)
    engine.trained.flat_KP.copy_(engine.trained.start_KP)
    with torch.no_grad():
        ref = [logprobs_by_hand(engine, PROMPTS[s // G], c.ids) for s, c in enumerate(every)]
    engine.trained.flat_KP.copy_(moved)
    close(mine, gradient_by_hand(engine, loss_by_hand(engine, every, LossType.DAPO, beta=0.5, ref=ref)))
    assert found.measures["kl"] > 0


@pytest.mark.parametrize("loss_type", LossType)
@pytest.mark.parametrize("share", [True, False])
def test_any_cut_and_both_layouts_give_the_same(engine, loss_type, share, monkeypatch):
    whole, plain = gradient(objective(loss_type, beta=0.1), engine)
    monkeypatch.setattr(grpo_step, "shares", lambda _: share)
    for budget in (1, 17, 1000):
        found, mine = gradient(objective(loss_type, beta=0.1), replace(engine, token_budget=budget))
        assert found.loss == pytest.approx(whole.loss, rel=1e-5, abs=1e-7)
        close(mine, plain, rtol=1e-4)


def test_dropout_is_the_same_in_any_cut(monkeypatch):
    model = new_model()
    bank = attach(model, LoraSettings(r=4, lora_alpha=8, lora_dropout=0.3))
    bank.flat_KP += 0.1 * torch.randn(bank.flat_KP.shape, generator=torch.Generator().manual_seed(1))
    fuse(model, bank)
    engine = Engine(model, bank, find_head(model), token_budget=1000)
    with packed_model(model):
        _, plain = gradient(objective(), engine)
        _, cut = gradient(objective(), replace(engine, token_budget=20))
        monkeypatch.setattr(grpo_step, "shares", lambda _: False)
        _, unshared = gradient(objective(), engine)
    close(cut, plain, rtol=1e-4)
    close(unshared, plain, rtol=1e-4)


def test_full_fine_tuning_trains_the_tied_head_too(engine):
    model = new_model()
    trained = FullParameters(model)
    full = Engine(model, trained, find_head(model), token_budget=1000)
    with packed_model(model):
        found, mine = gradient(objective(beta=0.1), full)
        every = sampled_by_hand(full)
        with torch.no_grad():
            ref = [logprobs_by_hand(full, PROMPTS[s // G], c.ids) for s, c in enumerate(every)]
        loss = loss_by_hand(full, every, LossType.DAPO, beta=0.1, ref=ref)
        close(mine, gradient_by_hand(full, loss))
    assert found.measures["kl"] == 0


def test_groups_without_signal_give_exactly_zero(engine):
    found, mine = gradient(objective(reward=lambda samples: [0.1] * len(samples)), engine)
    assert not mine.any()
    assert found.loss == 0.0
    assert found.measures["frac_reward_zero_std"] == 1.0


def test_truncated_completions_are_masked(engine):
    made = objective(mask_truncated_completions=True)
    found, mine = gradient(made, engine)
    every = sampled_by_hand(engine)
    cut_off = sum(not c.ended for c in every)
    assert 0 < cut_off < len(every), "the test needs both kinds"
    assert found.measures["completions/clipped_ratio"] == pytest.approx(cut_off / len(every))
    assert found.supervised_tokens == sum(len(c.ids) for c in every if c.ended)
    close(mine, gradient_by_hand(engine, loss_by_hand(engine, every, LossType.DAPO, masked=True)))
    _, nothing = gradient(objective(mask_truncated_completions=True, stop=()), engine)
    assert not nothing.any()


def test_a_fault_is_told_and_the_completion_left_out(engine):
    def broken(samples):
        values = judge(samples)
        if len(values) > 1 or samples[0].completion == bad:
            raise ValueError("no such unit")
        return values

    every = sampled_by_hand(engine)
    bad = Tokenizer().decode((every[1].ids[:-1] if every[1].ended else every[1].ids).tolist(), True)
    found, mine = gradient(objective(reward=broken), engine)
    assert found.measures["reward_faults"] >= 1
    assert "p.jsonl:1" in found.notes[0] and "no such unit" in found.notes[0]
    assert mine.any()
    assert math.isfinite(found.measures["reward"])
    made = objective(reward=lambda samples: [math.nan] * len(samples))
    found, mine = gradient(made, engine)
    assert not mine.any()
    assert found.measures["reward_faults"] == G * len(PROMPTS)
    assert len(found.notes) == grpo_step.SHOWN_FAULTS


def test_a_new_object_makes_the_same_update_bit_for_bit(engine):
    """All randomness is a function of the rows' keys, so a run that goes on needs no random state."""
    made = objective()
    gradient(made, engine, keys=[1, 2, 3])
    first, mine = gradient(made, engine)
    second, again = gradient(objective(), engine)
    assert torch.equal(mine, again)
    untimed = [{k: v for k, v in f.measures.items() if not k.startswith("seconds")} for f in (first, second)]
    assert untimed[0] == untimed[1]
    _, other = gradient(objective(), engine, keys=[1, 2, 3])
    assert not torch.equal(mine, other)


def test_an_evaluation_leaves_training_as_it_would_be_without(engine):
    made = objective(beta=0.1)
    _, mine = gradient(made, engine)
    engine.trained.grad_KP.zero_()
    found = made.evaluate(engine, PROMPTS)
    assert not engine.trained.grad_KP.any()
    assert found.loss == -found.measures["eval_reward"]
    values = torch.tensor([-v for v in found.loss_of_example], dtype=torch.float64)
    assert found.measures["eval_reward"] == pytest.approx(float(values.mean()))
    assert found.standard_error == pytest.approx(float(values.std() / math.sqrt(3)))
    assert [s["row"] for s in found.samples] == [p.origin for p in PROMPTS]
    assert {s["stopped"] for s in found.samples} <= {"by its end token", "at max_completion_length"}
    assert torch.equal(gradient(objective(beta=0.1), engine)[1], mine)


def test_a_set_that_was_sampled_is_kept_when_its_gradient_runs_out_of_memory(engine, monkeypatch):
    made, calls = objective(), []
    real = Grpo._follow

    def follow(self, *arguments):
        calls.append(self._sampled)
        if len(calls) == 1:
            raise MemoryError
        return real(self, *arguments)

    monkeypatch.setattr(Grpo, "_follow", follow)
    with pytest.raises(MemoryError):
        gradient(made, engine)
    gradient(made, engine)
    assert calls[0] is calls[1]


def test_updates_are_counted_in_completions():
    mixed = GroupMixture((10,), (10,), 0, group=4, iterations=2)
    assert mixed.steps_per_epoch(12) == 2 * math.ceil(10 / 3)
    updates = [mixed.update(12, step) for step in range(mixed.steps_per_epoch(12))]
    assert updates[0] == updates[1] != updates[2]
    assert sorted(i for update in updates[::2] for i in update) == list(range(10))
