"""Makes tests/training/run-format-1: an unfinished run as this version leaves it, to be gone on with by later ones.

    cd PLACE && python .../tests/training/make_old_run.py

PLACE holds `model`, a tiny model, and `rows.jsonl`; the run is written to PLACE/run. Only for a new format: a fixture
that exists is never written again.
"""

import os
from contextlib import suppress
from pathlib import Path

import welltuned
from welltuned.training.events import Updated


class CutOff(Exception):
    """As by a kill."""


def main() -> None:
    def observer(event):
        if isinstance(event, Updated) and event.step == 5:
            raise CutOff

    options = dict(effective_batch_size=16, max_steps=8, r=2, learning_rate=2e-2, save_steps=4, eval_steps=4)
    with suppress(CutOff):
        welltuned.train(model="model", data="rows.jsonl", out="run", observer=observer, lora_dropout=0.1, **options)
    path = Path("run", "started.json")
    path.write_text(path.read_text().replace(os.getcwd(), "PLACE"))


if __name__ == "__main__":
    main()
