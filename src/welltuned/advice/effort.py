"""How much work a run is: updates, tokens, floating-point operations, and time where the speed has been measured.

Operations per token, N trunk parameters in linear layers, f labelled share, V·h head, P trained LoRA parameters, L
layers, S length, d attention width: LoRA 4N + 4f·V·h + 7·L·S·d + 6P (the frozen base needs no weight gradients),
full 6N + 6f·V·h + 7·L·S·d; checkpointing repeats the forward pass: 2N + 2·L·S·d + 2P more.
"""

from dataclasses import dataclass

from welltuned.data.stream import steps_per_epoch
from welltuned.facts.data import DatasetFacts
from welltuned.facts.model import ModelFacts
from welltuned.recipe import Tune


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeForecast:
    """`tokens` are all that pass through the model in training; `seconds` is None where no speed was measured."""

    updates: int
    tokens: int
    supervised_tokens: int
    flops_per_token: int
    tokens_per_second: float | None
    seconds: float | None


def forecast_time(
    model: ModelFacts,
    data: DatasetFacts,
    tune: Tune,
    *,
    trained: int,
    checkpointing: bool,
    updates: int,
    batch: int,
    max_length: int,
    tokens_per_second: float | None,
) -> TimeForecast:
    """The run's effort; evaluation is not counted."""
    whole_epochs, rest = divmod(updates, steps_per_epoch(data.rows, batch))
    passes = whole_epochs + min(1.0, rest * batch / data.rows)  # an epoch's last update may be smaller
    lengths = [min(length, max_length) for length in data.length_percentiles]
    tokens = passes * data.tokens * (sum(lengths) / sum(data.length_percentiles))
    flops = flops_per_token(model, tune, trained, _attended(lengths), data.supervised_share, checkpointing)
    return TimeForecast(
        updates=updates,
        tokens=round(tokens),
        supervised_tokens=round(tokens * data.supervised_share),
        flops_per_token=round(flops),
        tokens_per_second=tokens_per_second,
        seconds=None if tokens_per_second is None else round(tokens / tokens_per_second, 1),
    )


def _attended(lengths: list[int]) -> float:
    """The length that a token's attention sees, averaged over tokens: long rows hold more of them."""
    return sum(length**2 for length in lengths) / sum(lengths)


def flops_per_token(
    model: ModelFacts, tune: Tune, trained: int, length: float, labelled_share: float, checkpointing: bool
) -> float:
    trunk, head = model.active_trunk_linear_parameters, labelled_share * model.head_parameters
    attention = model.layers * length * model.attention_width
    if tune is Tune.FULL:
        flops, adapters = 6 * trunk + 6 * head + 7 * attention, 0
    else:
        flops, adapters = 4 * trunk + 4 * head + 7 * attention + 6 * trained, trained
    return flops + (2 * trunk + 2 * attention + 2 * adapters if checkpointing else 0)
