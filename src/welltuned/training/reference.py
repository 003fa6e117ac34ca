"""Log-probabilities of answers under the model as it starts: computed once, kept on disk by content.

One file for each (base weights, start adapter, number format), named by their hash. An entry is the hash of a sequence
with its mask, and the sum of its trained tokens' log-probabilities. So every run on the same base shares them, whatever
its rank, rate or method.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from welltuned.data.cache import default_folder
from welltuned.data.packing import pack
from welltuned.data.pairs import sequences
from welltuned.data.render import Example
from welltuned.errors import RunError
from welltuned.models.identity import hash_base, hash_tensors
from welltuned.models.lora import AdapterBank
from welltuned.models.packed import packed_model
from welltuned.objectives.answers import answer_logps, laid_length, lay, token_logps
from welltuned.training.step import Engine

FORMAT = 1
FOLDER = "reference"
ROWS_AT_A_TIME = 1_024  # packed together: enough to fill budgets well
Keys = NDArray[np.uint64]
Values = NDArray[np.float64]


def key_of(sequence: Example) -> int:
    """The name of a sequence: 8 bytes of a hash of its tokens and of which of them count."""
    found = hashlib.blake2b(sequence.ids.astype("<i4").tobytes(), digest_size=8)
    found.update(sequence.mask.tobytes())
    return int.from_bytes(found.digest(), "little")


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """Known log-probabilities: names ascending [n], and their values [n], in nats."""

    keys: Keys
    values: Values

    def of(self, example: Example) -> list[float]:
        """Those of an example's answers: one, or the chosen and the rejected one of a pair."""
        return [self._value(key_of(sequence), sequence.origin) for sequence in sequences(example)]

    def knows(self, key: int) -> bool:
        at = int(np.searchsorted(self.keys, np.uint64(key)))
        return at < len(self.keys) and int(self.keys[at]) == key

    def only(self, keys: Collection[int]) -> dict[int, float]:
        """Those of these names."""
        return {key: self._value(key, "a row") for key in keys}

    def and_(self, found: Mapping[int, float]) -> "Reference":
        """These and those that were found now."""
        keys = np.concatenate([self.keys, np.fromiter(found.keys(), np.uint64, len(found))])
        values = np.concatenate([self.values, np.fromiter(found.values(), np.float64, len(found))])
        keys, first = np.unique(keys, return_index=True)
        return Reference(keys, values[first])

    def _value(self, key: int, origin: str) -> float:
        at = int(np.searchsorted(self.keys, np.uint64(key)))
        if at == len(self.keys) or int(self.keys[at]) != key:
            raise RunError(f"no reference log-probability is known for {origin}: the rows changed since the run began")
        return float(self.values[at])


NOTHING_KNOWN = Reference(np.empty(0, np.uint64), np.empty(0, np.float64))


def reference_for(
    engine: Engine,
    rows: Iterable[Example],
    *,
    shared: bool,
    fresh: bool,
    note: Callable[[str], None],
    progress: Callable[[str], None],
) -> Reference:
    """Those of all the rows' answers, from the file where they are known, else computed now and added to it.

    Several ranks ask for every n-th row each, and tell each other. To be called before the first update. Adapters are
    set to their start meanwhile; all of a model cannot be.

    Args:
        shared: whether the prompt of a pair is computed once.
        fresh: whether adapters begin at nothing, so that the model as it starts is the base.
        note: told of a file that cannot be used; `progress` of what takes time now.
    """
    bank = engine.trained if isinstance(engine.trained, AdapterBank) else None
    start = None if bank is None or fresh else hash_tensors(bank.tensors_at_start())
    file = ReferenceFile(_folder() / _name(hash_base(engine.model), start))
    known = file.read(note)
    ranks = engine.ranks
    missing: dict[tuple[int, ...], Example] = {}
    asked: set[int] = set()
    for row in islice(rows, ranks.rank, None, ranks.size):
        keys = tuple(map(key_of, sequences(row)))
        asked.update(keys)
        if not all(map(known.knows, keys)):
            missing.setdefault(keys, row)
    found: dict[int, float] = {}
    if missing:
        some = f"{len(missing):,} rows" + ("" if ranks.alone else f" by each of {ranks.size} processes")
        progress(f"the model as it starts is asked for the log-probabilities of {some}, once: they are kept")
        with torch.no_grad(), packed_model(engine.model), at_start(engine):
            found = dict(_computed(engine, list(missing.values()), shared))
        known = known.and_(found)
    if not ranks.alone:
        others = ranks.gather(lambda: (bool(found), known.only(asked)))
        known = known.and_({key: value for _, part in others for key, value in part.items()})
        if not ranks.is_first or not any(new for new, _ in others):
            return known
    elif not found:
        return known
    file.write(known, note)
    return known


