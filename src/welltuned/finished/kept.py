"""Evaluations kept beside what they judged, one numbered file each: none is ever written over."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from welltuned.training import durable
from welltuned.training.identity import versions
from welltuned.training.rundir import EVALUATIONS, finite

FORMAT = 1


def keep(folder: Path, document: Mapping[str, Any]) -> Path:
    """Write an evaluation (judge.to_json) beneath a Run, or another folder; where it lies.

    Raises:
        OSError: it cannot be written.
    """
    place = folder / EVALUATIONS
    place.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.stem) for path in place.glob("*.json") if path.stem.isdigit()]
    path = place / f"{max(numbers, default=0) + 1}.json"
    kept = {"format": FORMAT, "time": time.time(), "versions": versions(), **finite(document)}
    durable.replace_file(path, json.dumps(kept, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path
