"""One update and one evaluation on pairs or judged answers: the sibling of `step`, with its one place that divides.

The loss of an update is the sum over its pairs, divided by their number in the whole update, whichever way it was cut
into micro-batches. A pair is never cut: both of its answers are in one micro-batch.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from welltuned.data.packing import pack
from welltuned.data.pairs import mismatched
from welltuned.data.render import Example
from welltuned.models.oom import is_out_of_memory
from welltuned.models.packed import hidden_states
from welltuned.objectives.answers import Laid, answer_logps, laid_length, lay, token_logps
from welltuned.objectives.preference import (
    Answers,
    DpoSettings,
    Judgement,
    KtoSettings,
    dpo_loss,
    kto_loss,
    orpo_loss,
    reward_loss,
)
from welltuned.training.reference import Reference, key_of
from welltuned.training.step import Engine, Evaluation, Gradient, NotFinite, origins_of

Measures = Mapping[str, Tensor]
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
LOGPS = ("logps/chosen", "logps/rejected")


@dataclass(frozen=True, slots=True)
class Judged:
    """What a micro-batch gives: a loss for each pair [P], and the objective's own numbers, [P] each."""

    loss_P: Tensor
    measures: Measures


class Judge(Protocol):
    """The loss of pairs in a micro-batch.

    `whole_chosen` says whether the loss has a term over all of the chosen sequence's tokens, the prompt's included.
    `names` are those of its measures: a process without a pair of an update must know them too.
    """

    @property
    def whole_chosen(self) -> bool: ...
    @property
    def names(self) -> tuple[str, ...]: ...

    def __call__(self, engine: Engine, examples: Sequence[Example], laid: Laid, pairs_per_token: float) -> Judged:
        """`pairs_per_token`: the update's pairs over the tokens of its chosen sequences (see `Orpo`)."""
        ...


@dataclass(frozen=True, slots=True)
class Dpo:
    """Direct preference optimisation and its variants; the reference is None for those that have none."""

    settings: DpoSettings
    reference: Reference | None
    whole_chosen: bool = False
    names: tuple[str, ...] = (*REWARDS, *LOGPS)

    def __call__(self, engine: Engine, examples: Sequence[Example], laid: Laid, pairs_per_token: float) -> Judged:
        logp_P2 = _logps(engine, laid, 2)
        known_P2 = torch.zeros_like(logp_P2)
        if self.reference is not None:
            known_P2 = torch.tensor([self.reference.of(e) for e in examples], dtype=logp_P2.dtype).to(logp_P2.device)
        answers = [Answers(logp_P2[:, i], known_P2[:, i], laid.tokens_A[i::2]) for i in (0, 1)]
        return _judged(dpo_loss(answers[0], answers[1], self.settings), logp_P2)


@dataclass(frozen=True, slots=True)
class Orpo:
    """Odds-ratio preference optimisation.

    Its likelihood term is the mean over all tokens of the update's chosen sequences, prompts included, as its authors
    and TRL compute it (TRL over those of a micro-batch). A pair's share of it is its own sum times pairs over tokens,
    so that the mean over pairs is that mean over tokens.
    """

    beta: float
    whole_chosen: bool = True
    names: tuple[str, ...] = (*REWARDS, *LOGPS, "nll_loss")

    def __call__(self, engine: Engine, examples: Sequence[Example], laid: Laid, pairs_per_token: float) -> Judged:
        logp_P3 = _logps(engine, laid, 3)
        nothing_P = torch.zeros_like(logp_P3[:, 0])
        answers = [Answers(logp_P3[:, i], nothing_P, laid.tokens_A[i::3]) for i in (0, 1)]
        nll_P = -(logp_P3[:, 0] + logp_P3[:, 2]) * pairs_per_token
        found = orpo_loss(answers[0], answers[1], self.beta)
        means_P2 = torch.stack([a.mean_P for a in answers], 1)
        judged = _judged(Judgement(found.loss_P + nll_P, found.chosen_P, found.rejected_P), means_P2)
        return Judged(judged.loss_P, {**judged.measures, "nll_loss": nll_P.detach()})


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward model: the scalar head's value at the last token of each sequence."""

    score: nn.Linear
    center_rewards_coefficient: float = 0.0
    whole_chosen: bool = False
    names: tuple[str, ...] = REWARDS

    def __call__(self, engine: Engine, examples: Sequence[Example], laid: Laid, pairs_per_token: float) -> Judged:
        hidden_AH = hidden_states(engine.model, laid.packed)[laid.last_A]
        reward_P2 = self.score(hidden_AH.to(self.score.weight.dtype)).view(-1, 2)
        return _judged(reward_loss(reward_P2[:, 0], reward_P2[:, 1], self.center_rewards_coefficient), None)


