"""What a bank of arms computes: the rows of several adapters in one forward pass, and each one's loss by itself.

The sibling of `training/step` and `training/preference_step`, with the same division: an arm's gradient is that of the
sum over its own update, divided by its own tokens (or pairs) of the whole update. No number of one arm enters
another's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from welltuned.data.packing import pack
from welltuned.data.render import Example
from welltuned.errors import RunError
from welltuned.models.lora import AdapterBank
from welltuned.objectives.answers import laid_length, lay
from welltuned.objectives.supervised import collate, loss, supervised_tokens
from welltuned.training.preference_step import Pairwise, pairs_per_token
from welltuned.training.step import Engine, Gradient, origins_of


@dataclass(frozen=True, slots=True)
class Share:
    """One arm's part of the work: adapter `k` of the bank on these rows; `keys` name their dropout masks."""

    k: int
    rows: Sequence[Example]
    keys: Sequence[int]


@dataclass(frozen=True, slots=True)
class Part:
    """An arm's rows in one micro-batch. `factor` multiplies each row's loss; `ratio` is that of the whole update."""

    k: int
    rows: Sequence[Example]
    keys: Sequence[int] | None
    factor: float
    ratio: float


class Items(Protocol):
    """How rows are laid out and judged."""

    def length(self, row: Example) -> int:
        """Tokens that pass through the model for a row."""
        ...

    def weight(self, row: Example) -> int:
        """What a row weighs in the mean: its supervised tokens, or 1 a pair."""
        ...

    def ratio(self, rows: Sequence[Example]) -> float:
        """What a row's loss must know of the whole update, beside its weight."""
        ...

    def losses(self, engine: Engine, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """(sum of factor · loss, differentiable; each row's summed loss [rows of all parts], on the CPU, float64)."""
        ...


class SupervisedItems:
    """Fine-tuning on the trained tokens of examples; a row's loss is summed over them, in nats."""

    def length(self, row: Example) -> int:
        return len(row.ids)

    def weight(self, row: Example) -> int:
        return supervised_tokens(row)

    def ratio(self, rows: Sequence[Example]) -> float:
        return 1.0

    def losses(self, engine: Engine, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        rows = [row for part in parts for row in part.rows]
        batch = collate(rows, engine.model.device)
        _use_rows(engine, parts, [[len(row.ids) for row in part.rows] for part in parts])
        factor_I = torch.tensor([part.factor for part in parts for _ in part.rows], device=batch.target_M.device)
        value, nll_M = loss(engine.model, engine.head, batch, factor_I[batch.example_M])
        sums_I = torch.zeros(len(rows), dtype=torch.float64, device=nll_M.device)
        return value, sums_I.index_add_(0, batch.example_M, nll_M.double()).cpu()


class PairItems:
    """Preference pairs, by the judge of a run's own objective; a row's loss is its pair's."""

    def __init__(self, objective: Pairwise):
        self.judge, self.shared = objective.judge, objective.shared

    def length(self, row: Example) -> int:
        return laid_length(row, self.shared)

    def weight(self, row: Example) -> int:
        return 1

    def ratio(self, rows: Sequence[Example]) -> float:
        return pairs_per_token(rows)

    def losses(self, engine: Engine, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        rows = [row for part in parts for row in part.rows]
        keys = [key for part in parts for key in part.keys or [0] * len(part.rows)]
        laid = lay(rows, keys, shared=self.shared, whole_chosen=self.judge.whole_chosen, device=engine.model.device)
        _use_rows(engine, parts, [[self.length(row) for row in part.rows] for part in parts], laid.spans)
        judged = self.judge(engine, rows, laid, parts[0].ratio)
        factor_I = torch.tensor([part.factor for part in parts for _ in part.rows], device=judged.loss_P.device)
        return (judged.loss_P * factor_I).sum(), judged.loss_P.detach().double().cpu()


def _use_rows(
    engine: Engine,
    parts: Sequence[Part],
    lengths: Sequence[Sequence[int]],
    spans: tuple[tuple[int, int], ...] | None = None,
) -> None:
    """Give the bank's adapters their rows; the parts are in the adapters' order. Without keys nothing is dropped."""
    bank = _bank(engine)
    counts = [0] * len(bank.settings)
    for part, some in zip(parts, lengths, strict=True):
        counts[part.k] += sum(some)
    if parts[0].keys is None:
        bank.no_dropout(tuple(counts))
        return
    if spans is None:
        keyed = (zip(some, part.keys or (), strict=True) for part, some in zip(parts, lengths, strict=True))
        spans = tuple(span for some in keyed for span in some)
    bank.use_rows(tuple(counts), spans)


def _bank(engine: Engine) -> AdapterBank:
    assert isinstance(engine.trained, AdapterBank)
    return engine.trained


# ── an update, and an evaluation ─────────────────────────────────────────────────────────────────────────────────────


def micro_batches(
    shares: Sequence[Share], length: Sequence[Sequence[int]], budget: int
) -> Iterator[list[tuple[int, list[int]]]]:
    """Which rows of which shares go through the model together: [(share, its rows)], in the shares' order.

    Arms with the same rows take equal parts of a micro-batch, so that the adapters' products are batched ones. How it
    is cut is a matter of memory, never of the result.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, share in enumerate(shares):
        groups.setdefault(tuple(row.origin for row in share.rows), []).append(i)
    for group in groups.values():
        lengths = length[group[0]]
        most = max(1, min(len(group), budget // max(lengths)))
        parts = -(-len(group) // most)
        for first in range(parts):
            some = group[first * len(group) // parts : (first + 1) * len(group) // parts]
            for bin_ in pack(lengths, max(1, budget // len(some))):
                yield [(i, bin_) for i in some]


def gradients(engine: Engine, items: Items, shares: Sequence[Share]) -> list[Gradient]:
    """Add to the flat gradient buffer each arm's gradient of its own mean loss; one `Gradient` a share.

    A loss that is not finite is returned as it is: it is its arm's matter.

    Raises:
        RunError: no token of an update is supervised.
    """
    weights = [[items.weight(row) for row in share.rows] for share in shares]
    for share, some in zip(shares, weights, strict=True):
        if not sum(some):
            raise RunError(f"no token of this update is trained on ({origins_of(share.rows)}); its loss would be 0/0")
    ratios = [items.ratio(share.rows) for share in shares]
    lengths = [[items.length(row) for row in share.rows] for share in shares]
    sums = [0.0] * len(shares)
    for batch in micro_batches(shares, lengths, engine.token_budget):
        batch = [(i, [j for j in bin_ if weights[i][j]]) for i, bin_ in batch]
        if not any(bin_ for _, bin_ in batch):
            continue
        parts = [
            Part(
                k=shares[i].k,
                rows=[shares[i].rows[j] for j in bin_],
                keys=[shares[i].keys[j] for j in bin_],
                factor=1.0 / sum(weights[i]),
                ratio=ratios[i],
            )
            for i, bin_ in batch
        ]
        value, loss_I = items.losses(engine, parts)
        value.backward()
        at = 0
        for i, bin_ in batch:
            sums[i] += float(loss_I[at : at + len(bin_)].sum()) / sum(weights[i])
            at += len(bin_)
    return [
        Gradient(summed, sum(some), sum(int(row.mask[1:].sum()) for row in share.rows))
        for summed, some, share in zip(sums, lengths, shares, strict=True)
    ]


@torch.no_grad()
def row_losses(engine: Engine, items: Items, rows: Sequence[Example], adapters: Sequence[int]) -> list[list[float]]:
    """The mean loss of each held-out row, for each of these adapters, without dropout; not finite where it is not."""
    shares = [Share(k, rows, ()) for k in adapters]
    lengths = [[items.length(row) for row in rows]] * len(shares)
    weights = torch.tensor([max(1, items.weight(row)) for row in rows], dtype=torch.float64)
    ratio = items.ratio(rows)
    sums_KI = torch.zeros(len(shares), len(rows), dtype=torch.float64)
    for batch in micro_batches(shares, lengths, engine.token_budget):
        parts = [Part(shares[i].k, [rows[j] for j in bin_], None, 1.0, ratio) for i, bin_ in batch]
        loss_I, at = items.losses(engine, parts)[1], 0
        for i, bin_ in batch:
            sums_KI[i, bin_] = loss_I[at : at + len(bin_)]
            at += len(bin_)
    means: list[list[float]] = (sums_KI / weights).tolist()
    return means
