"""A search in a terminal: a line an arm, nothing cut off at 80 columns, nothing said twice."""

import io

import pytest
from rich.console import Console

from welltuned.cli import arms_view
from welltuned.search.events import ArmAdded, ArmEnded, ArmJudged, ArmUpdated
from welltuned.search.report import ArmRow, Found, Judged
from welltuned.training.events import Note


@pytest.fixture(params=[80, 120])
def screen(request, monkeypatch):
    console = Console(file=io.StringIO(), width=request.param, highlight=False)
    monkeypatch.setattr(arms_view, "console", console)
    return console


def updated(arm, step, loss=2.0):
    return ArmUpdated(arm, step, 40, step / 40, loss, 1e-3, 1.0, 100, 30)


def test_a_line_an_arm(screen):
    shown = arms_view.ArmsShown({"known"})
    for event in (
        Note("known"),
        Note("new"),
        Note("new"),
        ArmAdded(0, "1e-3, r 8", ""),
        ArmAdded(1, "2e-3, r 8", ""),
        updated(0, 8),
        updated(1, 8),
        ArmJudged(0, 8, 0.2, 1.5, 0.1, 0.02),
        ArmJudged(1, 8, 0.2, 1.4, 0.0, None),
        ArmAdded(2, "4e-3, r 8", "the edge"),
        updated(2, 8),
        ArmJudged(2, 8, 0.2, 1.3, 0.0, None),  # better than what was the best until then
        ArmEnded(0, 8, "dropped", "worse than the best by 0.2000 ± 0.0200"),
    ):
        shown(event)
    screen.print(shown._all())
    lines = screen.file.getvalue().splitlines()
    assert sum("new" in line for line in lines) == 1 and not any("known" in line for line in lines)
    assert any("4e-3, r 8 after 8 updates: held-out loss 1.3000, the best" in line for line in lines)
    table = lines[next(i for i, line in enumerate(lines) if "updates" in line and "above the best" in line) + 1 :]
    assert [line.split("  ")[1] for line in table[:3]] == ["1e-3, r 8", "2e-3, r 8", "4e-3, r 8"]
    assert "dropped" in table[0] and "+0.1000" in table[1] and "the best" in table[2]
    assert "300 tokens" not in table[3] and "all arms together" in table[3]


def test_what_was_found_fits(screen):
    def looks(level, count):
        return tuple(
            Judged(share=s, loss=level + 1 - s, above_best=0.01, above_best_se=0.002)
            for s in (0.1, 0.2, 0.4, 1.0)[:count]
        )

    rows = tuple(
        ArmRow(
            number=i, name=f"{i + 1}e-4, r 16, lora_dropout 0.05", settings={"learning_rate": (i + 1) * 1e-4},
            learning_rate=(i + 1) * 1e-4, group="", status="dropped" if i else "done",
            why="worse than the best by 0.0100 ± 0.0020, and its slope does not make up for that" if i else "",
            updates=40 if not i else 8, total_updates=40, tokens=1000, looks=looks(1.0 + i, 4 if not i else 2),
        )
        for i in range(3)
    )  # fmt: skip
    found = Found(
        rows=rows, winner=0, advised_rate=1e-4, best_rate=1e-4, best_rate_factor=1.2, regret=0.001, advised_regret=0.0,
        curve=0.1, tokens=3000, run_tokens=1000, evaluated=500, rungs=(), advice="Nothing changes.",
    )  # fmt: skip
    arms_view.print_found(found)
    text = screen.file.getvalue()
    assert all(len(line.rstrip()) <= screen.width for line in text.splitlines())
    assert "…" not in text and "1.0000" in text and "chosen" in text and text.count("dropped") == 2
    assert ("at 10%" in text) == (screen.width == 120)
    assert text.count("its slope") == 1  # two arms, one reason
