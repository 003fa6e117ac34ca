"""The group losses against the papers' formulas, written a second time as loops over completions, in float64."""

import math

import pytest
import torch

from welltuned.objectives.grpo import GrpoSettings, LossType, Scale, advantages, policy_loss, token_weights

LENGTHS = (3, 1, 5, 2, 4, 7)
LONGEST = 8


def settings(loss_type, **changes):
    return GrpoSettings(
        **{"loss_type": loss_type, "max_completion_length": LONGEST, "epsilon": 0.2, "epsilon_high": 0.28, **changes}
    )


def reference(logprob, old, ref, advantage, loss_type, beta, epsilon=0.2, high=0.28, counted=LENGTHS):
    """The loss by loops; `logprob`, `old` and `ref` are lists of tensors, one a completion; 0 counted is masked."""
    sequences, all_tokens = len(logprob), sum(counted)
    total = 0.0
    for lp, o, r, a, n in zip(logprob, old, ref, advantage, counted, strict=True):
        if not n:
            continue
        log_ratio = lp - o
        if loss_type is LossType.GSPO:
            log_ratio = log_ratio.mean() * torch.ones_like(lp)
        terms = []
        for t in range(len(lp)):
            rho = torch.exp(log_ratio[t])
            best = torch.min(rho * a, torch.clamp(rho, 1 - epsilon, 1 + high) * a)
            kl = torch.exp(r[t] - lp[t]) - (r[t] - lp[t]) - 1
            terms.append(-best + beta * kl)
        if loss_type in (LossType.GRPO, LossType.GSPO):
            total = total + torch.stack(terms).mean() / sequences
        elif loss_type is LossType.DAPO:
            total = total + torch.stack(terms).sum() / all_tokens
        else:
            total = total + torch.stack(terms).sum() / (sequences * LONGEST)
    return total


def problem(spread=0.4):
    """Ratios on both sides of both clips, advantages of both signs."""
    torch.manual_seed(1)
    old = [-torch.rand(n, dtype=torch.float64) * 3 for n in LENGTHS]
    logprob = [(o + spread * torch.randn_like(o)).requires_grad_() for o in old]
    ref = [o + 0.3 * torch.randn_like(o) for o in old]
    return logprob, old, ref, torch.tensor([1.0, -1.2, 0.5, -0.3, 0.0, 2.0], dtype=torch.float64)


def ours(logprob, old, ref, advantage, setting, counted=LENGTHS, parts=((0, 1, 2, 3, 4, 5),)):
    weight = token_weights(torch.tensor(counted), setting)
    value = torch.zeros((), dtype=torch.float64)
    for part in parts:
        kept = [s for s in part if counted[s]]
        if not kept:
            continue
        sequence = torch.cat([torch.full((LENGTHS[s],), s) for s in kept])
        lp, o, r = (torch.cat([x[s] for s in kept]) for x in (logprob, old, ref))
        found = policy_loss(lp, o, r if setting.beta else None, sequence, advantage, weight, setting)
        value = value + found.value
    return value


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", LossType)
def test_equals_the_formula_in_value_and_gradient(loss_type, beta):
    logprob, old, ref, advantage = problem()
    setting = settings(loss_type, beta=beta)
    mine = ours(logprob, old, ref, advantage, setting)
    plain = reference(logprob, old, ref, advantage, loss_type, beta)
    torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-14)
    for a, b in zip(torch.autograd.grad(mine, logprob), torch.autograd.grad(plain, logprob), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss_type", LossType)
def test_any_cut_gives_the_same(loss_type):
    logprob, old, ref, advantage = problem()
    setting = settings(loss_type, beta=0.1)
    whole = ours(logprob, old, ref, advantage, setting)
    for parts in (((0,), (1,), (2,), (3,), (4,), (5,)), ((5, 0, 3), (2, 4, 1)), ((1, 2), (0, 3, 4, 5))):
        torch.testing.assert_close(ours(logprob, old, ref, advantage, setting, parts=parts), whole, rtol=1e-12, atol=0)


def test_a_mean_of_means_would_be_seen():
    """The fault of trainers: tokens divided within each micro-batch. It is far from what any cut gives here."""
    logprob, old, ref, advantage = problem()
    setting = settings(LossType.DAPO)
    whole = ours(logprob, old, ref, advantage, setting)
    means = []
    for part in ((0, 1, 3), (2, 4, 5)):
        counted = tuple(n if s in part else 0 for s, n in enumerate(LENGTHS))
        means.append(ours(logprob, old, ref, advantage, setting, counted=counted, parts=(part,)))
    assert abs(sum(means) / 2 - whole) > 0.01 * abs(whole)


@pytest.mark.parametrize("loss_type", LossType)
def test_masked_completions_have_no_gradient(loss_type):
    logprob, old, ref, advantage = problem()
    counted = (3, 1, 0, 2, 4, 0)
    mine = ours(logprob, old, ref, advantage, settings(loss_type), counted=counted)
    plain = reference(logprob, old, ref, advantage, loss_type, 0.0, counted=counted)
    torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-14)
    grads = torch.autograd.grad(mine, logprob, allow_unused=True)
    assert grads[2] is None and grads[5] is None
    assert grads[0].any()


