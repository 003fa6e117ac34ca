"""Runs a function in several processes that find each other as torchrun's do; no process outlives its test."""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT = 40.0  # seconds that ranks wait for each other in tests


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code (minus a signal's number), what it returned, what it wrote to stderr."""

    code: int | None
    value: Any
    said: str


def in_ranks(function, world, folder, *, limit=90.0, timeout=TIMEOUT):
    """Call `function(rank)` in `world` forked processes; what became of each. Those still alive at `limit` are killed.

    As under torchrun the store lies in a process of its own, and once one rank fails the others get SIGTERM.
    """
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    context = multiprocessing.get_context("fork")
    folder.mkdir(parents=True, exist_ok=True)
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(function, rank, world, store.port, folder, theirs, timeout))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    values = _watched(processes, pipes, limit)
    ended = []
    for rank, process in enumerate(processes):
        said = (folder / f"stderr-{rank}").read_text() if (folder / f"stderr-{rank}").is_file() else ""
        ended.append(Ended(process.exitcode, values[rank], said))
    return ended


def _watched(processes, pipes, limit):
    started, told, values = time.monotonic(), False, [None] * len(processes)
    while any(process.is_alive() for process in processes):
        time.sleep(0.02)
        for rank, pipe in enumerate(pipes):
            with suppress(EOFError, OSError):
                if pipe.poll():
                    values[rank] = pipe.recv()
        failed = any(process.exitcode not in (None, 0) for process in processes)
        if failed and not told:
            told = True
            for process in processes:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGTERM)
        if time.monotonic() - started > limit:
            for process in processes:
                if process.is_alive():
                    process.kill()
    for rank, pipe in enumerate(pipes):
        with suppress(EOFError, OSError):
            if pipe.poll():
                values[rank] = pipe.recv()
    for process in processes:
        process.join()
    return values


def _rank(function, rank, world, port, folder, pipe, timeout):
    number = os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(number, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    names |= {"WELLTUNED_TIMEOUT": timeout}
    os.environ.update({name: str(value) for name, value in names.items()})
    code = 1
    try:
        pipe.send(function(rank))
        code = 0
    except BaseException as error:
        if not getattr(error, "quiet", False):
            print(f"welltuned: {error}", file=sys.stderr)
            if not hasattr(error, "exit_code"):
                traceback.print_exc()
        code = getattr(error, "exit_code", 1)
    finally:
        sys.stderr.flush()
        pipe.close()
        os._exit(code)


def trained(out: Path, **options):
    """A function for `in_ranks` that trains, with nothing but its losses told."""
    import welltuned
    from welltuned.training.events import Updated

    def train(rank):
        losses = []

        def observer(event):
            if isinstance(event, Updated):
                losses.append(event.loss)

        result = welltuned.train(out=out, observer=observer, **options)
        return losses, result.after.loss if result.after is not None else None

    return train


def resumed(run: Path):
    """A function for `in_ranks` that goes on with a run."""
    import welltuned

    def resume(rank):
        return welltuned.resume(run).updates

    return resume


def finished(ended):
    assert [e.code for e in ended] == [0] * len(ended), "\n".join(e.said for e in ended)
    return ended
