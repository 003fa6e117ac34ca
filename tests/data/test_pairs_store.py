"""Pairs, judged answers and documents in the store: what is written is read, counted, split, cut and shown."""

import json
from io import StringIO

import numpy as np
import pytest

from welltuned.data import store as store_module
from welltuned.data.dataset import read_dataset
from welltuned.data.pairs import sequences
from welltuned.data.show import Side, merged, runs
from welltuned.recipe import load_recipe


@pytest.fixture(scope="module")
def pairs(rows):
    return [
        {
            "prompt": row["messages"][0]["content"],
            "chosen": row["messages"][1]["content"],
            "rejected": rows[(3 * i + 1) % len(rows)]["messages"][1]["content"] + " no",
        }
        for i, row in enumerate(rows)
    ]


@pytest.fixture
def dataset(tiny_tokenizer, write_rows, tmp_path):
    def read(rows, method, **options):
        data = write_rows(tmp_path / "rows.jsonl", rows)
        return read_dataset(
            load_recipe(None, {"model": "any", "data": data, "method": method, **options}), tiny_tokenizer
        )

    return read


@pytest.fixture(params=["in memory", "in files"])
def where(request, monkeypatch):
    if request.param == "in files":
        monkeypatch.setattr(store_module, "IN_MEMORY", 0)


def test_a_pair_is_read_back(dataset, pairs, tiny_tokenizer, where):
    found = dataset(pairs, "dpo")
    whole = [*found.train, *found.held_out]
    assert len(whole) == len(pairs) and len(found.held_out) == 8
    by_origin = {int(e.origin.rpartition(":")[2]) - 1: e for e in whole}
    for number, example in by_origin.items():
        for side, sequence in zip(("chosen", "rejected"), sequences(example), strict=True):
            messages = [
                {"role": "user", "content": pairs[number]["prompt"]},
                {"role": "assistant", "content": pairs[number][side]},
            ]
            assert sequence.ids.tolist() == tiny_tokenizer.apply_chat_template(messages, return_dict=False)
            said = tiny_tokenizer.decode(sequence.ids[sequence.mask])
            assert said == pairs[number][side] + "<|im_end|>"


def test_rows_of_one_prompt_stay_on_one_side(dataset, pairs):
    found = dataset([*pairs[:30], *({**p, "rejected": p["rejected"] + " never"} for p in pairs[:30])], "dpo")
    prompts = [{e.ids[: e.fork.shared].tobytes() for e in side} for side in (found.train, found.held_out)]
    assert prompts[1] and not prompts[0] & prompts[1]


@pytest.mark.parametrize("limit", [28, 32, 40])
def test_cut_counts_are_those_of_the_rows(dataset, pairs, limit):
    found = dataset(pairs, "dpo", on_untrained="drop").within(limit)
    examples = list(found.train)
    tally = found.train.tally()
    assert tally.sum() == sum(len(e.ids) for e in examples) == found.train.kept(limit).sum()
    assert tally[1::2].sum() == sum(int(e.mask.sum()) for e in examples)
    assert all(max(len(s.ids) for s in sequences(e)) <= limit for e in examples)
    assert all(s.mask.any() for e in examples for s in sequences(e))
    report = found.audit()
    assert report.cut is None or report.cut.rows == sum(e.cut for e in examples)
    assert report.cut is not None


def test_what_is_lost_by_a_cut_is_left_out(dataset, pairs):
    """Answers that only differ behind the cut teach nothing."""
    same = {"prompt": "red hat", "chosen": "blue cup " * 8 + "yes", "rejected": "blue cup " * 8 + "no"}
    found = dataset([*pairs[:20], same], "dpo", on_untrained="drop", eval_data=None, eval_fraction=0.05)
    names = {e.origin.rpartition(":")[2] for e in found.train} | {e.origin.rpartition(":")[2] for e in found.held_out}
    assert "21" in names
    cut = found.within(40).held_out_within(40)
    assert "21" not in {e.origin.rpartition(":")[2] for e in [*cut.train, *cut.held_out]}
    findings = cut.findings["untrained"]
    assert findings.dropped >= 1 and any(name.endswith(":21") for name, _ in findings.named)


def test_labels(dataset, pairs):
    judged = [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(pairs)]
    found = dataset(judged, "kto")
    for example in found.train:
        assert example.desirable is (int(example.origin.rpartition(":")[2]) % 2 == 1)
        assert example.fork is None
    assert dataset(judged, "sft").train.column("label").max() == -1


