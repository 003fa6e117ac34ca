"""One run on the machines of a Ray cluster, begun again from its last checkpoint when a worker is lost.

    python examples/on_ray.py --workers 8 --gpus 1 --out /shared/runs/first -- sft.yaml --set r=32

Ray starts the processes and notices when one is gone; what they do together is welltuned's own (docs/many_gpus.md).
What follows `--` are the options of `welltuned train`. The Run, the model and the rows must lie where every machine
sees them. A run that a worker's death ended goes on with `welltuned resume`, up to `--restarts` times; one that failed
by itself, or that was given wrong input, is not tried again.
"""

import argparse
import os
import socket
import sys
import time
from collections import Counter
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

LOST = "lost"  # in the place of an exit code: the worker is gone
PATIENCE = 90  # seconds that the others have to end by themselves once one has failed


@ray.remote(max_restarts=0)
class Worker:
    """One process of the run."""

    def place(self) -> tuple[str, int, int]:
        """Its machine's address, a port that is free there, and its process id."""
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1], os.getpid()

    def run(self, environment: dict[str, str], words: list[str]) -> int:
        """`welltuned WORDS` in this process; its exit code."""
        os.environ.update(environment)
        from welltuned.cli.main import main

        return main(words)


def attempt(workers: int, gpus: float, words: list[str]) -> int | str:
    """Start the processes and wait for them: the first exit code that is not 0, or `LOST`."""
    resources = {"CPU": 1, **({"GPU": gpus} if gpus else {})}
    group = placement_group([resources] * workers, strategy="PACK")
    ray.get(group.ready())
    try:
        bundles = [
            PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=rank)
            for rank in range(workers)
        ]
        placed = [Worker.options(num_cpus=1, num_gpus=gpus, scheduling_strategy=b).remote() for b in bundles]
        places = ray.get([worker.place.remote() for worker in placed])
        here = Counter(address for address, _, _ in places)
        before: Counter[str] = Counter()
        running = []
        for rank, (worker, (address, _, number)) in enumerate(zip(placed, places, strict=True)):
            print(f"process {rank} of {workers}: number {number} on {address}", flush=True)
            environment = {
                "RANK": rank,
                "WORLD_SIZE": workers,
                "LOCAL_RANK": 0 if gpus else before[address],  # Ray shows each process its own GPU alone
                "LOCAL_WORLD_SIZE": here[address],
                "MASTER_ADDR": places[0][0],
                "MASTER_PORT": places[0][1],
            }
            before[address] += 1
            running.append(worker.run.remote({name: str(value) for name, value in environment.items()}, words))
        return outcome(running)
    finally:
        remove_placement_group(group)  # ends what is left of them


def outcome(running: list[ray.ObjectRef]) -> int | str:
    """0 once all have ended well; else why not. A worker that is lost comes before what the others say of it."""
    codes: list[int | str] = []
    until: float | None = None
    while running:
        done, running = ray.wait(running, timeout=None if until is None else max(0.0, until - time.monotonic()))
        for reference in done:
            try:
                codes.append(ray.get(reference))
            except RayError:
                codes.append(LOST)
        if until is None and any(code != 0 for code in codes):
            until = time.monotonic() + PATIENCE
        if not done:
            break
    return LOST if LOST in codes else next((code for code in codes if code != 0), 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, required=True, help="how many processes share the run")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs for each of them; 0 trains on processors")
    parser.add_argument("--out", required=True, help="the Run directory, where every machine sees it")
    parser.add_argument("--restarts", type=int, default=3, help="how often a lost worker is made up for")
    parser.add_argument("--cpus", type=int, help="processors of a local cluster; unset: all")
    parser.add_argument("--address", help="the cluster; without it a local one is started, or RAY_ADDRESS is used")
    parser.add_argument("train", nargs="+", help="options of `welltuned train`, after --")
    asked = parser.parse_args()
    address = asked.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        ray.init(address="local", num_cpus=asked.cpus, include_dashboard=False)
    else:
        ray.init(address=address)
    out = Path(asked.out).absolute()
    for number in range(asked.restarts + 1):
        begun = (out / "started.json").is_file()
        words = ["resume", str(out)] if begun else ["train", *asked.train, "--out", str(out)]
        code = attempt(asked.workers, asked.gpus, words)
        if code != LOST:
            return int(code)
        print(f"a worker was lost (attempt {number + 1} of {asked.restarts + 1})", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