def _computed(engine: Engine, rows: Sequence[Example], shared: bool) -> Iterator[tuple[int, float]]:
    for first in range(0, len(rows), ROWS_AT_A_TIME):
        some = rows[first : first + ROWS_AT_A_TIME]
        for bin_ in pack([laid_length(row, shared) for row in some], engine.token_budget):
            chosen = [some[i] for i in bin_]
            laid = lay(chosen, shared=shared, device=engine.model.device)
            logps = answer_logps(token_logps(engine.model, engine.head, laid), laid).tolist()
            answers = [sequence for row in chosen for sequence in sequences(row)]
            for sequence, logp in zip(answers, logps, strict=True):
                if not np.isfinite(logp):
                    raise RunError(f"the model as it starts gives {sequence.origin} no finite log-probability")
                yield key_of(sequence), logp


@contextmanager
def at_start(engine: Engine) -> Iterator[None]:
    """Within the block adapters are what they were when they were attached or loaded, and nothing is dropped."""
    engine.trained.no_dropout()
    if not isinstance(engine.trained, AdapterBank):
        yield
        return
    bank = engine.trained
    now = bank.flat_KP.clone()
    bank.flat_KP.copy_(bank.start_KP)
    try:
        yield
    finally:
        bank.flat_KP.copy_(now)


def _folder() -> Path:
    return default_folder() / FOLDER


def _name(base: str, adapter: str | None) -> str:
    parts = json.dumps({"format": FORMAT, "base": base, "adapter": adapter}, sort_keys=True)
    return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()


class ReferenceFile:
    """A line of JSON (format, number of entries, sha256 of the rest), then the names, then the values."""

    def __init__(self, path: Path):
        self.path = path

    def read(self, note: Callable[[str], None]) -> Reference:
        """What is known; nothing where there is no file, or one that is not whole, which is said."""
        try:
            head, _, body = self.path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return NOTHING_KNOWN
        except OSError as error:
            note(f"the reference log-probabilities in {self.path} cannot be read ({error.strerror}): computed again")
            return NOTHING_KNOWN
        known = _parsed(head, body)
        if known is None:
            note(f"the reference log-probabilities in {self.path} are damaged and not used: they are computed again")
        return known or NOTHING_KNOWN

    def write(self, known: Reference, note: Callable[[str], None]) -> None:
        """Whole or not at all; a run that cannot keep them goes on."""
        body = known.keys.astype("<u8").tobytes() + known.values.astype("<f8").tobytes()
        head = {"format": FORMAT, "entries": len(known.keys), "sha256": hashlib.sha256(body).hexdigest()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            number, beside = tempfile.mkstemp(prefix=".building-", dir=self.path.parent)
        except OSError as error:
            note(f"the reference log-probabilities cannot be kept in {self.path.parent} ({error.strerror})")
            return
        try:
            with os.fdopen(number, "wb") as file:
                file.write(json.dumps(head).encode() + b"\n" + body)
            os.replace(beside, self.path)
        except OSError as error:
            note(f"the reference log-probabilities cannot be kept in {self.path.parent} ({error.strerror})")
            with suppress(OSError):
                os.unlink(beside)


def _parsed(head: bytes, body: bytes) -> Reference | None:
    """The entries, None unless the bytes are those that were written."""
    try:
        about = json.loads(head)
        entries = int(about["entries"])
        sound = about["format"] == FORMAT and about["sha256"] == hashlib.sha256(body).hexdigest()
    except (ValueError, KeyError, TypeError):
        return None
    if not sound or len(body) != 16 * entries:
        return None
    return Reference(np.frombuffer(body, "<u8", entries), np.frombuffer(body, "<f8", entries, 8 * entries))
