"""What is told of the completions of an update, or of held-out prompts."""

import math
from collections.abc import Sequence

from torch import Tensor

from welltuned.models.sample import Completion
from welltuned.objectives.rewards import Scores


def measures_of(
    every: Sequence[Completion], reward_PG: Tensor, std_P: Tensor, silent_P: Tensor, scores: Scores
) -> dict[str, float]:
    known = reward_PG[~reward_PG.isnan()]
    tokens = sum(len(c.ids) for c in every)
    return {
        "reward": float(known.mean()) if len(known) else math.nan,
        "reward_std": float(std_P.mean()),
        **per_reward(scores),
        "reward_faults": float(len(scores.faults)),
        "frac_reward_zero_std": float(silent_P.double().mean()),
        "entropy": sum(c.entropy for c in every) / max(1, tokens),
        **lengths(every),
    }


def per_reward(scores: Scores) -> dict[str, float]:
    """Each reward's own mean, where it applies."""
    found = {}
    for name, values in scores.each.items():
        known = [value for value in values if not math.isnan(value)]
        found[f"rewards/{name}/mean"] = sum(known) / len(known) if known else math.nan
    return found


def lengths(every: Sequence[Completion]) -> dict[str, float]:
    return {
        "completions/mean_length": sum(len(c.ids) for c in every) / max(1, len(every)),
        "completions/clipped_ratio": sum(not c.ended for c in every) / max(1, len(every)),
    }
