"""What of a run a person looks at: some training rows as they are trained, and replies before and after training.

Kept in shown.json, for the report.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from welltuned.data.render import Example
from welltuned.data.rows import Rows
from welltuned.data.show import Gap, Side, choose, lengths_of, runs
from welltuned.data.speakers import Speaker
from welltuned.models.generate import Decoding, replies
from welltuned.recipe import Method
from welltuned.training import durable
from welltuned.training.prepare import Prepared
from welltuned.training.rundir import SHOWN, finite

ROWS, MOST_TOKENS = 5, 400  # training rows that are kept, and about how many tokens of each
ASKED, LONGEST_REPLY = 3, 96  # held-out prompts that are answered, and tokens of a reply
LONGEST_PROMPT = 2_000  # characters that are kept


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out prompt as token ids, what a person would read of it, and the answer that the data give."""

    origin: str
    ids: tuple[int, ...]
    prompt: str
    expected: str


class When(StrEnum):
    BEFORE = "before"
    AFTER = "after"


@dataclass(frozen=True, slots=True)
class Score:
    """A measure of replies before and after training, each with its standard error."""

    name: str
    before: float
    before_se: float
    after: float
    after_se: float


def keep_rows(run: Path, prepared: Prepared) -> None:
    """Write rows of the training data as runs of text, trained or not, and how long the rows are."""
    rows = prepared.train
    if not isinstance(rows, Rows):  # prompts: what is trained is sampled, and is in samples.jsonl
        return
    shown = [_row(rows[index], prepared, why) for index, why in choose(rows, ROWS).items()]
    lengths = lengths_of(rows.column("length")).to_json()
    write_shown(run, {**read_shown(run), "rows": shown, "lengths": lengths})


def _row(example: Example, prepared: Prepared, why: str) -> dict[str, Any]:
    parts = [
        {"gap": run.tokens, "trained": run.trained > 0}
        if isinstance(run, Gap)
        else {"text": run.text, "trained": run.trained, "speaker": run.speaker.name.lower(), "side": str(run.side)}
        for run in runs(example, prepared.tokenizer, MOST_TOKENS)
    ]
    return {"origin": example.origin, "why": why, "tokens": len(example.ids), "runs": parts}


def questions(prepared: Prepared) -> tuple[Question, ...]:
    """Some held-out prompts to be answered; none where rows are plain text, prompts alone, or scored."""
    rows = prepared.held_out
    if not isinstance(rows, Rows) or not len(rows) or prepared.recipe.method in (Method.REWARD, Method.GRPO):
        return ()
    spread = dict.fromkeys(int(i) for i in np.linspace(0, len(rows) - 1, ASKED))
    return tuple(q for index in spread if (q := _question(rows[index], prepared)) is not None)


def _question(example: Example, prepared: Prepared) -> Question | None:
    if example.fork is not None:  # a pair: the answer that is to be preferred
        start, stop = example.fork.shared, example.fork.second
    else:
        trained = np.flatnonzero(example.mask)
        if not len(trained):
            return None
        stop = int(trained[-1]) + 1
        before = np.flatnonzero(~example.mask[:stop])
        start = int(before[-1]) + 1 if len(before) else 0
    if start == 0:
        return None
    ids = example.ids.tolist()
    expected = prepared.tokenizer.decode(ids[start:stop], skip_special_tokens=True)
    return Question(example.origin, tuple(ids[:start]), _asked(example, start, prepared), str(expected))


def _asked(example: Example, start: int, prepared: Prepared) -> str:
    """The last thing that the user says before the answer; all of the prompt where roles are not known."""
    said = [
        run.text
        for run in runs(example, prepared.tokenizer)
        if not isinstance(run, Gap) and run.speaker is Speaker.USER and run.side is Side.NEITHER
    ]
    text = said[-1] if said else str(prepared.tokenizer.decode(example.ids[:start].tolist(), skip_special_tokens=True))
    return text.strip()[:LONGEST_PROMPT]


def ask(model: PreTrainedModel, prepared: Prepared, asked: Sequence[Question]) -> list[str]:
    """The model's greedy replies."""
    return replies(model, prepared.tokenizer, [q.ids for q in asked], Decoding(max_new_tokens=LONGEST_REPLY))


def keep_replies(run: Path, asked: Sequence[Question], when: When, texts: Sequence[str]) -> None:
    """Add replies to what is kept."""
    kept = read_shown(run)
    lines = kept.get("replies") or [{"origin": q.origin, "prompt": q.prompt, "expected": q.expected} for q in asked]
    replied = [{**line, str(when): text} for line, text in zip(lines, texts, strict=True)]
    write_shown(run, {**kept, "replies": replied})


def keep_scores(run: Path, of: str, scores: Sequence[Score]) -> None:
    """Add what was measured of replies before and after training, such as a share that is right.

    Args:
        of: what was judged, as the head of a table.
    """
    write_shown(run, {**read_shown(run), "scores": {"of": of, "lines": [asdict(score) for score in scores]}})


def read_shown(run: Path) -> dict[str, Any]:
    """What is kept so far."""
    path = run / SHOWN
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"format": 1}
    return kept


def write_shown(run: Path, kept: Mapping[str, Any]) -> None:
    text = json.dumps(finite(kept), indent=1, ensure_ascii=False, allow_nan=False)
    durable.replace_file(run / SHOWN, text + "\n")
