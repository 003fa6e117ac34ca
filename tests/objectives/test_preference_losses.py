"""The losses on log-probabilities of answers, against the papers' formulas written out in plain float64 Python."""

import math

import pytest
import torch

from welltuned.objectives.preference import (
    Answers,
    DpoSettings,
    KtoSettings,
    LossType,
    dpo_loss,
    kto_loss,
    log1mexp,
    orpo_loss,
    reward_loss,
)

CHOSEN, REJECTED = [-31.0, -4.5, -80.0, -12.0], [-29.0, -9.5, -77.0, -30.0]
REF_CHOSEN, REF_REJECTED = [-30.0, -5.0, -83.5, -12.0], [-30.5, -8.0, -75.0, -12.5]
TOKENS = [10, 3, 21, 4], [8, 5, 20, 9]


def sigma(x):
    return 1 / (1 + math.exp(-x))


def answers(logp, reference, tokens):
    made = [torch.tensor(values, dtype=torch.float64) for values in (logp, reference, tokens)]
    return Answers(made[0].requires_grad_(), *made[1:])


def both():
    return answers(CHOSEN, REF_CHOSEN, TOKENS[0]), answers(REJECTED, REF_REJECTED, TOKENS[1])


def plain_dpo(kind, c, r, rc, rr, nc, nr, b, e, gamma):
    """One pair's loss, by its formula."""
    h, h_mean = (c - rc) - (r - rr), (c - rc) / nc - (r - rr) / nr
    return {
        "sigmoid": lambda: -(1 - e) * math.log(sigma(b * h)) - e * math.log(sigma(-b * h)),
        "robust": lambda: (-(1 - e) * math.log(sigma(b * h)) + e * math.log(sigma(-b * h))) / (1 - 2 * e),
        "hinge": lambda: max(0.0, 1 - b * h),
        "ipo": lambda: (h_mean - 1 / (2 * b)) ** 2,
        "sigmoid_norm": lambda: -math.log(sigma(b * h_mean)),
        "simpo": lambda: -math.log(sigma(b * (c / nc - r / nr) - gamma)),
    }[kind]()


@pytest.mark.parametrize("kind", [str(kind) for kind in LossType])
@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.7, 0.2)])
def test_dpo_by_its_formulas(kind, beta, smoothing):
    chosen, rejected = both()
    settings = DpoSettings(loss_type=LossType(kind), beta=beta, label_smoothing=smoothing, simpo_gamma=0.4)
    found = dpo_loss(chosen, rejected, settings)
    rows = list(zip(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, *TOKENS, strict=True))
    expected = [plain_dpo(kind, *row, beta, smoothing, 0.4) for row in rows]
    torch.testing.assert_close(found.loss_P.tolist(), expected, rtol=1e-12, atol=0)
    # The gradient of both log-probabilities by differences of the formula.
    found.loss_P.sum().backward()
    step = 1e-6
    for at, (c, r, *rest) in enumerate(rows):
        for answer, shift in ((chosen, (step, 0)), (rejected, (0, step))):
            up = plain_dpo(kind, c + shift[0], r + shift[1], *rest, beta, smoothing, 0.4)
            down = plain_dpo(kind, c - shift[0], r - shift[1], *rest, beta, smoothing, 0.4)
            assert float(answer.logp_P.grad[at]) == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-9)


def test_rewards():
    chosen, rejected = both()
    plain = dpo_loss(chosen, rejected, DpoSettings(beta=0.3))
    assert plain.chosen_P.tolist() == pytest.approx([0.3 * (a - b) for a, b in zip(CHOSEN, REF_CHOSEN, strict=True)])
    mean = dpo_loss(chosen, rejected, DpoSettings(loss_type=LossType.SIMPO, beta=2.0))
    assert mean.rejected_P.tolist() == pytest.approx([2 * a / n for a, n in zip(REJECTED, TOKENS[1], strict=True)])
    assert not plain.chosen_P.requires_grad and not mean.rejected_P.requires_grad


def test_at_the_start_dpo_is_ln_2():
    same = answers(CHOSEN, CHOSEN, TOKENS[0]), answers(REJECTED, REJECTED, TOKENS[1])
    for smoothing in (0.0, 0.3):
        loss = dpo_loss(*same, DpoSettings(label_smoothing=smoothing)).loss_P
        assert loss.tolist() == pytest.approx([math.log(2)] * 4, rel=1e-12)


def test_orpo_by_its_formula():
    chosen, rejected = both()
    found = orpo_loss(chosen, rejected, 0.25)
    for at, (c, r, nc, nr) in enumerate(zip(CHOSEN, REJECTED, *TOKENS, strict=True)):
        p, q = math.exp(c / nc), math.exp(r / nr)
        expected = -0.25 * math.log(sigma(math.log(p / (1 - p) / (q / (1 - q)))))
        assert float(found.loss_P[at].detach()) == pytest.approx(expected, rel=1e-10)
        assert float(found.chosen_P[at]) == pytest.approx(0.25 * c / nc)


def test_log1mexp_at_both_ends():
    x = torch.tensor([-1e-12, -1e-3, -0.6, -0.8, -40.0, -800.0], dtype=torch.float64, requires_grad=True)
    value = log1mexp(x)
    assert float(value[0].detach()) == pytest.approx(math.log(1e-12), rel=1e-9)
    for at in (1, 2, 3):
        assert float(value[at].detach()) == pytest.approx(math.log(1 - math.exp(float(x[at].detach()))), rel=1e-12)
    assert float(value[4].detach()) == pytest.approx(-math.exp(-40.0), rel=1e-12)
    value.sum().backward()
    assert bool(torch.isfinite(x.grad).all())
    assert float(log1mexp(torch.zeros(1))) > -math.inf  # a certain answer is not the end of a run


@pytest.mark.parametrize("kl", [0.0, 2.5])
def test_kto_by_its_formula(kl):
    mine = answers(CHOSEN, REF_CHOSEN, TOKENS[0])
    desirable = [True, False, False, True]
    settings = KtoSettings(beta=0.4, desirable_weight=1.5, undesirable_weight=0.8)
    found = kto_loss(mine, torch.tensor(desirable), kl, settings)
    for at, (c, reference, good) in enumerate(zip(CHOSEN, REF_CHOSEN, desirable, strict=True)):
        ratio = c - reference
        expected = 1.5 * (1 - sigma(0.4 * (ratio - kl))) if good else 0.8 * (1 - sigma(0.4 * (kl - ratio)))
        assert float(found[at].detach()) == pytest.approx(expected, rel=1e-12)
    found.sum().backward()
    assert (mine.logp_P.grad < 0).tolist() == desirable  # good answers are made likelier, bad ones less likely


@pytest.mark.parametrize("centre", [0.0, 0.01])
def test_reward_by_its_formula(centre):
    chosen, rejected = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 3.0]).double()
    expected = [-math.log(sigma(c - r)) + centre * (c + r) ** 2 for c, r in ((1.0, 0.5), (-2.0, 3.0))]
    assert reward_loss(chosen, rejected, centre).loss_P.tolist() == pytest.approx(expected, rel=1e-12)
