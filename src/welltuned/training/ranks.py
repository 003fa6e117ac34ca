"""Several processes that train one model together, each with its share of every update's rows.

Every rank runs the same program on the same plan and holds base and adapters whole. Weights, moments and all numbers
that decide something are the same on all of them, so that they decide alike without being asked; what can differ (a
fault, a signal, a disk, rank 0's files) goes through the calls here. An error on one rank is raised on all, in the same
place and with the same exit code; a rank that is gone, or silent for too long, ends the others.

No call may stand within what another one is given to do: ranks would wait for each other in different places.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from welltuned.data.stream import balanced_shares
from welltuned.errors import InputError, RunError, WelltunedError
from welltuned.facts.machine import Launch, launch
from welltuned.models.oom import is_out_of_memory

T = TypeVar("T")

TIMEOUT = "WELLTUNED_TIMEOUT"  # seconds that a rank waits for the others; the usual value is transformers' ddp_timeout
USUAL_TIMEOUT = 1_800.0
PATIENCE = timedelta(days=2)  # while one rank reads data, or writes the result, and the others have nothing to do
REPORTING = timedelta(seconds=3)  # to find out who is gone
CHUNK = 2**22  # numbers of a tensor that are hashed at a time


class Lost(RunError):
    """Another rank is gone or does not answer: this one cannot go on."""


class Elsewhere(WelltunedError):
    """What another rank failed of. `quiet` where that rank, or the first, says it."""

    def __init__(self, text: str, exit_code: int, quiet: bool):
        super().__init__(text)
        self.exit_code, self.quiet = exit_code, quiet


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as it is told to other ranks."""

    text: str
    exit_code: int

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        if isinstance(error, WelltunedError):
            return cls(str(error), error.exit_code)
        return cls(f"{type(error).__name__}: {error}", 1)