class Pairwise:
    """An objective on preference pairs, whose rows are examples that fork."""

    def __init__(self, judge: Judge, shared: bool):
        self.judge, self.shared = judge, shared

    def accumulate_gradient(self, engine: Engine, rows: Sequence[Example], keys: Sequence[int]) -> Gradient:
        """Add the gradient of the mean loss of pairs; `keys` name each pair's dropout masks.

        Raises:
            NotFinite: a loss is not finite; the pairs are named.
        """
        mine = _share(engine, rows, self.shared)
        some = [rows[i] for i in mine]
        losses, measures = [], []
        ratio = pairs_per_token(rows)
        for chosen, laid in self._laid(engine, some, [keys[i] for i in mine]):
            engine.trained.use_rows(None, laid.spans)
            judged = self.judge(engine, [some[i] for i in chosen], laid, ratio)
            (judged.loss_P.sum() / len(rows)).backward()
            losses.append((chosen, judged.loss_P.detach()))
            measures.append(judged.measures)
        loss_P = _in_order(losses, len(some))
        _require_finite(loss_P, some, "loss")
        return Gradient(
            float(loss_P.sum()) / len(rows),
            _tokens(rows, self.shared),
            _supervised(rows),
            {name: total / len(rows) for name, total in self._sums(measures).items()},
        )

    @torch.no_grad()
    def evaluate(self, engine: Engine, rows: Sequence[Example]) -> Evaluation:
        """The mean loss of pairs without dropout, and its standard error over pairs."""
        engine.trained.no_dropout()
        values = engine.ranks.total(lambda: self._shared_judgement(engine, rows))
        loss_P, sums = values[: len(rows)], values[len(rows) :].tolist()
        _require_finite(loss_P, rows, "held-out loss")
        means = {name: total / len(rows) for name, total in zip(self.judge.names, sums, strict=True)}
        return _evaluation(loss_P, rows, means)

    def _shared_judgement(self, engine: Engine, rows: Sequence[Example]) -> Tensor:
        """The loss of each pair of this rank's share, 0 for the others; then the sums of its measures. float64."""
        mine = _share(engine, rows, self.shared)
        losses, measures = [], []
        ratio = pairs_per_token(rows)
        for chosen, laid in self._laid(engine, [rows[i] for i in mine], None):
            at = [mine[i] for i in chosen]
            judged = self.judge(engine, [rows[i] for i in at], laid, ratio)
            losses.append((at, judged.loss_P))
            measures.append(judged.measures)
        sums = list(self._sums(measures).values())
        return torch.cat([_in_order(losses, len(rows)), torch.tensor(sums, dtype=torch.float64)])

    def _sums(self, measures: Sequence[Measures]) -> dict[str, float]:
        return {name: float(sum(m[name].double().sum() for m in measures)) for name in self.judge.names}

    def _laid(
        self, engine: Engine, rows: Sequence[Example], keys: Sequence[int] | None
    ) -> Iterator[tuple[list[int], Laid]]:
        return laid_bins(engine, rows, keys, shared=self.shared, whole_chosen=self.judge.whole_chosen)


