"""What an epoch passes through the model: a pair is two sequences, a prompt as many as answers are sampled."""

from dataclasses import dataclass

from welltuned.advice.reinforcement import answer_length
from welltuned.facts.data import DatasetFacts
from welltuned.recipe import Method


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """`examples` are what batches count: rows, pairs, or sampled answers. An example has `sequences` of them.

    `lengths` are the percentiles, 0th to 100th, of a sequence's expected tokens, `typical` is the 95th, and `longest`
    the most it may have.
    """

    examples: int
    sequences: int
    tokens: int
    supervised_tokens: int
    heldout_tokens: int
    lengths: tuple[int, ...]
    typical: int
    longest: int

    @property
    def supervised_share(self) -> float:
        return self.supervised_tokens / self.tokens


def epoch_of(method: Method, data: DatasetFacts, group: int = 1, longest_answer: int = 0) -> Epoch:
    """For grpo, `group` answers are sampled for every prompt, each of up to `longest_answer` tokens."""
    if method is not Method.GRPO:
        return Epoch(
            examples=data.rows,
            sequences=data.sequences_per_row,
            tokens=data.tokens,
            supervised_tokens=data.supervised_tokens,
            heldout_tokens=data.heldout_tokens,
            lengths=data.length_percentiles,
            typical=data.length_p95,
            longest=data.length_max,
        )
    answer, answers = answer_length(data, longest_answer), data.rows * group
    return Epoch(
        examples=answers,
        sequences=1,
        tokens=data.tokens * group + answers * answer,
        supervised_tokens=answers * answer,
        heldout_tokens=data.heldout_tokens + data.heldout_rows * answer,
        lengths=tuple(length + answer for length in data.length_percentiles),
        typical=data.length_p95 + answer,
        longest=data.length_max + longest_answer,
    )
