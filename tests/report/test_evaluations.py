"""Evaluations: kept beside what they judged, none written over, and shown with what is certain of them."""

import html
import json
import shutil

import pytest

from welltuned.cli.main import main
from welltuned.errors import InputError
from welltuned.finished.kept import keep
from welltuned.report.evaluations import read_evaluations
from welltuned.report.page import write_report

OWNED = '</script><img src=x onerror="document.title=1">'


def document(value=-0.5, error=0.1, base=True, replies=9):
    one = {"loss": 1.0, "standard_error": 0.2, "perplexity": 2.7, "supervised_tokens": 90}
    metrics = {"exact": {"value": 0.5, "standard_error": 0.1, "rows": 9, "left_out": 2}}
    reply = {"prompt": OWNED, "answer": "yes", "tuned": OWNED, "base": "no" if base else None}
    gap = {"loss": {"value": value, "standard_error": error}, "exact": {"value": 0.3, "standard_error": 0.1}}
    return {
        **{"model": "m", "data": "held-out rows", "rows": 9, "tuned": {**one, "metrics": metrics}},
        **{"base": {**one, "metrics": metrics} if base else None, "difference": gap if base else None},
        "replies": [{"origin": f"rows.jsonl:{i}", **reply} for i in range(replies)],
    }


def test_a_run_is_judged_and_its_report_shows_it(run, tmp_path, capsys):
    """The real command, twice: both are kept, and the page has the numbers of the newest first."""
    run = shutil.copytree(run, tmp_path / "run")
    for count in (5, 7):
        assert main(["eval", str(run), "--rows", str(count), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["rows"] == count and told["kept"] == str(run / "evaluations" / f"{1 if count == 5 else 2}.json")
    newest, first = read_evaluations(run)
    assert (newest.rows, first.rows, newest.number, first.number) == (7, 5, 2, 1)
    loss = newest.measures[0]
    assert loss.tuned == f"{told['tuned']['loss']:.3f} ± {told['tuned']['standard_error']:.3f}"
    gap = told["difference"]["loss"]
    assert loss.gap == f"{gap['value']:+.3f} ± {gap['standard_error']:.3f}" and loss.better is True
    text = html.unescape((run / "report.html").read_text())
    assert loss.gap in text and newest.sentence in text and text.index(newest.sentence) < text.index(first.sentence)
    assert "lower than its base" in newest.sentence


def test_a_model_by_itself_has_a_page_where_out_says(tiny_model_dir, data_file, tmp_path, capsys):
    words = ["eval", "--model", str(tiny_model_dir), "--data", data_file, "--rows", "5", "--out", str(tmp_path / "e")]
    assert main(words) == 0 and "Kept in" in capsys.readouterr().err
    text = (tmp_path / "e" / "report.html").read_text()
    assert '<th scope="col">model</th>' in text and "difference" not in text.split("<main>")[1]
    assert main(["report", str(tmp_path / "e"), "--out", str(tmp_path / "page.html")]) == 0


def test_where_nothing_can_be_written_the_result_is_told_all_the_same(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["eval", str(run), "--rows", "3", "--out", str(tmp_path / "file" / "x"), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["kept"] is None and "not kept" in said.err


@pytest.mark.parametrize(
    ("value", "error", "better", "said"),
    [
        (-0.5, 0.1, True, "loss is 0.500 ± 0.100 lower than its base"),
        (0.5, 0.1, False, "loss is 0.500 ± 0.100 higher than its base"),
        (-0.15, 0.1, None, "within the noise"),
        (-0.5, None, None, "within the noise"),
    ],
)
def test_what_is_certain(tmp_path, value, error, better, said):
    keep(tmp_path, document(value, error))
    [one] = read_evaluations(tmp_path)
    assert one.measures[0].better is better and said in one.sentence
    assert one.measures[2].better is True and one.measures[2].tuned == "50.0% ± 10.0%" and one.measures[2].left_out == 2


def test_replies_are_spread_counted_and_text(tmp_path):
    keep(tmp_path, document())
    [one] = read_evaluations(tmp_path)
    assert len(one.replies) == 6 and one.answered == 9
    assert (one.replies[0]["origin"], one.replies[-1]["origin"]) == ("rows.jsonl:0", "rows.jsonl:8")
    text = write_report(tmp_path).read_text()
    assert "<img" not in text and "&lt;img" in text and "6 of 9 replies" in text


def test_damage_is_one_sentence(tmp_path):
    place = keep(tmp_path, document())
    for text in ("{", "[]", '{"replies": []}', json.dumps({**document(), "base": 3})):
        place.write_text(text)
        with pytest.raises(InputError, match="no evaluation that can be read"):
            read_evaluations(tmp_path)
    place.unlink()
    with pytest.raises(InputError, match="there is no evaluation"):
        write_report(tmp_path)