class Kto:
    """Kahneman-Tversky optimisation, whose rows are judged answers.

    Its reference point is estimated on mismatched answers: each prompt of the update with the answer of the row before
    it (the first with the last's), the mean over the whole update, not below 0, without gradient. TRL takes the rows of
    one micro-batch of one process instead, so that its loss depends on the cut. A row alone has nothing to be
    mismatched with: its reference point is 0.
    """

    def __init__(self, settings: KtoSettings, reference: Reference, max_length: int):
        self.settings, self.reference, self.max_length = settings, reference, max_length
        self._known: tuple[object, float] | None = None

    def accumulate_gradient(self, engine: Engine, rows: Sequence[Example], keys: Sequence[int]) -> Gradient:
        """Add the gradient of the mean loss of judged answers; `keys` name each one's dropout masks."""
        kl = self._reference_point(engine, rows, tuple(keys))
        mine = _share(engine, rows)
        some, found = [rows[i] for i in mine], []
        for chosen, laid in laid_bins(engine, some, [keys[i] for i in mine]):
            engine.trained.use_rows(None, laid.spans)
            loss_P, logp_P = self._judge(engine, [some[i] for i in chosen], laid, kl)
            (loss_P.sum() / len(rows)).backward()
            found.append(([mine[i] for i in chosen], loss_P.detach(), logp_P.detach()))
        loss_P = _in_order(((chosen, loss) for chosen, loss, _ in found), len(rows))
        logp_P = _in_order(((chosen, logp) for chosen, _, logp in found), len(rows))
        _require_finite(loss_P, rows, "loss")
        measures = self._measures(rows, mine, logp_P, kl if engine.ranks.is_first else 0.0)
        return Gradient(float(loss_P.mean()), _tokens(rows, False), _supervised(rows), measures)

    @torch.no_grad()
    def evaluate(self, engine: Engine, rows: Sequence[Example]) -> Evaluation:
        """The mean loss without dropout; the reference point is that of all the held-out rows."""
        engine.trained.no_dropout()
        kl = self._reference_point(engine, rows, "held out")
        try:
            values = engine.ranks.total(lambda: self._shared_judgement(engine, rows, kl))
        except Exception as error:
            if not is_out_of_memory(error):  # which is tried again here alone: the others are not asked twice
                self._known = None
            raise
        self._known = None
        loss_P, logp_P = values[: len(rows)], values[len(rows) :]
        _require_finite(loss_P, rows, "held-out loss")
        return _evaluation(loss_P, rows, self._measures(rows, range(len(rows)), logp_P, kl))

    def _shared_judgement(self, engine: Engine, rows: Sequence[Example], kl: float) -> Tensor:
        """Loss and log-probability of each row of this rank's share, 0 for the others. float64."""
        mine = _share(engine, rows)
        some, found = [rows[i] for i in mine], []
        for chosen, laid in laid_bins(engine, some, None):
            at = [mine[i] for i in chosen]
            found.append((at, *self._judge(engine, [rows[i] for i in at], laid, kl)))
        return torch.cat(
            [
                _in_order(((at, loss) for at, loss, _ in found), len(rows)),
                _in_order(((at, logp) for at, _, logp in found), len(rows)),
            ]
        )

    def _judge(self, engine: Engine, rows: Sequence[Example], laid: Laid, kl: float) -> tuple[Tensor, Tensor]:
        logp_P = _logps(engine, laid, 1)[:, 0]
        known_P = torch.tensor([self.reference.of(e)[0] for e in rows], dtype=logp_P.dtype).to(logp_P.device)
        desirable_P = torch.tensor([bool(e.desirable) for e in rows], device=logp_P.device)
        return kto_loss(Answers(logp_P, known_P, laid.tokens_A), desirable_P, kl, self.settings), logp_P

    def _reference_point(self, engine: Engine, rows: Sequence[Example], name: object) -> float:
        """Of all ranks' rows together. Asked again by the same name, when memory was short here, it asks nobody."""
        if self._known is None or self._known[0] != name:
            # Of an update that is made again with fewer rows some were not foreseen, and are left out of the mean.
            others = [row for row in mismatches(rows, self.max_length) if self.reference.knows(key_of(row))]
            apart = float(engine.ranks.total(lambda: self._apart(engine, others)))
            self._known = name, max(0.0, apart / len(others)) if others else 0.0
        return self._known[1]

    @torch.no_grad()
    def _apart(self, engine: Engine, rows: Sequence[Example]) -> Tensor:
        """The sum of this rank's rows' log-probabilities, less those under the reference."""
        engine.trained.no_dropout()
        some = [rows[i] for i in _share(engine, rows)]
        total = 0.0
        for chosen, laid in laid_bins(engine, some, None):
            known = sum(self.reference.of(some[i])[0] for i in chosen)
            total += float(_logps(engine, laid, 1).sum()) - known
        return torch.tensor(total, dtype=torch.float64)

    def _measures(self, rows: Sequence[Example], mine: Sequence[int], logp_P: Tensor, kl: float) -> Mapping[str, float]:
        """This rank's part of means over all rows, of which it has `mine`."""
        found = {"kl": kl}
        for name, wanted in (("chosen", True), ("rejected", False)):
            count = sum(row.desirable is wanted for row in rows)
            at = [i for i in mine if rows[i].desirable is wanted]
            if count:
                known = math.fsum(self.reference.of(rows[i])[0] for i in at)
                logp = float(logp_P[at].sum())
                found[f"rewards/{name}"] = self.settings.beta * (logp - known) / count
                found[f"logps/{name}"] = logp / count
        if "rewards/chosen" in found and "rewards/rejected" in found:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