def test_one_answer_with_both_labels_is_no_duplicate(dataset, pairs):
    judged = [{"prompt": p["prompt"], "completion": p["chosen"], "label": good} for p in pairs[:20] for good in (0, 1)]
    assert dataset(judged, "kto").findings["duplicate"].rows == 0


def test_both_sides_are_shown(dataset, pairs, tiny_tokenizer):
    found = dataset(pairs, "dpo")
    shown = merged(runs(found.train[0], tiny_tokenizer))
    number = int(found.train.origin(0).rpartition(":")[2]) - 1
    said = {run.side: run.text for run in shown if run.trained}
    assert said == {side: pairs[number][str(side)] + "<|im_end|>" for side in (Side.CHOSEN, Side.REJECTED)}
    assert shown[0].side is Side.NEITHER and pairs[number]["prompt"] in "".join(r.text for r in shown[:3])


def test_the_terminal_shows_chosen_and_rejected(dataset, pairs, tiny_tokenizer):
    from rich.console import Console

    from welltuned.cli.row_view import row_table

    found = dataset(pairs, "dpo")
    for colour in (True, False):
        console = Console(width=120, record=True, force_terminal=colour, file=StringIO())
        console.print(row_table(runs(found.train[0], tiny_tokenizer), colour))
        text = console.export_text(styles=colour)
        assert "chosen" in text and "rejected" in text


# ── documents ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def documents():
    return [{"text": " ".join(f"{i} red hat {j}" for j in range(5 + 7 * i))} for i in range(12)]


@pytest.mark.parametrize("limit", [2, 9, 32, 50])
def test_documents_lie_in_pieces_without_loss(dataset, documents, limit, where):
    found = dataset(documents, "sft")
    cut = found.within(limit)
    assert cut.in_pieces and len(cut.train) == len(cut.within(limit).train)
    learned = {}
    for row in cut.train:
        assert len(row.ids) <= limit and not row.mask[0] and row.mask[1:].all()
        name, _, start = row.origin.partition(" (from token ")
        at = int(start.rstrip(")").replace(",", "")) if start else 0
        learned.setdefault(name, []).append((at, row.ids))
    for row in found.train:
        pieces = sorted(learned[row.origin], key=lambda piece: piece[0])
        assert [*pieces[0][1], *(i for _, ids in pieces[1:] for i in ids[1:])] == row.ids.tolist()
        assert all(row.ids[at : at + len(ids)].tolist() == ids.tolist() for at, ids in pieces)
    assert int(cut.train.column("trained").sum()) == int(found.train.column("trained").sum())
    assert cut.train.tally().sum() == cut.train.column("length").sum() == sum(len(row.ids) for row in cut.train)
    assert cut.train.tally()[1::2].sum() == cut.train.column("trained").sum()
    assert cut.audit().cut is None
    assert any("nothing of them is left out" in note for note in cut.notes)
    again = cut.within(max(2, limit // 2))
    assert int(again.train.column("trained").sum()) == int(found.train.column("trained").sum())


def test_documents_are_cut_or_left_out_where_that_is_asked(dataset, documents):
    dropped = dataset(documents, "sft", on_too_long="drop").within(50)
    assert not dropped.in_pieces and len(dropped.train) < 11 and dropped.findings["too_long"].dropped
    with pytest.raises(Exception, match="longer than max_length"):
        dataset(documents, "sft", on_too_long="error").within(50)


def test_held_out_documents_too(dataset, documents):
    found = dataset(documents, "sft", eval_fraction=0.4).held_out_within(20)
    conversations = found.held_out_conversations()
    assert len(found.held_out) == len(conversations) > 4
    for row, conversation in zip(found.held_out, conversations, strict=True):
        assert row.origin.startswith(conversation.origin)


def test_continued_pretraining_is_named(dataset, documents):
    assert any("continued pretraining" in note for note in dataset(documents, "sft").notes)


def test_pieces_train_end_to_end(documents, tiny_model_dir, write_rows, tmp_path):
    import welltuned

    data = write_rows(tmp_path / "documents.jsonl", documents)
    options = dict(model=str(tiny_model_dir), data=data, max_length=32, learning_rate=1e-2, effective_batch_size=4)
    result = welltuned.train(out=tmp_path / "run", num_train_epochs=1.0, **options)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "loss" in line]
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert sum(line["supervised_tokens"] for line in updates) == found["audit"]["supervised_tokens"]
    assert updates[-1]["loss"] < updates[0]["loss"]
    assert "continued pretraining" in (tmp_path / "run" / "plan.yaml").read_text()
    assert result.after.loss < result.before.loss
    assert max(np.array([line["tokens"] for line in updates])) <= 4 * 32
