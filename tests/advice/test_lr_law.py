"""benchmarks/lr_law.py: what it trains, and in which order it tries rates."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def law():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield importlib.import_module("lr_law")


@pytest.fixture(scope="module")
def trained(law, tiny_model_dir, rows, tiny_tokenizer):
    """A function (rates, seed) -> held-out losses [K, rows], of a cell of 6 updates of 5 rows."""
    from welltuned.data.conversation import Conversation, Message
    from welltuned.data.render import render_all
    from welltuned.models.fuse import find_head, fuse
    from welltuned.models.load import load_model
    from welltuned.models.lora import LoraSettings, attach
    from welltuned.models.packed import packed_model

    chats = [Conversation([Message(**m) for m in row["messages"]], origin=str(i)) for i, row in enumerate(rows)]
    examples = render_all(chats, tiny_tokenizer).examples
    model = load_model(str(tiny_model_dir), dtype=torch.float32)
    head = find_head(model)

    def run(rates, budget=200):
        bank = attach(model, [LoraSettings(r=4, lora_alpha=16)] * len(rates))
        fused = fuse(model, bank)
        try:
            with packed_model(model):
                trainee = law.Trainee(bank, head, budget * len(rates))
                rows = law.Rows(examples[20:], examples[:20])
                found, tokens = law.train_cell(trainee, rows, law.Cell("tiny", 6, 5, r=4), rates)
        finally:
            fused.undo()
            bank.detach()
        assert tokens == sum(len(examples[20 + i].ids) for i in order(law, len(examples) - 20))
        return found

    return run


def order(law, rows):
    mixture = law.Mixture((rows,), (rows,), law.Cell("tiny", 6, 5).seed)
    return [i for step in range(6) for i in mixture.update(5, step)]


def test_rates_trained_at_once_are_those_trained_one_by_one(trained):
    rates = [1e-3, 2e-2, 0.1]
    together = trained(rates)
    singly = torch.cat([trained([rate]) for rate in rates])
    torch.testing.assert_close(together, singly, rtol=2e-4, atol=2e-4)
    assert (together[0] - together[1]).abs().max() > 0.05, "the rate must matter, or the comparison shows nothing"


def test_a_run_that_diverges_leaves_the_others_alone(trained):
    together = trained([1e-3, 1e30])
    assert torch.isfinite(together[0]).all() and not torch.isfinite(together[1]).all()
    torch.testing.assert_close(together[:1], trained([1e-3]), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("best", [-3, 0, 4])
@pytest.mark.parametrize("guess", [-1, 0, 3])
def test_rates_are_tried_outward_until_the_best_is_bracketed(law, best, guess):
    losses = {}
    while (step := law.next_step(losses, guess)) is not None:
        losses[step] = math.inf if step > best + 2 else (step - best) ** 2
    assert {best - 1, best, best + 1} <= set(losses)
    assert len(losses) <= abs(best - guess) + 3


def test_the_peers_rate_is_no_step_of_the_search(law):
    assert law.next_step({1: 2.0, 2: 1.0, 3: 2.0, law.PEER: 0.5}, 2) is None


def test_a_line_that_is_there_is_not_run_again(law, tmp_path):
    cell, path = law.Cell("gsm8k", 30, 4), tmp_path / "runs.jsonl"
    law.append(path, {"session": {}})
    for step, loss, diverged in ((1, 1.0, False), (2, 5.0, True)):
        law.append(path, {"cell": cell.name, "step": step, "loss": loss, "diverged": diverged})
    assert law.losses_of(cell, path) == {1: 1.0, 2: math.inf}
    assert law.losses_of(law.Cell("gsm8k", 30, 4, r=64), path) == {}
    assert [json.loads(line) for line in path.read_text().splitlines()][0] == {"session": {}}


def test_every_cell_has_its_own_name_and_the_whole_grid_is_whole(law):
    for cells in (law.CPU_CELLS, law.WHOLE_CELLS):
        assert len({cell.name for cell in cells}) == len(cells)
    assert {(c.updates, c.batch, c.r) for c in law.WHOLE_CELLS} == {
        (u, b, r) for u in (30, 120, 480) for b in (4, 16, 64) for r in (8, 64)
    }
    cells = [cell for _, cell in law.work("cpu")]
    assert set(cells) == set(law.CPU_CELLS) and [cell for _, cell in law.work("whole")] == list(law.WHOLE_CELLS)
