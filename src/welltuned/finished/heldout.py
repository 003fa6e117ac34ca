"""Loss on rows that were not trained on, with its standard error; two models' losses compared row by row."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from welltuned.data.build import Reading, read_store
from welltuned.data.conversation import Conversation
from welltuned.data.dataset import Conversations, reading_of
from welltuned.data.render import Example
from welltuned.data.rows import all_rows
from welltuned.data.source import open_source
from welltuned.errors import InputError
from welltuned.finished.find import Finished, Loaded
from welltuned.models.full import FullParameters
from welltuned.models.fuse import find_head, fuse
from welltuned.models.lora import AdapterBank
from welltuned.models.packed import packed_model, packs
from welltuned.objectives.supervised import supervised_tokens
from welltuned.recipe import Method
from welltuned.training.prepare import prepare
from welltuned.training.step import Engine, Evaluation, evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_BUDGET = 2048  # tokens of one forward pass


@dataclass(frozen=True, slots=True)
class RowSet:
    """Rows to be judged by: their tokens, and their conversations (read when they are asked for)."""

    name: str
    examples: Sequence[Example]
    conversations: Sequence[Conversation]

    def first(self, count: int | None) -> "RowSet":
        if count is None or count >= len(self.examples):
            return self
        if count < 1:
            raise InputError("must be at least 1", where="--rows")
        return RowSet(self.name, self.examples[:count], self.conversations[:count])


@dataclass(frozen=True, slots=True)
class Difference:
    """How much less one model's loss is than another's on the same rows; `error` is the standard error, paired."""

    value: float
    error: float


def held_out_rows(finished: Finished) -> RowSet:
    """The rows that the Run held out, found again from its recipe.

    Raises:
        InputError: there is no Run, its data are not there any more, or they are others now.
    """
    if finished.plan is None:
        raise InputError("only a Run knows its held-out rows", where=str(finished.path), mend="give --data FILE")
    if finished.plan.recipe.method is not Method.SFT:
        what = f"the rows of a {finished.plan.recipe.method} run are not answers whose loss could be measured"
        raise InputError(what, where=str(finished.path), mend="give --data FILE")
    prepared = prepare(finished.plan.recipe)
    noted = finished.facts.get("held_out") or {}
    origins = [e.origin for e in prepared.held_out[: len(noted.get("origins", []))]]
    if len(prepared.held_out) != noted.get("rows") or origins != noted.get("origins"):
        what = f"the data are not those of the run: {len(prepared.held_out)} rows would be held out now"
        mend = f"put the data back as they were ({', '.join(finished.plan.recipe.datasets)}), or give --data FILE"
        raise InputError(f"{what}, and it held out {noted.get('rows')}", where=str(finished.path), mend=mend)
    if not len(prepared.held_out):
        raise InputError("the run held no rows out", where=str(finished.path), mend="give --data FILE")
    return RowSet("held-out rows", prepared.held_out, prepared.held_out_conversations)


def rows_of(data: str, tokenizer: "PreTrainedTokenizerBase", finished: Finished) -> RowSet:
    """All rows of a file, folder, pattern or hub dataset, rendered as the run's own were."""
    reading = Reading(chat_template=finished.chat_template)
    if finished.plan is not None:
        own = reading_of(finished.plan.recipe)
        reading = Reading(
            group_by=None,
            loss_on=own.loss_on,
            instruction_part=own.instruction_part,
            response_part=own.response_part,
            chat_template=finished.chat_template,
        )
    source = open_source(data)
    store = read_store(source, tokenizer, reading)
    rows = all_rows([store])
    if not len(rows):
        raise InputError("there are no rows to judge by", where=data, mend="give a file with rows")
    unlabelled = next((e.origin for e in rows if not supervised_tokens(e)), None)
    if unlabelled is not None:
        raise InputError("no token of this row is an answer's", where=unlabelled, mend="take it out")
    return RowSet(data, rows, Conversations(rows, [source], reading))


def engine_of(loaded: Loaded, budget: int = TOKEN_BUDGET) -> Engine:
    """The model made ready to be judged, as training makes it ready."""
    trained = loaded.bank if loaded.bank is not None else _Nothing()
    fuse(loaded.model, loaded.bank)
    head = find_head(loaded.model)
    return Engine(loaded.model, trained, head, budget if packs(loaded.model) else 1)  # type: ignore[arg-type]


class _Nothing:
    """What is trained on a whole model that is only judged."""

    use_rows = FullParameters.use_rows
    no_dropout = FullParameters.no_dropout


def judge(engine: Engine, rows: RowSet) -> Evaluation:
    with packed_model(engine.model):
        return evaluate(engine, rows.examples)


def judge_base(engine: Engine, rows: RowSet) -> Evaluation:
    """The same without the adapter."""
    bank = engine.trained
    with bank.disabled() if isinstance(bank, AdapterBank) else nullcontext():
        return judge(engine, rows)


def paired(ours: Evaluation, theirs: Evaluation, rows: RowSet) -> Difference:
    """Our loss less theirs. Rows that are hard are hard for both, so that the pairs say more than the two errors.

    The error is that of a ratio of sums over rows (Cochran, Sampling Techniques, 1977, section 6.4); NaN for one row.
    """
    counts = np.array([supervised_tokens(e) for e in rows.examples], dtype=np.float64)
    gaps = (np.array(ours.loss_of_example) - np.array(theirs.loss_of_example)) * counts
    value = float(gaps.sum() / counts.sum())
    n = len(counts)
    spread = float(((gaps - value * counts) ** 2).sum())
    return Difference(value, math.sqrt(spread * n / (n - 1)) / float(counts.sum()) if n > 1 else math.nan)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean over rows and its standard error; NaN for one row."""
    x = np.asarray(values, dtype=np.float64)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan


Watch = Callable[[str], None]


def quiet(_: str) -> None:
    """For callers that do not watch."""
