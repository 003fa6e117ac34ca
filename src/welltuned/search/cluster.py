"""A search over several machines: Ray starts the workers and starts them again where one is lost; each has a bank.

Every decision is made here, from the same board as in one process. What Ray needs is that a worker can be told the same
thing twice (`worker`), and a folder that all machines see.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from welltuned.adapters.verify import TensorCheck
from welltuned.advice.codec import from_plain
from welltuned.errors import InputError, RunError
from welltuned.facts.machine import Device
from welltuned.objectives.supervised import supervised_tokens
from welltuned.recipe import Method
from welltuned.search.asked import write_asked
from welltuned.search.board import Board
from welltuned.search.events import ArmUpdated, SearchEvent, SearchObserver, line_of
from welltuned.search.result import Course, SweepResult, write_result
from welltuned.search.state import ArmState, State, Status
from welltuned.search.sweep import Begun, require_room
from welltuned.search.worker import WORKERS, Answer, Ended, Order, Worker
from welltuned.training import durable
from welltuned.training.events import Note
from welltuned.training.identity import identity_of
from welltuned.training.interrupt import Asked as Signals
from welltuned.training.interrupt import Interrupted, interruptible
from welltuned.training.result import RunResult, disk_errors
from welltuned.training.run import begin
from welltuned.training.rundir import ADAPTER, RunDir, read_started
from welltuned.training.step import Evaluation

STATE = "search.json"  # where the search is, beside the workers' checkpoints
LOST = 3  # times that a worker may be lost
LOST_WORKER = f"a worker was lost {LOST + 1} times; its checkpoints are kept: go on with `welltuned resume`"
PATIENCE = 60.0  # seconds after which it is told that a worker has not begun
POLL = 1.0  # seconds between two questions how far the workers are
LOCAL = "local"
STORE = 256 << 20  # bytes of Ray's own memory: only plain values travel
LOCAL_WORKERS = 2  # where there is no GPU


def sweep_on_cluster(search: Begun, out: Path, observer: SearchObserver) -> SweepResult:
    """As `sweep`, with the arms spread over a Ray cluster."""
    _require_ray()
    with closing(RunDir(out.resolve())) as directory, disk_errors(out):
        write_asked(directory, search.asked)
        begin(directory, search.prepared, identity_of(search.prepared))
        return go_on(search, directory, observer, ())


def go_on(search: Begun, directory: RunDir, observer: SearchObserver, notes: Sequence[str]) -> SweepResult:
    """A search over a cluster from where it is: from its state, or from the start."""
    _require_ray()
    # Ray takes the signals for itself when it starts, so that ours come after.
    with _connected(search) as count, interruptible() as signals, disk_errors(directory.path):
        require_room(search.prepared.plan, math.ceil(search.most_arms / count))
        course = Spread(search, directory, observer, signals, count)
        for text in (*notes, *course.begin()):
            course.tell(Note(text))
        try:
            return course.run()
        except BaseException:
            course.save()
            raise
        finally:
            course.close()


def _require_ray() -> None:
    if find_spec("ray") is None:
        raise InputError("Ray is not installed", where="--ray", mend="pip install 'welltuned[ray]', or leave --ray out")


@contextmanager
def _connected(search: Begun) -> Iterator[int]:
    """Within the block Ray is there; how many workers it is to have. A connection of the caller's own stays."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    import ray

    address, ours = search.asked.ray, not ray.is_initialized()
    if ours:
        try:
            ray.init(
                address=None if address == LOCAL else address,
                include_dashboard=False if address == LOCAL else None,
                object_store_memory=STORE if address == LOCAL else None,
                num_cpus=max(search.asked.workers or LOCAL_WORKERS, os.cpu_count() or 1) if address == LOCAL else None,
                log_to_driver=False,
                logging_level="ERROR",
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            what = f"there is no Ray cluster at {address} ({' '.join(str(error).split())[:200]})"
            mend = "start one with `ray start`, or use --ray local (of a search that goes on: `ray` in its sweep.json)"
            raise InputError(what, where="--ray", mend=mend) from error
    try:
        yield _workers(search)
    finally:
        if ours:
            ray.shutdown()


def _workers(search: Begun) -> int:
    """One a GPU, or where the plan has none one a machine; never more than arms."""
    import ray

    wanted = search.asked.workers
    if wanted is None:
        machines = len([node for node in ray.nodes() if node["Alive"]])
        wanted = machines if search.asked.ray != LOCAL else LOCAL_WORKERS
        if search.prepared.plan.facts.machine.device is Device.CUDA:
            wanted = int(ray.cluster_resources().get("GPU", 0))
            if not wanted:
                raise InputError("the plan is for GPUs, and the cluster has none", where="--ray")
    if wanted < 1:
        raise InputError(f"{wanted} workers can do nothing", where="--workers", mend="give 1 or more")
    return min(wanted, len(search.arms))


class Spread:
    """The board, and workers that make its rounds.

    Attributes:
        of: which worker has an arm. parts: the arms that each worker began with.
    """

    def __init__(self, search: Begun, directory: RunDir, observer: SearchObserver, signals: Signals, count: int):
        self.search, self.directory, self._observer, self._signals = search, directory, observer, signals
        prepared = search.prepared
        is_sft = prepared.recipe.method is Method.SFT
        weights = [supervised_tokens(row) if is_sft else 1 for row in prepared.held_out]
        self.board = Board(prepared.plan, search.arms, weights, search.rules, self.tell)
        numbers = [arm.number for arm in search.arms]
        self.parts = [numbers[i * len(numbers) // count : (i + 1) * len(numbers) // count] for i in range(count)]
        self.of = {number: i for i, part in enumerate(self.parts) for number in part}
        self.run_id = read_started(directory.path).run
        self._elapsed, self._clock = 0.0, time.monotonic()
        self._said: set[str] = set()
        self._workers: list[Any] = []
        self._asking: dict[int, Any] = {}
        self._heard: set[int] = set()

    def tell(self, event: SearchEvent) -> None:
        """To the Run's files, and to the observer."""
        if isinstance(event, Note):
            self.directory.record(event)
        else:
            self.directory.record_line(line_of(event))
        self._observer(event)

    # ── where it is ──────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self) -> list[str]:
        """Read the state that an earlier process left, where one did, and start the workers; what is to be said."""
        path = self.directory.path / STATE
        said = []
        if path.is_file():
            plain = json.loads(path.read_text(encoding="utf-8"))
            self.board.restore(State.from_json(plain["state"]))
            self.parts, self.of = plain["parts"], {int(number): i for number, i in plain["of"].items()}
            self._elapsed = plain["elapsed"]
            self.directory.cut_metrics(plain["metrics_bytes"])
            self.board.introduce(self._observer)
            alive = len(self.board.state.alive)
            said.append(f"goes on with {alive} arms on their way to {self.board.share_now:.0%} of their runs")
        else:
            self.directory.cut_metrics(0)
            for text in self.search.said:  # the observer has heard it
                self.directory.record(Note(text))
            said += self.search.prepared.notes
            for number in self.board.arms:
                self.board.tell_arm(number)
        self._start()
        counts = " and ".join(str(len(part)) for part in self.parts)
        return [*said, f"{len(self.parts)} workers of a Ray cluster begin with {counts} arms"]

    def _start(self) -> None:
        import ray

        gpu = self.search.prepared.plan.facts.machine.device is Device.CUDA
        on_one = len(self.parts) if self.search.asked.ray == LOCAL else 1
        threads = None if gpu or on_one == 1 else max(1, len(os.sched_getaffinity(0)) // on_one)
        made = ray.remote(
            max_restarts=LOST, max_task_retries=LOST, max_concurrency=2, num_cpus=1, num_gpus=int(gpu),
            scheduling_strategy="SPREAD",
        )(Worker)  # fmt: skip
        path = str(self.directory.path)
        self._workers = [made.remote(path, i, part, threads) for i, part in enumerate(self.parts)]

    def close(self) -> None:
        """End the workers."""
        import ray

        for worker in self._workers:
            ray.kill(worker)

    def since_start(self) -> float:
        return self._elapsed + time.monotonic() - self._clock

    def save(self) -> None:
        """Where the search is: all but what the workers keep."""
        self.directory.sync_metrics()
        plain = {
            "state": self.board.state.to_json(),
            "parts": self.parts,
            "of": self.of,
            "elapsed": self.since_start(),
            "metrics_bytes": self.directory.metrics_bytes,
        }
        self.directory.write(STATE, json.dumps(plain))  # with NaN and infinities, which diverged arms have

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> SweepResult:
        """Work until one arm is chosen and trained to its end, and write its Run.

        Raises:
            RunError: every arm diverged, or a worker was lost too often. Interrupted: the user ended it, after a save.
        """
        while not self.board.state.ended:
            self._advance()
            if not self.board.state.alive:
                raise RunError("every arm diverged; lower learning_rate in the recipe, or look at the rows")
            for number in self.board.judge(self.since_start()):
                self.of[number] = self._place(number)
            self.save()
        if self.board.last_decision is None:  # it went on after its last decision
            self.board.last_decision = self.board.decide()
        return self._finish()

    def _place(self, number: int) -> int:
        """The worker of a new arm: the one with the fewest that are alive."""
        alive = [self.of[arm.number] for arm in self.board.state.alive if arm.number != number]
        return min(range(len(self.parts)), key=lambda i: (alive.count(i), i))

    def _advance(self) -> None:
        """Have every worker train its arms to the next look, and take what they found."""
        while any(self.board.due(arm) is not None for arm in self.board.state.alive):
            orders = {}
            for i in range(len(self.parts)):
                mine = [arm for arm in self.board.state.alive if self.of[arm.number] == i]
                if any(self.board.due(arm) is not None for arm in mine):
                    arms = tuple((arm.number, dict(arm.settings)) for arm in mine)
                    orders[i] = Order(target=self.board.state.target, arms=arms)
            answers = self._carried_out(orders)
            looks = {look for answer in answers for look in self._take(answer)}
            for share in sorted({share for share, _ in looks}):
                self.board.tell_looks(sorted(number for at, number in looks if at == share), share)
            self.save()

    def _carried_out(self, orders: Mapping[int, Order]) -> list[Answer]:
        """Every worker's answer; until then what they do is told."""
        import ray

        waiting = [self._workers[i].advance.remote(order) for i, order in orders.items()]
        left, asked = list(waiting), False
        while left:
            _, left = ray.wait(left, num_returns=len(left), timeout=POLL)
            self._news(orders)
            if self._signals.number is not None and not asked:
                asked = True
                for i in orders:
                    self._workers[i].stop.remote(self._signals.number)
        answers = [_got(ref) for ref in waiting]
        self._news(orders, surely=True)
        for answer in answers:
            if answer.error is not None:
                raise RunError(answer.error)
        if asked or any(answer.interrupted for answer in answers):
            number = self._signals.number or 0
            run = self.directory.path
            text = f"ended by {self._signals.name}; the workers have saved; go on with: welltuned resume {run}"
            raise Interrupted(number, text)
        return answers

    def _news(self, orders: Mapping[int, Order], *, surely: bool = False) -> None:
        """Tell what workers did since they were asked last. One that is just being lost is asked again later."""
        import ray

        for i in orders:
            asked = None if surely else self._asking.pop(i, None)
            if asked is None:
                known = {arm.number: arm.step for arm in self.board.state.arms if self.of.get(arm.number) == i}
                asked = self._workers[i].news.remote(known)
            if not surely and not ray.wait([asked], timeout=POLL)[0]:  # it loads, or was lost and begins again
                self._asking[i] = asked
                if i not in self._heard and time.monotonic() - self._clock > PATIENCE:
                    self._heard.add(i)
                    self.tell(Note(f"worker {i} has not begun yet: it loads, or the cluster has no room for it"))
                continue
            self._heard.add(i)
            lines, notes = _got(asked)
            for text in notes:
                if text not in self._said:
                    self._said.add(text)
                    self.tell(Note(text))
            for line in lines:
                if line["step"] > self.board.of(line["arm"]).step:  # else told in the meantime
                    self._told(line)

    def _told(self, line: Mapping[str, Any]) -> None:
        arm = self.board.of(line["arm"])
        total = self.board.arms[arm.number].plan.updates
        names = ("learning_rate", "grad_norm", "tokens", "supervised_tokens")
        counted = {name: line[name] for name in names}
        step = line["step"]
        event = ArmUpdated(arm=arm.number, step=step, total_steps=total, share=step / total,
                           loss=line["arm_loss"], **counted)  # fmt: skip
        self.board.state = self.board.state.with_arm(replace(arm, step=step, tokens=arm.tokens + line["tokens"]))
        self.tell(event)

    def _take(self, answer: Answer) -> set[tuple[float, int]]:
        """An answer into the board: what its arms came to. The looks that are new: share and arm."""
        found = set()
        for plain in answer.arms:
            theirs = from_plain(ArmState, plain)
            ours = self.board.of(theirs.number)
            known = ours.looks[-1].share if ours.looks else 0.0
            merged = replace(theirs, looks=ours.looks, status=ours.status, why=ours.why)
            self.board.state = self.board.state.with_arm(merged)
            for look in theirs.looks:
                if look.share > known:
                    self.board.looked(theirs.number, look.share, look.loss_of_row, answer.eval_tokens)
                    found.add((look.share, theirs.number))
            if theirs.status is Status.DIVERGED and self.board.of(theirs.number).alive:
                self.board.end(theirs.number, Status.DIVERGED, theirs.why)
        return found

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _finish(self) -> SweepResult:
        winner = self.board.state.winner
        assert winner is not None
        i = self.of[winner]
        ended: Ended = _got(self._workers[i].finish.remote(winner))
        if ended.error is not None or ended.summary is None:
            raise RunError(ended.error or "the winner's adapter could not be written")
        path = self.directory.path
        if (path / ADAPTER).is_dir():
            durable.remove_folder(path / ADAPTER)
        durable.settle_folder(Path(ended.folder) / ADAPTER, path / ADAPTER)
        seconds, tokens = self.since_start(), sum(arm.tokens for arm in self.board.state.arms)
        course = Course(
            seconds=seconds,
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            token_budget=ended.token_budget,
            saving=ended.saving or {},
            told=(*self.search.said, f"trained by {len(self.parts)} workers of a Ray cluster"),
        )
        result = RunResult(
            path=path,
            engine=None,
            updates=ended.updates,
            before=_evaluation(ended.before),
            after=_evaluation(ended.after),
            checks=tuple(TensorCheck(**check) for check in ended.checks),
            seconds=seconds,
            tokens_per_second=course.tokens_per_second,
            peak_memory=ended.peak_memory,
        )
        took = {"seconds": round(seconds, 1), "tokens_per_second": round(course.tokens_per_second, 1)}
        made = result, {**ended.summary, **took}
        found = write_result(
            self.search.asked, self.board, self.search.prepared, self.directory, made, course, self.run_id
        )
        durable.remove_folder(path / WORKERS)
        (path / STATE).unlink()
        return found


def _got(ref: Any) -> Any:
    """What a worker gives.

    Raises:
        RunError: it was lost once too often.
    """
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayActorError as error:
        raise RunError(LOST_WORKER) from error


def _evaluation(plain: Mapping[str, Any] | None) -> Evaluation | None:
    if plain is None:
        return None
    found = from_plain(Evaluation, plain)
    assert isinstance(found, Evaluation)
    return found
