"""The group losses against TRL's GRPOTrainer on the same log-probabilities and advantages, where TRL is installed."""

from types import SimpleNamespace

import pytest
import torch

trl = pytest.importorskip("trl", reason="trl is no dependency; this is tested where it is installed")

from welltuned.objectives.grpo import (  # noqa: E402
    GrpoSettings,
    LossType,
    Scale,
    advantages,
    policy_loss,
    token_weights,
)

LENGTHS, LONGEST = (3, 1, 5, 2, 4, 7), 8


def problem():
    """Padded [S, T] log-probabilities and masks as TRL has them, and rewards of two groups of three."""
    torch.manual_seed(3)
    old = -3 * torch.rand(len(LENGTHS), max(LENGTHS))
    new = (old + 0.4 * torch.randn_like(old)).requires_grad_()
    mask = torch.zeros_like(old)
    for s, n in enumerate(LENGTHS):
        mask[s, :n] = 1
    return new, old, old + 0.3 * torch.randn_like(old), mask, torch.tensor([[1.0, 0.0, 2.0], [0.5, 0.0, 0.0]])


def theirs(loss_type, beta, mask, new, old, ref, advantage):
    """GRPOTrainer._compute_loss with a forward pass that gives `new`: one device, one step, no accumulation."""
    from collections import defaultdict

    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, gather_for_metrics=lambda x: x
    )
    metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer = SimpleNamespace(
        accelerator=accelerator, _metrics=metrics, model=SimpleNamespace(training=True), beta=beta,
        loss_type="grpo" if loss_type is LossType.GSPO else str(loss_type),
        importance_sampling_level="sequence" if loss_type is LossType.GSPO else "token",
        epsilon_low=0.2, epsilon_high=0.28, current_gradient_accumulation_steps=1, use_vllm=False,
        off_policy_mask_threshold=None, top_entropy_quantile=1.0, aux_loss_enabled=False,
        max_completion_length=LONGEST, _entropy_bonus_enabled=False, use_adaptive_entropy=False,
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.zeros_like(new), None),
    )  # fmt: skip
    width = torch.ones(len(LENGTHS), 2, dtype=torch.long)
    inputs = {
        "prompt_ids": width, "prompt_mask": width, "completion_ids": mask.long(), "completion_mask": mask,
        "advantages": advantage, "old_per_token_logps": old, "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = trl.GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    return loss, metrics["train"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("loss_type", LossType)
def test_loss_gradient_and_kl_are_trls(loss_type, beta, masked):
    new, old, ref, mask, rewards = problem()
    if masked:
        mask[2] = 0  # mask_truncated_completions, as TRL does it
    advantage = advantages(rewards, Scale.GROUP).value_PG.flatten()
    plain, metrics = theirs(loss_type, beta, mask, new, old, ref, advantage.float())
    setting = GrpoSettings(loss_type=loss_type, max_completion_length=LONGEST, beta=beta)
    sequence, place = mask.nonzero(as_tuple=True)
    found = policy_loss(
        *(new[sequence, place], old[sequence, place], ref[sequence, place] if beta else None),
        *(sequence, advantage, token_weights(mask.sum(1), setting), setting),
    )
    torch.testing.assert_close(found.value, plain, rtol=1e-5, atol=1e-7)
    (mine,), (exact,) = torch.autograd.grad(found.value, new), torch.autograd.grad(plain, new)
    torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-7)
    if beta:
        assert float(found.kl / mask.sum()) == pytest.approx(metrics["kl"][0], rel=1e-5)


@pytest.mark.parametrize("scale", Scale)
def test_advantages_are_trls(scale):
    """The lines of GRPOTrainer that make them, on its own nanstd."""
    from trl.trainer.utils import nanstd

    rewards = torch.tensor([[1.0, float("nan"), 2.0, 0.0], [0.5, 0.0, 0.0, 0.3]])
    centred = rewards - torch.nanmean(rewards, dim=1, keepdim=True)
    spread = nanstd(rewards, dim=1, keepdim=True) if scale is Scale.GROUP else nanstd(rewards)
    plain = centred if scale is Scale.NONE else centred / (spread + 1e-4)
    mine = advantages(rewards, scale).value_PG
    torch.testing.assert_close(mine, plain.nan_to_num(0.0).double(), rtol=1e-5, atol=1e-6)