def test_on_policy_the_gradient_is_that_of_the_weighted_likelihood():
    logprob, old, _, advantage = problem(spread=0.0)
    mine = ours(logprob, old, old, advantage, settings(LossType.DAPO))
    for s, grad in enumerate(torch.autograd.grad(mine, logprob)):
        torch.testing.assert_close(grad, torch.full_like(grad, float(-advantage[s]) / sum(LENGTHS)))


def test_clipping_is_counted():
    setting = settings(LossType.GRPO)
    log_ratio = torch.tensor([1.3, 1.3, 0.7, 0.7, 1.27], dtype=torch.float64).log()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    zero, index = torch.zeros(5, dtype=torch.float64), torch.arange(5)
    found = policy_loss(log_ratio, zero, None, index, advantage, torch.ones(5), setting)
    assert found.clipped == 2  # risen too far and good, fallen too far and bad


# ── advantages ──


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]])
    found = advantages(rewards, Scale.GROUP)
    std = math.sqrt(1 / 3)  # Bessel's correction, as TRL has it
    torch.testing.assert_close(found.value_PG[0], torch.tensor([1, -1, -1, 1]).double() * 0.5 / (std + 1e-4))
    torch.testing.assert_close(found.std_P, torch.tensor([std, 1.0]).double())
    plain = advantages(rewards, Scale.NONE).value_PG
    torch.testing.assert_close(plain[1], torch.tensor([1.5, -0.5, -0.5, -0.5]).double())
    torch.testing.assert_close(
        advantages(rewards, Scale.BATCH).value_PG, plain / (rewards.double().std() + 1e-4), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("scale", Scale)
def test_a_group_without_signal_is_exactly_zero(scale):
    """0.1 eight times: the mean is not 0.1 in floating point, and a rest divided by 1e-4 would be noise."""
    rewards = torch.tensor([[0.1] * 7, [0.0, 1.0] + [0.1] * 5], dtype=torch.float64)
    found = advantages(rewards, scale)
    assert found.silent_P.tolist() == [True, False]
    assert not found.value_PG[0].any()
    assert found.value_PG[1].all()


@pytest.mark.parametrize("scale", Scale)
def test_unknown_rewards_are_left_out_of_the_statistics(scale):
    nan = math.nan
    found = advantages(torch.tensor([[1.0, nan, 0.0, 1.0], [nan, nan, 2.0, nan], [0.0, 1.0, 0.0, 0.0]]), scale)
    assert not found.value_PG.isnan().any()
    assert found.value_PG[0, 1] == 0
    assert found.silent_P.tolist() == [False, True, False]  # one known reward has nothing to be compared with
    if scale is not Scale.BATCH:
        known = advantages(torch.tensor([[1.0, 0.0, 1.0]]), scale).value_PG[0]
        torch.testing.assert_close(found.value_PG[0, [0, 2, 3]], known)
