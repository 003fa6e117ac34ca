"""Losses on the log-probabilities of whole answers: DPO and its kin, ORPO, KTO, and the reward model's.

Shapes: P pairs (or judged answers, for KTO). A log-probability is the sum over the answer's trained tokens, in nats; a
mean is that over their number. Every function gives one loss a pair; who calls it divides by the number of pairs.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor


class LossType(StrEnum):
    SIGMOID = "sigmoid"
    IPO = "ipo"
    HINGE = "hinge"
    ROBUST = "robust"
    SIGMOID_NORM = "sigmoid_norm"
    SIMPO = "simpo"


@dataclass(frozen=True, slots=True)
class Answers:
    """The log-probabilities of one answer of each pair.

    Attributes:
        logp_P: under the model that is trained.
        reference_P: under the model as it started; zeros where the loss has no reference.
        tokens_P: how many trained tokens each has, float.
    """

    logp_P: Tensor
    reference_P: Tensor
    tokens_P: Tensor

    @property
    def ratio_P(self) -> Tensor:
        """log pi(y|x) - log pi_ref(y|x)."""
        return self.logp_P - self.reference_P

    @property
    def mean_ratio_P(self) -> Tensor:
        return self.ratio_P / self.tokens_P

    @property
    def mean_P(self) -> Tensor:
        return self.logp_P / self.tokens_P


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoSettings:
    """`label_smoothing` is the share of pairs whose label is thought to be wrong (sigmoid, robust)."""

    loss_type: LossType = LossType.SIGMOID
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5

    @property
    def has_reference(self) -> bool:
        return self.loss_type is not LossType.SIMPO


@dataclass(frozen=True, slots=True)
class Judgement:
    """One loss a pair [P], and the implicit rewards of both answers [P], without gradient."""

    loss_P: Tensor
    chosen_P: Tensor
    rejected_P: Tensor


def dpo_loss(chosen: Answers, rejected: Answers, settings: DpoSettings) -> Judgement:
    """DPO and its variants, with h = ratio(chosen) - ratio(rejected), beta b, label smoothing e, token counts |y|.

    sigmoid: -(1 - e) log s(b h) - e log s(-b h). Rafailov et al. 2023, arXiv 2305.18290, equation 7; the smoothing is
        Mitchell's (2023, "A note on DPO with noisy preferences").
    robust: (-(1 - e) log s(b h) + e log s(-b h)) / (1 - 2 e). Chowdhury et al. 2024, arXiv 2403.00409, equation 9.
    hinge: max(0, 1 - b h). Zhao et al. 2023 (SLiC-HF), arXiv 2305.10425, with the log-ratio of Liu et al. 2024 (RSO),
        arXiv 2309.06657.
    ipo: (h' - 1 / (2 b))^2 with ratios that are means over tokens, as the authors compute them. Azar et al. 2023,
        arXiv 2310.12036, equation 17.
    sigmoid_norm: -log s(b h') with the same means. Lambert et al. 2024 (Tulu 3), arXiv 2411.15124, section 5.
    simpo: -log s(b (mean log p(chosen) - mean log p(rejected)) - gamma), no reference. Meng et al. 2024, arXiv
        2405.14734, equation 6.

    Rewards are b ratio(y), of simpo b mean log p(y).
    """
    b, e = settings.beta, settings.label_smoothing
    match settings.loss_type:
        case LossType.SIMPO:
            margin_P = b * (chosen.mean_P - rejected.mean_P)
            rewards = b * chosen.mean_P, b * rejected.mean_P
            return _judged(-F.logsigmoid(margin_P - settings.simpo_gamma), *rewards)
        case LossType.IPO:
            loss_P = (chosen.mean_ratio_P - rejected.mean_ratio_P - 1 / (2 * b)).square()
        case LossType.SIGMOID_NORM:
            loss_P = -F.logsigmoid(b * (chosen.mean_ratio_P - rejected.mean_ratio_P))
        case LossType.HINGE:
            loss_P = torch.relu(1 - b * (chosen.ratio_P - rejected.ratio_P))
        case LossType.SIGMOID | LossType.ROBUST:
            margin_P = b * (chosen.ratio_P - rejected.ratio_P)
            right_P, wrong_P = -F.logsigmoid(margin_P), -F.logsigmoid(-margin_P)
            if settings.loss_type is LossType.ROBUST:
                loss_P = ((1 - e) * right_P - e * wrong_P) / (1 - 2 * e)
            else:
                loss_P = (1 - e) * right_P + e * wrong_P
    return _judged(loss_P, b * chosen.ratio_P, b * rejected.ratio_P)


def orpo_loss(chosen: Answers, rejected: Answers, beta: float) -> Judgement:
    """-beta log s(log odds(chosen) - log odds(rejected)), odds = p / (1 - p), log p the mean over the answer's tokens.

    Hong et al. 2024, arXiv 2403.07691, equations 4 and 7, where beta is lambda. The other term, the negative
    log-likelihood of the chosen sequence, is a mean over tokens and has a denominator of its own.
    """
    odds = [a.mean_P - log1mexp(a.mean_P) for a in (chosen, rejected)]
    return _judged(-beta * F.logsigmoid(odds[0] - odds[1]), beta * chosen.mean_P, beta * rejected.mean_P)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends (Maechler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    x = x.clamp_max(-torch.finfo(x.dtype).tiny)
    near = x > -0.6931471805599453
    # The branch that is not taken must not give NaN gradients.
    small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    return torch.where(near, small, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


@dataclass(frozen=True, slots=True, kw_only=True)
class KtoSettings:
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def kto_loss(answers: Answers, desirable_P: Tensor, kl: float, settings: KtoSettings) -> Tensor:
    """w (1 - s(b (ratio - kl))) for desirable answers, w' (1 - s(b (kl - ratio))) for the others [P].

    Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8. `kl` is the mean ratio of mismatched answers, or 0
    where that is below it, and has no gradient.
    """
    good_P = desirable_P.to(answers.logp_P.dtype)
    sign_P = 2 * good_P - 1
    weight_P = settings.undesirable_weight + (settings.desirable_weight - settings.undesirable_weight) * good_P
    return weight_P * (1 - torch.sigmoid(settings.beta * sign_P * (answers.ratio_P - kl)))


def reward_loss(chosen_P: Tensor, rejected_P: Tensor, center_rewards_coefficient: float = 0.0) -> Judgement:
    """-log s(r(chosen) - r(rejected)) + c (r(chosen) + r(rejected))^2.

    Bradley & Terry 1952, as in Ouyang et al. 2022, arXiv 2203.02155, equation 1; the second term keeps rewards around
    zero (Eisenstein et al. 2023, arXiv 2312.09244, section 2).
    """
    loss_P = -F.logsigmoid(chosen_P - rejected_P)
    if center_rewards_coefficient:
        loss_P = loss_P + center_rewards_coefficient * (chosen_P + rejected_P).square()
    return _judged(loss_P, chosen_P, rejected_P)


def _judged(loss_P: Tensor, chosen_P: Tensor, rejected_P: Tensor) -> Judgement:
    return Judgement(loss_P, chosen_P.detach(), rejected_P.detach())
