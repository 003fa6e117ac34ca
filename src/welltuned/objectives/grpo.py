"""Group-relative policy optimisation: advantages from a group's own rewards, and the clipped ratio loss.

Shapes: P prompts of an update, G completions of each, S = P G sequences, M their completion tokens laid end to end,
all or those of one micro-batch.

    A_PG   advantage: (r - mean_G r) / (std + 1e-4), one number for all tokens of a completion
    rho_M  ratio to the policy that sampled, as training sees it: exp(logp - old); with gspo one a sequence,
           exp(mean_t(logp - old))
    loss   sum_M weight_M (-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta k3_M)
    c_M    min(exp(old - sampler), clip), 1 where the sampler is the model itself: another engine's arithmetic draws
           from slightly other probabilities (truncated importance sampling; Yao et al. 2025, "Your Efficient RL
           Framework Secretly Brings You Off-Policy RL Training"); it multiplies the clipped term
    k3_M   exp(ref - logp) - (ref - logp) - 1, an unbiased estimate of the KL to the reference that is never negative

- grpo: DeepSeekMath (Shao et al. 2024, arXiv 2402.03300), equations 3 and 4: a mean over each completion's tokens, then
  over completions, weight_M = 1 / (S |o_s|)
- dapo: DAPO (Yu et al. 2025, arXiv 2503.14476), equation 8: all tokens of the update alike, weight_M = 1 / sum_s |o_s|;
  clipping that is wider upwards, and completions cut at the limit left out (section 3.4's overlong filtering)
- dr_grpo: Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): a constant length, weight_M = 1 / (S max_completion_length),
  with rewards that are not divided by their spread (scale_rewards none)
- gspo: GSPO (Zheng et al. 2025, arXiv 2507.18071), equations 5 to 7: the ratio and its clipping of whole sequences,
  weight_M = 1 / (S |o_s|)

Weights are those of the whole update, so that micro-batches, which only sum, cannot change the result.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

EPSILON_STD = 1e-4  # added to the spread that rewards are divided by, as TRL has it


class LossType(StrEnum):
    GRPO = "grpo"
    DAPO = "dapo"
    DR_GRPO = "dr_grpo"
    GSPO = "gspo"


class Scale(StrEnum):
    """What a reward's distance from its group's mean is divided by."""

    GROUP = "group"
    BATCH = "batch"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoSettings:
    """TRL's names and meanings. `beta` 0 needs no reference; `max_completion_length` is dr_grpo's constant."""

    loss_type: LossType
    max_completion_length: int
    epsilon: float = 0.2
    epsilon_high: float = 0.28
    beta: float = 0.0
    scale_rewards: Scale = Scale.GROUP
    mask_truncated_completions: bool = False


@dataclass(frozen=True, slots=True)
class Advantages:
    """Advantages [P, G] float64, each group's standard deviation [P], and which groups carry no signal [P].

    A completion whose reward is not known, and all of a group without signal, have an advantage of exactly 0.
    """

    value_PG: Tensor
    std_P: Tensor
    silent_P: Tensor


def advantages(reward_PG: Tensor, scale: Scale) -> Advantages:
    """From rewards [P, G], NaN where none is known: those are left out of the means and the spreads.

    A group whose known rewards are equal, or that has fewer than two of them, carries no signal.
    """
    reward_PG = reward_PG.double()
    known_PG = ~reward_PG.isnan()
    zeroed_PG = torch.where(known_PG, reward_PG, 0.0)
    count_P1 = known_PG.sum(1, keepdim=True)
    apart_PG = torch.where(known_PG, reward_PG - zeroed_PG.sum(1, keepdim=True) / count_P1.clamp_min(1), 0.0)
    top_P = torch.where(known_PG, reward_PG, -torch.inf).amax(1)
    bottom_P = torch.where(known_PG, reward_PG, torch.inf).amin(1)
    silent_P = (count_P1[:, 0] < 2) | (top_P == bottom_P)  # not by the spread, which rounding keeps from being 0
    std_P1 = (apart_PG.square().sum(1, keepdim=True) / (count_P1 - 1).clamp_min(1)).sqrt()
    std_P1 = torch.where(silent_P[:, None], 0.0, std_P1)
    if scale is Scale.GROUP:
        value_PG = apart_PG / (std_P1 + EPSILON_STD)
    elif scale is Scale.BATCH:
        known = reward_PG[known_PG]
        spread = known.std() if len(known) > 1 else known.new_zeros(())
        value_PG = apart_PG / (spread + EPSILON_STD)
    else:
        value_PG = apart_PG
    return Advantages(torch.where(silent_P[:, None], 0.0, value_PG), std_P1[:, 0], silent_P)


def token_weights(tokens_S: Tensor, settings: GrpoSettings) -> Tensor:
    """The weight of each of a sequence's tokens [S], from the tokens of all sequences of the update.

    A sequence that is masked has 0 tokens. It still counts among the S of grpo, dr_grpo and gspo, as in TRL.
    """
    tokens_S = tokens_S.double()
    sequences = max(1, len(tokens_S))
    match settings.loss_type:
        case LossType.GRPO | LossType.GSPO:
            return 1.0 / (sequences * tokens_S.clamp_min(1.0))
        case LossType.DAPO:
            return torch.ones_like(tokens_S) / tokens_S.sum().clamp_min(1.0)
        case LossType.DR_GRPO:
            return torch.full_like(tokens_S, 1.0 / (sequences * settings.max_completion_length))


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """`value` is the weighted sum, to be summed over micro-batches; the rest are sums over tokens, detached."""

    value: Tensor
    kl: Tensor
    clipped: Tensor


def policy_loss(
    logprob_M: Tensor,
    old_M: Tensor,
    ref_M: Tensor | None,
    sequence_M: Tensor,
    advantage_S: Tensor,
    weight_S: Tensor,
    settings: GrpoSettings,
    correction_M: Tensor | None = None,
) -> PolicyLoss:
    """The loss of some whole sequences of an update.

    Args:
        logprob_M: log-probability of each completion token, with gradient, in nats.
        old_M: the same under the policy that sampled, without gradient.
        ref_M: under the reference; None where beta is 0.
        sequence_M: the sequence that each token belongs to, in [0, S).
        advantage_S, weight_S: of each sequence.
        correction_M: c_M above; None for 1.
    """
    advantage_M = advantage_S.to(logprob_M)[sequence_M]
    weight_M = weight_S.to(logprob_M)[sequence_M]
    log_ratio_M = logprob_M - old_M
    if settings.loss_type is LossType.GSPO:
        log_ratio_M = _sequence_mean(log_ratio_M, sequence_M, len(advantage_S))[sequence_M]
    ratio_M = log_ratio_M.exp()
    held_M = ratio_M.clamp(1.0 - settings.epsilon, 1.0 + settings.epsilon_high)
    each_M = -torch.minimum(ratio_M * advantage_M, held_M * advantage_M)
    if correction_M is not None:
        each_M = correction_M * each_M
    kl = logprob_M.new_zeros(())
    if ref_M is not None:
        below_M = ref_M - logprob_M
        k3_M = below_M.exp() - below_M - 1.0
        each_M, kl = each_M + settings.beta * k3_M, k3_M.detach().sum()
    low_M = (ratio_M < 1.0 - settings.epsilon) & (advantage_M < 0)
    high_M = (ratio_M > 1.0 + settings.epsilon_high) & (advantage_M > 0)
    return PolicyLoss((weight_M * each_M).sum(), kl, (low_M | high_M).sum())


def _sequence_mean(x_M: Tensor, sequence_M: Tensor, sequences: int) -> Tensor:
    """Mean over each sequence's tokens [S]; 0 for one without any."""
    sum_S = x_M.new_zeros(sequences).index_add(0, sequence_M, x_M)
    return sum_S / torch.bincount(sequence_M, minlength=sequences).clamp_min(1)