def _share(engine: Engine, rows: Sequence[Example], shared: bool = False) -> Sequence[int]:
    """Which rows this rank computes."""
    return engine.ranks.share([laid_length(row, shared) for row in rows])


def mismatches(rows: Sequence[Example], max_length: int) -> list[Example]:
    """The answers that KTO's reference point is estimated on: each prompt with the answer of the row before it.

    They are cut to `max_length` as rows are, or to the row that the prompt is from where that is longer.
    """
    if len(rows) < 2:
        return []
    return [mismatched(row, rows[i - 1], max(max_length, len(row.ids))) for i, row in enumerate(rows)]


def laid_bins(
    engine: Engine,
    rows: Sequence[Example],
    keys: Sequence[int] | None,
    *,
    shared: bool = False,
    whole_chosen: bool = False,
) -> Iterator[tuple[list[int], Laid]]:
    """Micro-batches within the token budget: which rows, and how they lie."""
    for chosen in pack([laid_length(row, shared) for row in rows], engine.token_budget):
        named = None if keys is None else [keys[i] for i in chosen]
        device = engine.model.device
        yield (
            chosen,
            lay([rows[i] for i in chosen], named, shared=shared, whole_chosen=whole_chosen, device=device),
        )


def pairs_per_token(rows: Sequence[Example]) -> float:
    """Pairs over the tokens of their chosen sequences, less the first of each, which nothing predicts."""
    return len(rows) / sum(len(row.ids[: row.fork.second]) - 1 for row in rows if row.fork is not None)


def _logps(engine: Engine, laid: Laid, answers: int) -> Tensor:
    """[P, answers]"""
    return answer_logps(token_logps(engine.model, engine.head, laid), laid).view(-1, answers)


def _judged(found: Judgement, logp_P2: Tensor | None) -> Judged:
    measures = {
        "rewards/chosen": found.chosen_P,
        "rewards/rejected": found.rejected_P,
        "rewards/accuracies": (found.chosen_P > found.rejected_P).to(found.chosen_P.dtype),
        "rewards/margins": found.chosen_P - found.rejected_P,
    }
    if logp_P2 is not None:
        measures |= {"logps/chosen": logp_P2[:, 0].detach(), "logps/rejected": logp_P2[:, 1].detach()}
    return Judged(found.loss_P, measures)


def _in_order(parts: Iterable[tuple[list[int], Tensor]], count: int) -> Tensor:
    """Values of rows that lay in several micro-batches, in the rows' order [count], on the CPU."""
    out = torch.zeros(count, dtype=torch.float64)
    for chosen, values in parts:
        out[chosen] = values.double().cpu()
    return out


def _require_finite(loss_P: Tensor, rows: Sequence[Example], what: str) -> None:
    broken = [row for row, finite in zip(rows, torch.isfinite(loss_P).tolist(), strict=True) if not finite]
    if broken:
        where = origins_of(broken)
        raise NotFinite(f"the {what} is not finite in {where}; lower the learning rate or look at the rows")


def _evaluation(loss_P: Tensor, rows: Sequence[Example], measures: Mapping[str, float]) -> Evaluation:
    error = float(loss_P.std()) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
    return Evaluation(float(loss_P.mean()), error, _supervised(rows), tuple(loss_P.tolist()), measures)


def _tokens(rows: Sequence[Example], shared: bool) -> int:
    return sum(laid_length(row, shared) for row in rows)


def _supervised(rows: Sequence[Example]) -> int:
    return sum(int(row.mask.sum()) for row in rows)
