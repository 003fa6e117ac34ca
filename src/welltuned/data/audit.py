"""What the data will teach, counted before any training: trained share, end tokens, cuts, duplicates, leakage."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from welltuned.data.conversation import Conversation, Defect, Policy
from welltuned.data.render import Example, trained_runs
from welltuned.data.templates import control_tokens
from welltuned.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 5  # origins quoted in a sentence; `Audit` holds all of them


class Severity(StrEnum):
    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Problem:
    severity: Severity
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Counts over the training examples, and the origins of the rows that a person should look at."""

    rows: int
    tokens: int
    supervised_tokens: int
    end_trained: int  # rows in which every trained run that was not cut ends with a control token
    untrained: tuple[str, ...] = ()  # rows with no trained token
    end_untrained: tuple[str, ...] = ()  # uncut rows in which some answer ends without a trained end token
    cut: tuple[str, ...] = ()  # rows shortened to max_length: their last answer has lost its end
    duplicates: tuple[tuple[str, str], ...] = ()  # (row, the earlier row with the same tokens)
    overlap: tuple[tuple[str, str], ...] = ()  # (held-out row, the training row with the same tokens or prompt)
    control_in_text: tuple[tuple[str, str], ...] = ()  # (row, the special token that its own text spells)
    empty_turns: tuple[str, ...] = ()  # rows with a blank user or system turn
    dropped: tuple[Defect, ...] = ()

    @property
    def share(self) -> float:
        """Supervised tokens over all tokens."""
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "share": round(self.share, 4),
            "end_trained": self.end_trained,
            "untrained": list(self.untrained),
            "end_untrained": list(self.end_untrained),
            "cut": list(self.cut),
            "duplicates": [list(pair) for pair in self.duplicates],
            "overlap": [list(pair) for pair in self.overlap],
            "control_in_text": [list(pair) for pair in self.control_in_text],
            "empty_turns": list(self.empty_turns),
            "dropped": [{"origin": d.origin, "what": d.what} for d in self.dropped],
            "problems": [{"severity": p.severity.value, "sentence": p.sentence} for p in self.problems()],
        }

    def problems(self) -> list[Problem]:
        """One sentence for each kind of problem found, the gravest first."""
        of = f"of {self.rows:,} rows"
        found: list[tuple[Severity, Sequence[str], str]] = [
            (Severity.ERROR, self.untrained, f"{of} have no trained token, so they teach nothing"),
            (
                Severity.WARNING,
                self.end_untrained,
                f"{of} have an answer whose end-of-turn token is not trained, so the model may not learn to stop",
            ),
            (Severity.WARNING, self.cut, f"{of} are cut to max_length and lose the end of their last answer"),
            (Severity.WARNING, [d.origin for d in self.dropped], "rows are left out because of defects"),
            (
                Severity.WARNING,
                [f"{held} (as {train})" for held, train in self.overlap],
                "held-out rows repeat a training row or its prompt, so the held-out loss is too good",
            ),
            (
                Severity.WARNING,
                [f"{origin} ({token})" for origin, token in self.control_in_text],
                f"{of} spell a special token in their own text, and it is read as that token, not as text",
            ),
            (
                Severity.NOTE if 100 * len(self.duplicates) <= self.rows else Severity.WARNING,
                [f"{origin} (as {first})" for origin, first in self.duplicates],
                f"{of} repeat an earlier row exactly",
            ),
            (Severity.NOTE, self.empty_turns, f"{of} have a blank user or system turn"),
        ]
        return [
            Problem(severity, f"{len(names):,} {sentence}: {_some(names)}")
            for severity, names, sentence in found
            if names
        ]


def audit(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    conversations: Sequence[Conversation] = (),
    held_out: Sequence[Example] = (),
    dropped: Sequence[Defect] = (),
    on_untrained: Policy = Policy.ERROR,
) -> Audit:
    """Audit the training `examples`; their `conversations`, where given, are searched for special tokens.

    A row without any trained token is an InputError, unless `on_untrained` is DROP: then it is only listed, and the
    caller leaves it out.
    """
    ends = np.array(sorted(control_tokens(tokenizer).values()), np.int32)
    untrained = tuple(e.origin for e in examples if not e.mask.any())
    end_untrained = tuple(e.origin for e in examples if e.mask.any() and not _ends_trained(e, ends))
    duplicates, overlap = _repeats(examples, held_out)
    result = Audit(
        rows=len(examples),
        tokens=sum(len(e.ids) for e in examples),
        supervised_tokens=sum(int(e.mask.sum()) for e in examples),
        end_trained=len(examples) - len(untrained) - len(end_untrained),
        untrained=untrained,
        end_untrained=end_untrained,
        cut=tuple(e.origin for e in examples if e.cut),
        duplicates=duplicates,
        overlap=overlap,
        control_in_text=_control_in_text(conversations, tokenizer),
        empty_turns=tuple(
            c.origin
            for c in conversations
            if any(m.role in ("user", "system") and not m.content.strip() for m in c.messages)
        ),
        dropped=tuple(dropped),
    )
    if untrained and on_untrained is Policy.ERROR:
        what = f"none of the row's tokens is trained ({len(untrained):,} such rows)"
        raise InputError(what, where=untrained[0], mend="see what the chat template renders, or drop such rows")
    return result


def _some(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest:,} more" if rest > 0 else "")


def _ends_trained(example: Example, ends: NDArray[np.int32]) -> bool:
    """Each trained run ends with a control token (or with one and a newline token, where everything is trained).

    The last run of a cut example is not judged: it lost its end with the cut, which is counted on its own.
    """
    runs = trained_runs(example.mask)
    if example.cut and runs[-1][1] == len(example.ids):
        runs.pop()
    return all(bool(np.isin(example.ids[max(start, end - 2) : end], ends).any()) for start, end in runs)


def _digest(ids: NDArray[np.int32]) -> bytes:
    return blake2b(ids.tobytes(), digest_size=16).digest()


def _repeats(
    examples: Sequence[Example], held_out: Sequence[Example]
) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """Rows with the tokens of an earlier row, and held-out rows with the tokens or the prompt of a training row."""
    rows: dict[bytes, str] = {}
    duplicates = []
    for example in examples:
        first = rows.setdefault(_digest(example.ids), example.origin)
        if first is not example.origin:
            duplicates.append((example.origin, first))
    if not held_out:
        return tuple(duplicates), ()
    prompts = {_digest(p): e.origin for e in reversed(examples) if len(p := _prompt(e)) > 1}
    overlap = []
    for example in held_out:
        first_same = rows.get(_digest(example.ids)) or prompts.get(_digest(_prompt(example)))
        if first_same is not None:
            overlap.append((example.origin, first_same))
    return tuple(duplicates), tuple(overlap)


def _prompt(example: Example) -> NDArray[np.int32]:
    """ids [p] before the first trained token; one token (a BOS) or none is no prompt."""
    first = int(np.argmax(example.mask))
    return example.ids[:first]


def _control_in_text(
    conversations: Sequence[Conversation], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[tuple[str, str], ...]:
    """Special tokens spelled out in the rows' own texts. Added tokens that are not special (<think>) may be meant."""
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content.strip()]
    if not special:
        return ()
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
    found = []
    for conversation in conversations:
        match = next((hit for m in conversation.messages if (hit := pattern.search(m.content))), None)
        if match:
            found.append((conversation.origin, match.group()))
    return tuple(found)
