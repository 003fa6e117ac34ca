"""Which cells lr_law.py measures."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cell:
    dataset: str
    updates: int
    batch: int
    r: int = 16
    alpha: float = 16.0
    seed: int = 3407

    @property
    def name(self) -> str:
        return f"{self.dataset}/u{self.updates}/b{self.batch}/r{self.r}/a{self.alpha:g}/s{self.seed}"


CPU_CELLS = (
    Cell("gsm8k", 30, 4),
    Cell("gsm8k", 120, 1),
    Cell("gsm8k", 30, 16),
    Cell("gsm8k", 120, 4),
    Cell("tickets", 30, 4),
    Cell("gsm8k", 30, 4, seed=1),
    Cell("gsm8k", 30, 4, alpha=64.0),
    Cell("gsm8k", 480, 1),
    Cell("gsm8k", 30, 4, r=64),
    Cell("gsm8k", 10, 4),
    Cell("gsm8k", 10, 16),
    Cell("tickets", 120, 4),
    Cell("gsm8k", 120, 16),
    Cell("gsm8k", 10, 64),
    Cell("tickets", 30, 16),
    Cell("gsm8k", 480, 4),
    Cell("gsm8k", 30, 64),
)
WHOLE_CELLS = tuple(
    Cell(dataset, updates, batch, r)
    for dataset in ("gsm8k", "tickets")
    for r in (8, 64)
    for updates in (30, 120, 480)
    for batch in (4, 16, 64)
)
