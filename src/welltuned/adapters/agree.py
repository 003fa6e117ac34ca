"""Does a merged model say what base and adapter say together? Their logits on fixed prompts, compared."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from welltuned.data.conversation import Conversation, Message
from welltuned.data.render import render_prompt
from welltuned.errors import RunError

PROMPTS = (
    "Write one sentence about the sea.",
    "A train leaves at 9:40 and arrives at 11:05. How long does it travel?",
    "My order 4711 has not arrived, and nobody answers the phone. What can I do?",
    "Translate into German: the kettle is on the table, and the cup is empty.",
    "def fibonacci(n):",
    "Return a JSON object with the keys name and price for a loaf of bread.",
)
ROUNDED = 0.15  # share of what the adapter does that rounding to fewer bits may change before it is an error
EXACT = 0.01  # the same in float32
_ROUNDING = 0.02  # of the logits themselves: more than this rounding alone does not change


@dataclass(frozen=True, slots=True)
class Agreement:
    """How close the merged model is, over every position of every prompt. Logits count up to a constant a position.

    Attributes:
        positions: tokens of the prompts.
        largest, mean: absolute differences between the merged model's logits and those of base and adapter.
        effect: mean absolute difference that the adapter makes.
        drift: norm of the difference over the norm of what the adapter does.
        relative: the same over the norm of the logits.
        along: how much of what the adapter does the merged model does: 1 is right, 0 is the base, 2 is merged twice.
        same_token: share of positions with the same most likely token.
    """

    positions: int
    largest: float
    mean: float
    effect: float
    drift: float
    relative: float
    along: float
    same_token: float

    def sentence(self) -> str:
        return (
            f"on {self.positions} tokens of {len(PROMPTS)} fixed prompts the merged model's logits differ from those "
            f"of base and adapter by {self.mean:.2g} in the mean and {self.largest:.2g} at most (the adapter itself "
            f"makes {self.effect:.2g}), and {self.same_token:.1%} of the most likely tokens are the same"
        )


def prompts_of(tokenizer: PreTrainedTokenizerBase, template: str | None) -> list[list[int]]:
    """The fixed prompts as token ids: as a user's messages where there is a chat template."""
    return [render_prompt(Conversation((Message("user", t),), "a prompt"), tokenizer, template) for t in PROMPTS]


@torch.no_grad()
def logits_of(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits [positions, V] in float32, less each position's mean."""
    rows = []
    for ids in prompts:
        logits_NV = model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0].float()
        rows.append((logits_NV - logits_NV.mean(dim=-1, keepdim=True)).cpu())
    return torch.cat(rows)


@dataclass(frozen=True, slots=True)
class Reference:
    """Logits [positions, V] on the prompts: of the base, and of what a merged model must be."""

    prompts: Sequence[Sequence[int]]
    base_NV: Tensor
    tuned_NV: Tensor


def compare(reference: Reference, merged: PreTrainedModel) -> Agreement:
    """How close a model is to what it must be."""
    base_NV, tuned_NV, merged_NV = reference.base_NV, reference.tuned_NV, logits_of(merged, reference.prompts)
    if merged_NV.shape != tuned_NV.shape:
        raise RunError(f"the merged model has {merged_NV.shape[-1]:,} tokens and the base {tuned_NV.shape[-1]:,}")
    effect_NV, gap_NV = tuned_NV - base_NV, merged_NV - tuned_NV
    squared = float((effect_NV.double() ** 2).sum())
    if not squared > 0:
        raise RunError("the adapter changes nothing on the fixed prompts, so that no merge could be told from the base")
    return Agreement(
        positions=len(tuned_NV),
        largest=float(gap_NV.abs().max()),
        mean=float(gap_NV.abs().mean()),
        effect=float(effect_NV.abs().mean()),
        drift=(float((gap_NV.double() ** 2).sum()) / squared) ** 0.5,
        relative=float(gap_NV.double().norm() / tuned_NV.double().norm()),
        along=float(((merged_NV - base_NV).double() * effect_NV.double()).sum()) / squared,
        same_token=float((merged_NV.argmax(-1) == tuned_NV.argmax(-1)).double().mean()),
    )


def require_agreement(found: Agreement, dtype: torch.dtype) -> None:
    """Raise where the merged model is the base, or is not what base and adapter are.

    Raises:
        RunError: with the numbers.
    """
    limit = EXACT if dtype == torch.float32 else ROUNDED
    if found.drift <= limit:
        return
    if abs(found.along) < 0.1:
        raise RunError(f"the merged model equals the base: it does {found.along:.0%} of what the adapter does")
    what = f"the merged model is not base and adapter: it differs by {found.drift:.0%} of what the adapter does"
    if dtype != torch.float32 and found.relative < _ROUNDING:
        name = str(dtype).removeprefix("torch.")
        raise RunError(f"{what}, which is so little that rounding to {name} covers it; use --dtype float32")
    raise RunError(f"{what}, and it does {found.along:.2f} times what the adapter does")
