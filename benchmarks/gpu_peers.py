"""TRL and Unsloth in the GPU benchmark: child processes of pythons that have them, on the same weights and rows.

Each is at its best flags, with checkpointing off: see peers/trl_gpu.py and peers/unsloth_gpu.py. One process has a tune
and a rank: it loads the model once and measures every kind of rows, an update a step, from before the first micro-batch
to after the optimizer; laying out batches and logging are not counted. It measures the matrix ceiling itself.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gpu_scale import FAILED, NO_TIME, Scale, free_memory
from gpu_systems import ALPHA, build_model
from transformers import PreTrainedModel

from welltuned.data.render import Example

if TYPE_CHECKING:
    from gpu_speed import Cell

SCRIPTS = Path(__file__).parent / "peers"
NAMES = {"trl": "TRL", "unsloth": "Unsloth"}
NOT_GIVEN = "not given"
LOADING = 45.0  # seconds of a child's share that are for imports, 16 GB from the disk and first updates
LEAST = 60.0  # below so many seconds a child is not worth starting on a GPU


def peer_options(parser: argparse.ArgumentParser) -> None:
    for name, shown in NAMES.items():
        parser.add_argument(f"--{name}-python", help=f"python of an environment with {shown}")


@dataclass(slots=True)
class Peers:
    """The pythons by peer, None where none was given, and the folder in which the model waits for them."""

    pythons: Mapping[str, str | None]
    folder: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)
    losses: dict[tuple[str, str], float] = field(default_factory=dict)  # ours, by tune and rows
    _saved: bool = False

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Peers":
        return cls({name: vars(options)[f"{name}_python"] for name in NAMES})

    @classmethod
    def none(cls) -> "Peers":
        """No peer is asked for: there is no cell of one."""
        return cls({})

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()

    @property
    def given(self) -> bool:
        return any(self.pythons.values())

    def remember(self, cells: Sequence["Cell"]) -> None:
        """Our loss before the first update, which is a peer's too: B is zero."""
        for cell in cells:
            if cell.loss is not None:
                self.losses[cell.tune, cell.rows] = cell.loss

    def save_model(self, scale: Scale, model: PreTrainedModel | None) -> None:
        """Leave dense weights and a tokenizer in the folder; without a model the same weights are made again."""
        if self._saved:
            return
        whole = model if model is not None else build_model(scale.shape, scale.dtype, scale.device, nf4=False)
        whole.save_pretrained(self.folder.name)
        tokenizer(scale.shape["vocab_size"]).save_pretrained(self.folder.name)
        self._saved = True
        del whole
        free_memory(scale)

    def measure(
        self,
        scale: Scale,
        tune: str,
        rank: int,
        rows: Mapping[str, list[Example]],
        cells: Sequence["Cell"],
        left: float,
    ) -> Iterator[list["Cell"]]:
        """For every kind of rows a cell of each peer.

        Args:
            cells: one for each kind, to be filled in. left: seconds for all of them.
        """
        if not self.pythons:
            return
        found: dict[str, list[Cell]] = {kind: [] for kind in rows}
        given = sum(1 for python in self.pythons.values() if python)
        for name, python in self.pythons.items():
            own = [replace(cell, system=NAMES[name], ceilings=[], seconds=[], flags={"given": False}) for cell in cells]
            if python is None:
                told: dict[str, Any] = {"problem": NOT_GIVEN}
            elif scale.cuda and left / given < LEAST:
                told = {"problem": NO_TIME}
            else:
                told = self._child(scale, name, python, tune, rank, rows, left / given)
            for cell, kind in zip(own, rows, strict=True):
                self._fill(cell, told)
                found[kind].append(cell)
        yield from found.values()

    def _child(
        self, scale: Scale, name: str, python: str, tune: str, rank: int, rows: Mapping[str, list[Example]], left: float
    ) -> dict[str, Any]:
        """The result of one process; a problem where it has none."""
        spec = spec_of(scale, self.folder.name, tune, rank, rows, max(1.0, (left - LOADING) / len(rows)))
        with tempfile.TemporaryDirectory() as place:  # Unsloth writes a cache where it stands
            path = Path(place) / "spec.json"
            path.write_text(json.dumps(spec), encoding="utf-8")
            command = [python, str(SCRIPTS / f"{name}_gpu.py"), str(path)]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, cwd=place, timeout=max(left, LEAST), check=False
                )
            except subprocess.TimeoutExpired:
                return {"problem": f"{FAILED}: it had not ended after {max(left, LEAST):.0f} s"}
            except OSError as error:
                return {"problem": f"{FAILED}: {python}: {error.strerror}"}
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr)
            return {"problem": f"{FAILED}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"}
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return result

    def _fill(self, cell: "Cell", told: Mapping[str, Any]) -> None:
        cell.problem = told.get("problem")
        if cell.problem is not None:
            return
        job = next(job for job in told["jobs"] if job["rows"] == cell.rows)
        cell.flags, cell.ceilings = {**told["flags"], "versions": told["versions"]}, told["ceilings"]
        cell.seconds, cell.loss, cell.peak_bytes = job["seconds"], job["loss"], job["peak_bytes"]
        cell.budget, cell.problem = job.get("budget"), job["problem"]
        ours = self.losses.get((cell.tune, cell.rows))
        if cell.loss is not None and ours is not None and abs(cell.loss - ours) > 0.01 * ours:
            cell.problem = f"its first loss is {cell.loss:.4f} and ours {ours:.4f}: it computes something else"


def spec_of(
    scale: Scale, model: str, tune: str, rank: int, rows: Mapping[str, list[Example]], seconds: float
) -> dict[str, Any]:
    """What a child is told. Labels are the tokens themselves, -100 where a token is not trained on."""
    jobs = [
        {
            "rows": kind,
            "ids": [row.ids.tolist() for row in examples],
            "labels": [np.where(row.mask, row.ids, -100).tolist() for row in examples],
        }
        for kind, examples in rows.items()
    ]
    return {
        "model": model,
        "device": scale.device,
        "dtype": str(scale.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "tune": tune,
        "rank": rank,
        "alpha": ALPHA,
        "jobs": jobs,
        "budgets": list(scale.budgets),
        "product": scale.product,
        "updates": scale.updates,
        "seconds": seconds,
    }


def tokenizer(vocabulary: int) -> Any:
    """Of so many words; rows come as tokens, so it is only asked for its end and its padding."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    plain = Tokenizer(WordLevel(words, unk_token="<end>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<end>", bos_token="<end>", unk_token="<end>"
    )
