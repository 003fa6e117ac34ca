"""One update, and one evaluation. The only place where a summed loss is divided.

The loss of an update is the sum over its supervised tokens, divided by their number in the whole update, whichever
way the update was cut into micro-batches. Averaging the means of micro-batches instead, as trainers long did, weighs
the tokens of short answers more.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch
from transformers import PreTrainedModel

from welltuned.data.packing import pack
from welltuned.data.render import Example
from welltuned.errors import RunError
from welltuned.kernels.token_loss import Head
from welltuned.models.full import FullParameters
from welltuned.models.lora import AdapterBank
from welltuned.models.packed import Packed
from welltuned.objectives.supervised import MicroBatch, collate, loss, supervised_tokens
from welltuned.training.ranks import ALONE, Ranks
from welltuned.training.shards import Shards

Trained = AdapterBank | FullParameters
T = TypeVar("T")
NO_ROWS = ((1, 0),)  # of a micro-batch without examples, for dropout
NOTHING: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Engine:
    """A model ready to be trained or evaluated; call its functions within `packed_model(model)`.

    Attributes:
        head: None where the model's head is not understood and its own logits are used.
        token_budget: most tokens of one micro-batch; a matter of memory, never of the result.
        ranks: the processes that share every update and evaluation.
        shards: where each of them holds only a part of the model.
    """

    model: PreTrainedModel
    trained: Trained
    head: Head | None
    token_budget: int
    ranks: Ranks = ALONE
    shards: Shards | None = None

    def run(self, make: Callable[[Head | None], T]) -> T:
        """What `make` computes, given the model's head; all ranks take part where the model lies in pieces."""
        return make(self.head) if self.shards is None else self.shards.run(make, self.head)

    def backward(self, value: torch.Tensor) -> None:
        """Its gradient, added to the flat buffer."""
        if self.shards is None:
            value.backward()
        else:
            self.shards.backward(value)

    def total(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The sum over the ranks of what each computes by passes."""
        if self.shards is None:
            return self.ranks.total(make)
        mine = make()  # its passes wait for other ranks, so that it may not stand within a call to them
        return self.ranks.total(lambda: mine)


@dataclass(frozen=True, slots=True)
class Gradient:
    """What one update's gradient was made from. `loss` is the mean over supervised tokens, in nats.

    Where several ranks share the update an objective gives this rank's part of `loss` and `measures`, which the
    update's one sum over the ranks adds up (training/reduce.py); tokens are always those of the whole update.

    `measures` are an objective's own numbers, by the names that metrics.jsonl gives them; `notes` are for the user.
    """

    loss: float
    tokens: int
    supervised_tokens: int
    measures: Mapping[str, float] = field(default_factory=lambda: NOTHING)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean loss over supervised tokens, and its standard error over examples.

    The error is that of a ratio of sums over examples (Cochran, Sampling Techniques, 1977, section 6.4); it is NaN
    for a single example. `samples` are some of the completions that it judged, for samples.jsonl.
    """

    loss: float
    standard_error: float
    supervised_tokens: int
    loss_of_example: tuple[float, ...]
    measures: Mapping[str, float] = field(default_factory=lambda: NOTHING)
    tokens_of_example: tuple[int, ...] = ()  # what each example weighs in the mean; empty where all weigh the same
    samples: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


class NotFinite(RunError):
    """A loss is not finite: the update is not made, or the held-out rows cannot be judged."""


class Row(Protocol):
    """What an objective trains on: all that the loop asks is where it comes from."""

    @property
    def origin(self) -> str: ...


class Objective(Protocol):
    """What a run optimises: how the rows of an update become a gradient, and how held-out rows are judged.

    Both are called within `packed_model(engine.model)`. What a row is, is the objective's matter, but it has an origin.
    It is given the rows of the whole update, on every rank, and computes this rank's share of them (`engine.ranks`),
    weighted for the whole. An objective remembers nothing from one update to the next that is not a function of its
    arguments and of the trained weights: that is why a checkpoint holds no state of it. It may be asked again for the
    same update, with fewer rows or a smaller `engine.token_budget`, after the gradient buffer was cleared. A loss that
    is not finite is `NotFinite`; running out of memory is passed on as torch raises it.
    """

    def accumulate_gradient(self, engine: Engine, rows: Sequence[Any], keys: Sequence[int]) -> Gradient:
        """Add the gradient of an update's mean loss; `keys` name each row's randomness in this update."""
        ...

    def evaluate(self, engine: Engine, rows: Sequence[Any]) -> Evaluation:
        """Judge rows, and leave training as it would be without."""
        ...


class Supervised:
    """Fine-tuning on the trained tokens of examples."""

    def accumulate_gradient(self, engine: Engine, rows: Sequence[Example], keys: Sequence[int]) -> Gradient:
        return accumulate_gradient(engine, rows, keys)

    def evaluate(self, engine: Engine, rows: Sequence[Example]) -> Evaluation:
        return evaluate(engine, rows)


def accumulate_gradient(engine: Engine, examples: Sequence[Example], keys: Sequence[int]) -> Gradient:
    """Add the gradient of the mean loss of `examples` to the flat gradient buffer.

    Args:
        keys: a number for each example that names its dropout masks; the same example and update give the same masks.

    Raises:
        RunError: no token of the update is supervised. NotFinite: a loss is not; the examples are named.
    """
    supervised = sum(supervised_tokens(e) for e in examples)
    if supervised == 0:
        raise RunError(f"no token of this update is trained on ({origins_of(examples)}); its loss would be 0/0")
    sums, origins = [], []
    lengths = [len(e.ids) for e in examples]
    for bin_ in _bins(engine, lengths):
        chosen = [examples[i] for i in bin_]
        batch = _laid(engine, chosen)
        if not len(batch.target_M) and engine.shards is None:
            continue
        engine.trained.use_rows(None, tuple((lengths[i], keys[i]) for i in bin_) or NO_ROWS)
        value = _loss(engine, batch, 1.0 / supervised)
        engine.backward(value)
        sums.append(value.detach())
        origins.append(chosen)
    losses = torch.stack(sums).tolist() if sums else []  # the one time that an update waits for the GPU
    for chosen, summed in zip(origins, losses, strict=True):
        if not math.isfinite(summed):
            raise NotFinite(
                f"the loss is not finite in {origins_of(chosen)}; lower the learning rate or look at the rows"
            )
    return Gradient(sum(losses), sum(lengths), supervised)


def _bins(engine: Engine, lengths: Sequence[int]) -> list[list[int]]:
    """The micro-batches of this rank's share of rows of so many tokens."""
    mine = engine.ranks.share(lengths)
    bins = [[mine[i] for i in bin_] for bin_ in pack([lengths[i] for i in mine], engine.token_budget)]
    return bins if engine.shards is None else engine.shards.even(bins)


def _laid(engine: Engine, examples: Sequence[Example]) -> MicroBatch:
    """A micro-batch; of no examples one token without a label, whose loss and gradient are 0."""
    device = engine.model.device
    if examples:
        return collate(examples, device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    return MicroBatch(Packed(torch.zeros(1, dtype=torch.int64, device=device), [1]), none, none, none)


def _loss(engine: Engine, batch: MicroBatch, weight: float) -> torch.Tensor:
    weight_M = torch.full((len(batch.target_M),), weight, device=batch.target_M.device)
    return engine.run(lambda head: loss(engine.model, head, batch, weight_M)[0])


@torch.no_grad()
def evaluate(engine: Engine, examples: Sequence[Example]) -> Evaluation:
    """Held-out loss without dropout. Training is bit for bit the same with or without it."""
    engine.trained.no_dropout()
    sums = engine.total(lambda: _sums(engine, examples))
    broken = [e for e, finite in zip(examples, torch.isfinite(sums).tolist(), strict=True) if not finite]
    if broken:
        what = f"the held-out loss is not finite in {origins_of(broken)}"
        raise NotFinite(f"{what}; lower the learning rate, or look at the model and the rows")
    return _summary(sums, torch.tensor([supervised_tokens(e) for e in examples], dtype=torch.float64))


def _sums(engine: Engine, examples: Sequence[Example]) -> torch.Tensor:
    """The summed loss of each example of this rank's share, 0 for the others, float64."""
    sums = torch.zeros(len(examples), dtype=torch.float64)
    for bin_ in _bins(engine, [len(e.ids) for e in examples]):
        batch = _laid(engine, [examples[i] for i in bin_])
        weight_M = torch.ones(len(batch.target_M), device=batch.target_M.device)
        nll_M = engine.run(partial(_nll, engine.model, batch, weight_M))
        sums[torch.tensor(bin_, dtype=torch.int64)] = torch.zeros(len(bin_), dtype=torch.float64).index_add_(
            0, batch.example_M.cpu(), nll_M.double().cpu()
        )
    return sums


def _nll(model: PreTrainedModel, batch: MicroBatch, weight_M: torch.Tensor, head: Head | None) -> torch.Tensor:
    return loss(model, head, batch, weight_M)[1]


def _summary(sums: torch.Tensor, counts: torch.Tensor) -> Evaluation:
    n = len(sums)
    mean = float(sums.sum() / counts.sum())
    spread = float(((sums - mean * counts) ** 2).sum())
    error = math.sqrt(spread * n / (n - 1)) / float(counts.sum()) if n > 1 else math.nan
    tokens = tuple(counts.long().tolist())
    return Evaluation(
        mean, error, int(counts.sum()), tuple((sums / counts.clamp_min(1)).tolist()), tokens_of_example=tokens
    )


def origins_of(examples: Sequence[Example]) -> str:
    names = [e.origin for e in examples]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
