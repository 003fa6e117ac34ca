"""Faults to order: a system whose n-th call of a save fails, tears or kills, and snapshots to be saved."""

import os
import traceback

import torch

from welltuned.models.lora import Slot
from welltuned.training.checkpoint import Position, Snapshot
from welltuned.training.durable import System
from welltuned.training.step import Evaluation

KILLED = 37


class Faulty(System):
    """The real system, but for one call: `act(name, do)` takes its place, and `do()` would do it."""

    def __init__(self, at=None, act=None):
        self.at, self.act = at, act
        self.calls = []

    def _do(self, name, do):
        self.calls.append(name)
        if self.at is not None and (len(self.calls) - 1 == self.at if isinstance(self.at, int) else self.at(name)):
            return self.act(name, do)
        return do()

    def open(self, path):
        return self._do("open", lambda: System.open(self, path))

    def write(self, number, data):
        def torn():
            System.write(self, number, data[: len(data) // 2])

        self.torn = torn
        return self._do("write", lambda: System.write(self, number, data))

    def fsync(self, number):
        return self._do("fsync", lambda: System.fsync(self, number))

    def rename(self, source, target):
        return self._do("rename", lambda: System.rename(self, source, target))

    def replace(self, source, target):
        return self._do("replace", lambda: System.replace(self, source, target))

    def make_folder(self, path):
        return self._do("make_folder", lambda: System.make_folder(self, path))

    def unlink(self, path):
        return self._do("unlink", lambda: System.unlink(self, path))

    def remove_folder(self, path):
        return self._do("remove_folder", lambda: System.remove_folder(self, path))


def kill_before(name, do):
    os._exit(KILLED)


def kill_after(name, do):
    do()
    os._exit(KILLED)


def failing(number):
    """The disk's error of this number, in the place of the call."""

    def act(name, do):
        raise OSError(number, os.strerror(number))

    return act


def in_child(work):
    """Run `work` in a process of its own that can be killed; its exit code."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def snapshot(step, run="a" * 16, best=None, columns=600):
    """A made-up state of two tensors."""
    numbers = torch.Generator().manual_seed(step)
    flat, first, second = (torch.randn(1, columns, generator=numbers) for _ in range(3))
    position = Position(
        step=step, token_budget=64, best=best, before=Evaluation(2.5, float("nan"), 7, (2.5,)), monitor={"seen": [step]}
    )
    return Snapshot(
        flat_KP=flat,
        exp_avg_KP=first,
        exp_avg_sq_KP=second.square(),
        steps_G=torch.tensor([float(step)]),
        slots=[Slot("a.lora_A", 0, (4, 50)), Slot("a.lora_B", 200, (40, 10))],
        position=position,
        run=run,
        metrics_bytes=100 * step,
        identity={"recipe": {"r": 4}},
        versions={"torch": "2"},
    )
