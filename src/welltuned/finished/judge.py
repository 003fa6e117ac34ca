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
    RowSet,
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
from welltuned.training.step import Engine, Evaluation


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
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Task:
    """What both models are asked: rows, and where metrics are wanted, questions with their answers."""

    rows: RowSet
    metrics: Sequence[Metric]
    asked: Sequence[tuple[Conversation, str]]
    template: str | None
    decoding: Decoding
    watch: Watch

    def judge(self, loaded: Loaded, engine: Engine, name: str) -> Judged:
        """One model's loss, and its replies; `name` "base" means without the adapter."""
        base = name == "base"
        self.watch(f"{name}: loss on {len(self.rows.examples)} rows")
        evaluation = (judge_base if base else judge)(engine, self.rows)
        if not self.metrics:
            return Judged(evaluation)
        self.watch(f"{name}: {len(self.asked)} replies")
        renderer = Renderer(loaded.tokenizer, chat_template=self.template)
        prompts = [renderer.prompt(question) for question, _ in self.asked]
        with loaded.bank.disabled() if base and loaded.bank is not None else nullcontext():
            made = replies(loaded.model, loaded.tokenizer, prompts, self.decoding)
        answers = [answer for _, answer in self.asked]
        return Judged(evaluation, tuple(score(metric, made, answers) for metric in self.metrics), tuple(made))


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
    rows = held_out_rows(finished) if data is None else rows_of(data, load_tokenizer(finished.model), finished)
    rows = rows.first(count)
    asked = [_asked(c) for c in rows.conversations] if metrics else []
    task = _Task(rows, metrics, asked, finished.chat_template, Decoding(max_new_tokens=max_new_tokens), watch)
    loaded = load(finished)
    engine = engine_of(loaded)
    tuned = task.judge(loaded, engine, "tuned" if finished.base is not None else "model")
    base = None
    if loaded.bank is not None:
        base = task.judge(loaded, engine, "base")
    elif finished.base is not None:
        del loaded, engine  # one model at a time
        gc.collect()
        before = load(replace(finished, model=finished.base))
        base = task.judge(before, engine_of(before), "base")
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
        prompts=tuple(question.messages[-1].content if question.messages else "" for question, _ in asked),
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
    gap, metrics = found.loss_difference, [str(s.metric) for s in found.tuned.scores]
    gaps = {name: _value(*one) for name, one in zip(metrics, found.differences, strict=False)}
    base = [None] * len(found.tuned.replies) if found.base is None else found.base.replies
    told = zip(found.origins, found.prompts, found.answers, found.tuned.replies, base, strict=False)
    return {
        "model": found.name,
        "data": found.rows,
        "rows": found.count,
        "tuned": _model(found.tuned),
        "base": None if found.base is None else _model(found.base),
        "difference": None if gap is None else {"loss": _value(gap.value, gap.error), **gaps},
        "replies": [
            {"origin": origin, "prompt": prompt, "answer": answer, "tuned": reply, "base": before}
            for origin, prompt, answer, reply, before in told
        ],
    }


def _model(judged: Judged) -> dict[str, Any]:
    return {
        "loss": judged.loss.loss,
        "standard_error": judged.loss.standard_error,
        "perplexity": judged.perplexity,
        "supervised_tokens": judged.loss.supervised_tokens,
        "metrics": {
            str(s.metric): {**_value(s.value, s.error), "rows": s.rows, "left_out": s.left_out} for s in judged.scores
        },
    }


def _value(value: float, error: float) -> dict[str, float]:
    return {"value": value, "standard_error": error}
