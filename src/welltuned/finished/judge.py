"""A tuned model beside its base: held-out loss, perplexity, and replies; differences paired row by row."""

import gc
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from welltuned.data.conversation import Conversation, Format
from welltuned.data.render import Renderer
from welltuned.errors import InputError
from welltuned.finished.find import Finished, Loaded, load
from welltuned.finished.heldout import (
    Difference,
    Watch,
    engine_of,
    held_out_rows,
    judge,
    judge_base,
    paired,
    quiet,
    rows_of,
)
from welltuned.finished.scores import Metric, Score, difference, require, score
from welltuned.models.generate import Decoding, replies
from welltuned.models.load import load_tokenizer
from welltuned.training.step import Evaluation


@dataclass(frozen=True, slots=True)
class Judged:
    """One model on one set of rows; `replies` only where metrics were asked for."""

    loss: Evaluation
    scores: tuple[Score, ...] = ()
    replies: tuple[str, ...] = ()

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss.loss)


@dataclass(frozen=True, slots=True)
class Judgement:
    """`base` and the differences are None where there is only one model. Differences are tuned less base."""

    name: str
    rows: str
    count: int
    tuned: Judged
    base: Judged | None
    loss_difference: Difference | None
    differences: tuple[tuple[float, float], ...]
    origins: tuple[str, ...]
    answers: tuple[str, ...]


def judge_run(
    finished: Finished,
    *,
    data: str | None = None,
    metrics: Sequence[Metric] = (),
    count: int | None = None,
    max_new_tokens: int = 256,
    watch: Watch = quiet,
) -> Judgement:
    """Judge a finished run or adapter beside its base, or a model by itself.

    Args:
        data: rows to judge by; None for those that the Run held out.
        metrics: what to measure of replies to the rows' last messages; none are generated without.
        count: the first so many rows only; None for all.
    """
    require(metrics)
    if count is not None and count < 1:
        raise InputError("must be at least 1", where="--rows")
    rows = held_out_rows(finished) if data is None else rows_of(data, load_tokenizer(finished.model), finished)
    rows = rows.first(count)
    asked = [_asked(c) for c in rows.conversations] if metrics else []
    decoding = Decoding(max_new_tokens=max_new_tokens)

    def judged(loaded: Loaded, evaluation: Evaluation, base: bool) -> Judged:
        if not metrics:
            return Judged(evaluation)
        watch(f"{'base' if base else 'tuned'}: {len(asked)} replies")
        renderer = Renderer(loaded.tokenizer, chat_template=finished.chat_template)
        prompts = [renderer.prompt(question) for question, _ in asked]
        with loaded.bank.disabled() if base and loaded.bank is not None else nullcontext():
            made = replies(loaded.model, loaded.tokenizer, prompts, decoding)
        found = tuple(score(metric, made, [answer for _, answer in asked]) for metric in metrics)
        return Judged(evaluation, found, tuple(made))

    watch(f"tuned: loss on {len(rows.examples)} rows")
    loaded = load(finished)
    engine = engine_of(loaded)
    tuned = judged(loaded, judge(engine, rows), base=False)
    base = None
    if loaded.bank is not None:
        watch(f"base: loss on {len(rows.examples)} rows")
        base = judged(loaded, judge_base(engine, rows), base=True)
    elif finished.base is not None:
        del loaded, engine
        gc.collect()
        watch(f"base: loss on {len(rows.examples)} rows")
        before = load(replace(finished, model=finished.base))
        base = judged(before, judge(engine_of(before), rows), base=True)
    return Judgement(
        name=str(finished.path),
        rows=rows.name,
        count=len(rows.examples),
        tuned=tuned,
        base=base,
        loss_difference=None if base is None else paired(tuned.loss, base.loss, rows),
        differences=() if base is None else tuple(map(difference, tuned.scores, base.scores)),
        origins=tuple(e.origin for e in rows.examples),
        answers=tuple(answer for _, answer in asked),
    )


def _asked(conversation: Conversation) -> tuple[Conversation, str]:
    """The conversation up to its last answer, and that answer."""
    last = conversation.messages[-1]
    if conversation.format is Format.TEXT or last.role != "assistant":
        what = "the row does not end with an answer, so that no reply could be compared with it"
        raise InputError(what, where=conversation.origin, mend="leave --metrics out")
    return replace(conversation, messages=conversation.messages[:-1]), last.content


def to_json(found: Judgement) -> dict[str, Any]:
    """One document, with every reply where there are any."""

    def model(judged: Judged | None) -> dict[str, Any] | None:
        if judged is None:
            return None
        return {
            "loss": judged.loss.loss,
            "standard_error": judged.loss.standard_error,
            "perplexity": judged.perplexity,
            "supervised_tokens": judged.loss.supervised_tokens,
            "metrics": {
                str(s.metric): {"value": s.value, "standard_error": s.error, "rows": s.rows, "left_out": s.left_out}
                for s in judged.scores
            },
        }

    gap = found.loss_difference
    metrics = [s.metric for s in found.tuned.scores]
    return {
        "model": found.name,
        "data": found.rows,
        "rows": found.count,
        "tuned": model(found.tuned),
        "base": model(found.base),
        "difference": None
        if gap is None
        else {
            "loss": {"value": gap.value, "standard_error": gap.error},
            **{
                str(m): {"value": value, "standard_error": error}
                for m, (value, error) in zip(metrics, found.differences, strict=True)
            },
        },
        "replies": [
            {
                "origin": origin,
                "answer": answer,
                "tuned": reply,
                "base": found.base.replies[i] if found.base is not None else None,
            }
            for i, (origin, answer, reply) in enumerate(
                zip(found.origins, found.answers, found.tuned.replies, strict=False)
            )
        ],
    }