class Ranks:
    """One process: there is nobody to agree with, and nothing costs anything.

    Attributes:
        here: how many of the ranks share this machine.
    """

    rank, size, here = 0, 1, 1

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and speaks for all."""
        return self.rank == 0

    def share(self, tokens: Sequence[int]) -> Sequence[int]:
        """Which of an update's rows, of so many tokens each, this rank computes: ascending indices, maybe none."""
        return range(len(tokens))

    def each(self, make: Callable[[], T]) -> T:
        """What `make` gives on this rank; where it fails on any, that is raised on all.

        Running out of memory is not told: whoever catches it tries again here, alone.
        """
        return make()

    def gather(self, make: Callable[[], T]) -> list[T]:
        """The same, with what `make` gave on every rank."""
        return [make()]

    def first(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first rank, the only one that calls it."""
        return make()

    def total(self, make: Callable[[], Tensor]) -> Tensor:
        """The sum over the ranks of small tensors on the CPU; the same bits on all of them."""
        return make()

    def sum_(self, tensor: Tensor) -> None:
        """Put the sum over the ranks in the place of a tensor; the same bits on all of them."""

    def spread_(self, tensors: Sequence[Tensor]) -> None:
        """Put the first rank's numbers in the place of everybody's."""

    def require_equal(self, what: str, tensors: Sequence[Tensor]) -> None:
        """Raise RunError on all ranks where these numbers are not the same bits on each."""

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Within the block a rank may take hours; one that dies is noticed all the same."""
        yield


ALONE = Ranks()


class Group(Ranks):
    """Several processes, by torch.distributed: gloo between processors, NCCL between GPUs."""

    def __init__(self, launched: Launch, timeout: float):
        self.rank, self.size, self.here = launched.rank, launched.size, launched.here
        self._timeout = timeout
        self._hasty: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._patient: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._words = self._hasty

    def share(self, tokens: Sequence[int]) -> Sequence[int]:
        return balanced_shares(tokens, self.size)[self.rank]

    def each(self, make: Callable[[], T]) -> T:
        made: list[T] = []
        self.gather(lambda: made.append(make()))
        return made[0]

    def gather(self, make: Callable[[], T]) -> list[T]:
        failed: Exception | None = None
        mine: Any = None
        try:
            mine = make()
        except Exception as error:
            if isinstance(error, Lost) or is_out_of_memory(error):
                raise
            failed = error
        words = self.exchange((None if failed is None else Failure.of(failed), mine))
        self.require_no_failure([failure for failure, _ in words], failed)
        return [value for _, value in words]

    def require_no_failure(self, failures: Sequence[Failure | None], mine: Exception | None) -> None:
        """Raise the failure of the lowest rank that has one; that rank's own error on itself."""
        found = next(((rank, failure) for rank, failure in enumerate(failures) if failure is not None), None)
        if found is None:
            return
        rank, failure = found
        if rank == self.rank and mine is not None:
            raise mine if self.is_first else _quiet(mine)
        text = failure.text if rank == 0 else f"process {rank} of {self.size}: {failure.text}"
        raise Elsewhere(text, failure.exit_code, quiet=not self.is_first) from mine

    def first(self, make: Callable[[], T]) -> T:
        found: list[Any] = self.gather(make if self.is_first else _nothing)
        return found[0]

    def total(self, make: Callable[[], Tensor]) -> Tensor:
        return torch.stack(self.gather(make)).sum(0)

    def sum_(self, tensor: Tensor) -> None:
        with self.connected():
            dist.all_reduce(tensor)

    def spread_(self, tensors: Sequence[Tensor]) -> None:
        with self.connected():
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def require_equal(self, what: str, tensors: Sequence[Tensor]) -> None:
        found = self.gather(lambda: fingerprint(tensors))
        other = next((rank for rank, value in enumerate(found) if value != found[0]), None)
        if other is not None:
            text = f"{what} differ between process 0 and process {other} of {self.size}, which must never be"
            raise Elsewhere(f"{text}: they are not saved; the last checkpoint is as it was", 1, not self.is_first)

    def collect(self, tensor: Tensor) -> list[Tensor]:
        """Everybody's tensor, of one shape and on the CPU, in their order; nothing on others than the first."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.is_first else None
        with self.connected():
            dist.gather(tensor.contiguous(), parts, dst=0, group=self._words)
        return parts or []

    def exchange(self, word: T) -> list[T]:
        """What every rank has to say, in their order."""
        words: list[Any] = [None] * self.size
        with self.connected():
            dist.all_gather_object(words, word, group=self._words)
        return words

    @contextmanager
    def patient(self) -> Iterator[None]:
        before, self._words = self._words, self._patient
        try:
            yield
        finally:
            self._words = before

    @property
    def words(self) -> Any:
        """The processes as torch.distributed knows them, by gloo: for what it does itself."""
        return self._words

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Within the block an error of the connection is `Lost`."""
        try:
            yield
        except RuntimeError as error:  # gloo's and NCCL's own, and what torch makes of them
            raise self.lost(error) from error

    def lost(self, error: RuntimeError) -> Lost:
        """What an error of the connection means: who is gone."""
        gone = self._who_is_gone()
        named = f"process {', '.join(map(str, gone))} of {self.size}" if gone else f"one of {self.size} processes"
        why = f"did not answer for {self._timeout:g} s" if "imed out" in str(error) else "is gone"
        lost = Lost(f"{named} {why}, and this run with it; the last checkpoint is as it was: welltuned resume goes on")
        # One speaks for those that are left.
        lost.quiet = self.rank != min(rank for rank in range(self.size) if rank not in gone)
        return lost

    def speak(self, error: WelltunedError) -> None:
        """Make an error that all ranks came to by themselves quiet on all but the first."""
        with suppress(RuntimeError):
            store = dist.distributed_c10d._get_default_store()
            if self.is_first:
                store.set("welltuned/said", str(error))
            elif not error.quiet:
                store.wait(["welltuned/said"], REPORTING)
                error.quiet = store.get("welltuned/said").decode() == str(error)

    def _who_is_gone(self) -> list[int]:
        """Those that do not come here as well; empty where that cannot be found out."""
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(f"welltuned/left/{self.rank}", "1")
            gone = []
            for rank in range(self.size):
                try:
                    store.wait([f"welltuned/left/{rank}"], REPORTING)
                except RuntimeError:
                    gone.append(rank)
            return gone
        except RuntimeError:
            return []


def _nothing() -> None:
    """What ranks beside the first have to give."""


def _quiet(error: Exception) -> Exception:
    """The same, that the first rank tells."""
    if isinstance(error, WelltunedError):
        error.quiet = True
    return error


def fingerprint(tensors: Sequence[Tensor]) -> str:
    """A hash of tensors' bits, made of two sums where they lie: nothing is copied to the host.

    Sums of 64 bits that wrap around, of the numbers' bits and of the same times their places' odd numbers: a change of
    any one number changes both.
    """
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        flat = tensor.detach().contiguous().view(-1)
        bits = flat if flat.dtype is torch.uint8 else flat.view(torch.int32)
        sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
        for start in range(0, len(bits), CHUNK):
            piece = bits[start : start + CHUNK].long()
            places = torch.arange(start, start + len(piece), device=bits.device) * 2 + 1
            sums += torch.stack([piece.sum(), (piece * places).sum()])
        found.update(repr((tuple(tensor.shape), sums.tolist())).encode())
    return found.hexdigest()


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started this process among; `ALONE` where it started none.

    Raises:
        InputError: there are more of them here than GPUs. RunError: they do not find each other.
    """
    launched = launch()
    if launched.size == 1:
        yield ALONE
        return
    timeout = _timeout()
    backend = "gloo"
    if torch.cuda.is_available():
        if launched.local_rank >= torch.cuda.device_count():
            what = f"{launched.here} processes share {torch.cuda.device_count()} GPUs"
            raise InputError(what, where="torchrun --nproc-per-node", mend="start one process for each GPU")
        torch.cuda.set_device(launched.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        ranks = Group(launched, timeout)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"the {launched.size} processes do not find each other ({reason})") from error
    try:
        yield ranks
    except WelltunedError as error:
        ranks.speak(error)
        raise
    dist.destroy_process_group()  # not after an error: it would wait for those that are gone


def _timeout() -> float:
    given = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(given) if given else USUAL_TIMEOUT
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < PATIENCE.total_seconds():
        raise InputError(f"{given!r} is no number of seconds", where=TIMEOUT, mend="give one above 0, such as 600")
    return seconds
