"""What the documentation tells people to type exists: commands, options, keys, names; and its figures were measured."""

import argparse
import ast
import inspect
import json
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import welltuned
from welltuned.cli import page as commands_page
from welltuned.cli.main import build_parser, main
from welltuned.errors import InputError
from welltuned.interop import axolotl, llamafactory
from welltuned.interop import trl as trl_names
from welltuned.recipe import KEYS

ROOT = Path(__file__).parents[2]
MADE = {"evidence.md", "checks.md", "faults.md"}  # made from the code's own words, or naming tests
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p.name not in MADE)]
WRITTEN = [str(page.relative_to(ROOT)) for page in PAGES]
RESULTS = ROOT / "benchmarks" / "results"


class Block(NamedTuple):
    """A fenced block: its language, its title, its text."""

    language: str
    title: str
    text: str


def blocks(text):
    found = re.finditer(r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2] or "", match[3]) for match in found]


def commands(text):
    """Lines of blocks that call welltuned, without what stands behind them as a comment."""
    for block in blocks(text):
        for line in block.text.splitlines():
            if re.match(r"(\$ )?welltuned ", line) and block.language in ("", "sh"):
                yield line.removeprefix("$ ")


def parsed(line):
    """The arguments of a command, read by the real parser; with … for what was left out, only names are looked at."""
    words = shlex.split(line.split(" > ")[0], comments=True)[1:]
    if "…" not in words:
        return build_parser().parse_args(words)
    return require_known([word for word in words if word != "…"])


def require_known(words):
    """The command exists, and so do its options."""
    parser, options = build_parser(), set()
    for word in words:
        choices = next((a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)), {})
        if word in choices:
            parser = choices[word]
            options = {option for action in parser._actions for option in action.option_strings}
        elif choices:
            raise InputError(f"{word} is no command")
        elif word.startswith("--") and word.split("=")[0] not in options:
            raise InputError(f"{parser.prog} has no option {word}")


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


# ── commands ──


@pytest.mark.parametrize("name", WRITTEN)
def test_commands_of_blocks_can_be_given(name):
    for line in commands(page(name)):
        arguments = parsed(line)
        for key in (pair.split("=")[0] for pair in getattr(arguments, "sets", [])):
            assert key in KEYS, line


@pytest.mark.parametrize("name", WRITTEN)
def test_commands_within_sentences_exist(name):
    text = re.sub(r"^```.*?^```$", "", page(name), flags=re.MULTILINE | re.DOTALL)
    for command in re.findall(r"`welltuned ([a-z][^`]*)`", text):
        require_known(shlex.split(command.replace("…", "").replace("\n", " ")))


@pytest.mark.parametrize(
    "line", ["welltuned trian x", "welltuned train --out x --bogus 1", "welltuned adapter merge x"]
)
def test_a_wrong_command_would_be_seen(line):
    with pytest.raises((InputError, SystemExit)):
        parsed(line)


def test_enough_commands_are_read():
    assert sum(1 for name in WRITTEN for _ in commands(page(name))) > 50


def test_the_page_of_commands_is_fresh():
    assert page("docs/commands.md") == commands_page.page(), "docs/commands.md is out of date: make docs"


# ── code ──


@pytest.mark.parametrize("name", WRITTEN)
def test_python_compiles_and_names_what_exists(name):
    for block in blocks(page(name)):
        if block.language == "python":
            tree = ast.parse(block.text)
            for wrong in unknown_names(tree):
                pytest.fail(f"{name}: {wrong}")


def unknown_names(tree):
    """What is called on welltuned and does not exist, or with a keyword that it does not take."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "welltuned":
            yield from (f"no {alias.name}" for alias in node.names if alias.name not in welltuned.__all__)
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "welltuned"):
            continue
        if node.attr not in welltuned.__all__:
            yield f"no welltuned.{node.attr}"
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if ast.unparse(call.func).removeprefix("welltuned.") in welltuned.__all__ and isinstance(
            call.func, ast.Attribute
        ):
            taken = inspect.signature(getattr(welltuned, call.func.attr)).parameters
            free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
            for word in (keyword.arg for keyword in call.keywords if keyword.arg is not None):
                if word not in taken and not (free and word in KEYS):
                    yield f"welltuned.{call.func.attr} takes no {word}"


@pytest.mark.parametrize("code", ["welltuned.trian()", "welltuned.train(out='x', lerning_rate=1)"])
def test_wrong_code_would_be_seen(code):
    assert list(unknown_names(ast.parse(code)))


@pytest.mark.parametrize("name", WRITTEN)
def test_recipes_have_known_keys(name):
    """YAML without a title is a recipe of ours; with one it is another tool's file."""
    for block in blocks(page(name)):
        if block.language == "yaml" and not block.title:
            assert yaml.safe_load(block.text).keys() <= KEYS.keys(), block.text


# ── other people's files ──


def test_what_check_says_is_what_the_page_says(tmp_path, monkeypatch, capsys):
    """Every configuration of the page, checked."""
    monkeypatch.chdir(tmp_path)
    found = blocks(page("docs/guides/move_over.md"))
    for block in found:
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
    checked = [
        (asked.text.split()[-1], said.text) for asked, said in pairwise(found) if "welltuned check" in asked.text
    ]
    assert len(checked) == 4
    for file, said in checked:
        capsys.readouterr()
        main(["check", file])
        assert capsys.readouterr().out.split() == said.split(), file


@pytest.mark.parametrize(("heading", "names"), [("Axolotl", axolotl.NAMES), ("LLaMA-Factory", llamafactory.NAMES)])
def test_keys_side_by_side_are_the_same(heading, names):
    """Where `check` reads a key of theirs under a name of ours, the table says that name."""
    part = page("docs/guides/move_over.md").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", part, re.MULTILINE)
    assert len(rows) >= 6
    ours = {"eval_share": "eval_fraction"}
    for theirs, own in rows:
        assert own in KEYS, own
        if theirs in names:
            assert ours.get(names[theirs], names[theirs]) == own, theirs


def test_trls_names_are_the_same():
    part = page("docs/guides/move_over.md").split("\n## TRL\n")[1].split("\n## ")[0]
    for theirs, own in re.findall(r"^\| `(\w+)` \| `(\w+)` \|", part, re.MULTILINE):
        assert trl_names.NAMES[theirs] == own


@pytest.mark.slow
def test_what_data_says_is_what_the_tutorial_says(smollm2_tokenizer, monkeypatch, capsys):
    """The whole output but for what the page leaves out; where lines break is the terminal's matter."""
    monkeypatch.chdir(ROOT)
    found = blocks(page("docs/tutorial.md"))
    ((asked, said),) = [(a.text, b.text) for a, b in pairwise(found) if a.text.startswith("$ welltuned data")]
    main(shlex.split(asked)[2:])
    printed = " ".join("".join(capsys.readouterr()).split())
    for part in re.split(r"^ *…$", said, flags=re.MULTILINE):
        assert " ".join(part.split()) in printed


# ── figures ──


def figures():
    """(file of results, what the page says of it), computed."""

    def of(name):
        return json.loads((RESULTS / name).read_text(encoding="utf-8"))

    speed, cut, pairs, grpo = (of(f"{n}.json") for n in ("sft_cpu", "accumulation", "preference_cpu", "grpo_cpu"))
    for tool, row in speed["median"].items():
        bold = "**" if tool == "welltuned" else ""
        yield "sft_cpu.json", f"{bold}{row['tokens_per_s']:.0f}{bold} | {bold}{row['peak_gb']:.1f} GB{bold}"
    yield "sft_cpu.json", f"{speed['median']['welltuned']['share_of_gemm_floor']} of what this machine's"
    for name, off in cut["largest_relative_difference_from_1x16"].items():
        if off:
            said = f"{off:.2f}" if off > 0.01 else f"{off:.1e}".replace("e-0", "e-")
            yield "accumulation.json", f"| {name.replace('x', ' × ')} | {said} |"
    rates = [pairs["median"][tool]["tokens_per_s"] for tool in ("welltuned", "trl")]
    yield "preference_cpu.json", "{:.0f} tokens/s beside TRL's {:.0f}".format(*rates)
    yield "preference_cpu.json", f"{pairs['median']['unshared']['welltuned_speed_ratio']} times as fast"
    yield (
        "grpo_cpu.json",
        "{:.1f} s beside {:.1f} s".format(*(grpo["median"][t]["whole_s"] for t in ("welltuned", "trl"))),
    )
    faults, cost, memory = of("faults.json"), of("checkpoint_cost.json"), of("memory.json")
    assert faults["lost"] == faults["runs_that_differ"] == 0 and faults["survived"] == faults["tried"]
    during = faults["found_after_a_kill"]["while a checkpoint was written"]
    yield "faults.json", f"Of {faults['tried']} SIGKILLs at random moments, {during} of them while"
    yield "faults.json", f"all {faults['runs']} runs ended with the bits"
    yield "checkpoint_cost.json", f"{cost['checkpoint_bytes'] / 1e6:.1f} MB every 50 updates"
    yield "checkpoint_cost.json", f"{cost['overhead']:.2%}".replace("%", " %")
    yield (
        "memory.json",
        f"in {len(memory['cases'])} configurations, it is off by {memory['largest_allocated_error']:.1%}".replace(
            "%", " %"
        ),
    )
    regret, lint, data = of("regret.json")["shared"], of("lint.json"), of("data.json")["short rows"]
    yield "regret.json", f"it ends {regret['ours']['mean']:.2f} % above"
    yield "regret.json", f"a fixed 2e-4 ends {regret['2e-4']['mean']:.2f} % above"
    yield "regret.json", f"the {regret['ours']['cells']} cells"
    assert lint["sound"]["false_alarms"] == 0 and lint["planted"]["found"] == lint["planted"]["faults"]
    yield "lint.json", f"each of {lint['planted']['faults']} planted faults"
    yield "lint.json", f"on {lint['sound']['recipes']} sound recipes"
    seconds = data["cached"]["seconds"]["read, tokenise, mask"]
    yield "data.json", f"{data['fresh']['peak_bytes_of_data'] / 1e6:.0f} MB of memory, and {seconds:.1f} s to open"


@pytest.mark.parametrize(("file", "said"), figures())
def test_figures_are_those_of_the_results(file, said):
    text = " ".join(page("docs/how_it_works.md").split())
    assert said in text and f"benchmarks/results/{file}" in text


def test_figures_of_the_readme_are_those_of_the_results():
    text = " ".join(page("README.md").split())
    speed, regret, faults = (json.loads((RESULTS / f"{n}.json").read_text()) for n in ("sft_cpu", "regret", "faults"))
    said = {tool: (f"{row['tokens_per_s']:.0f}", f"{row['peak_gb']:.1f} GB") for tool, row in speed["median"].items()}
    assert "{} tokens/s in {}".format(*said["welltuned"]) in text
    assert "TRL's {} in {} and Unsloth's {} in {}".format(*said["trl"], *said["unsloth"]) in text
    ours, fixed = (regret["shared"][rate]["mean"] for rate in ("ours", "2e-4"))
    assert f"{ours:.2f} % above the best held-out loss, a fixed 2e-4 {fixed:.2f} %" in text
    assert f"{faults['tried']} SIGKILLs" in text


def test_figures_of_the_sweeps_guide_are_those_of_the_results():
    text = " ".join(page("docs/guides/sweep.md").split())
    shared = json.loads((RESULTS / "regret.json").read_text())["shared"]
    means = [f"{shared[rate]['mean']:.2g} %" for rate in ("ours", "2e-4", "1e-4")]
    assert (
        f"ends {shared['ours']['mean']:.2f} % above the best" in text
        and f"a fixed 2e-4 ends {means[1]} above it" in text
    )
    assert f"and 1e-4 {means[2]} " in text and f"the {shared['ours']['cells']} cells" in text
    swept = json.loads((RESULTS / "sweep_gsm8k.json").read_text())
    best = f"{swept['grid_best']['learning_rate']:.1e}".replace("e-0", "e-")
    assert f"a grid of {len(swept['grid'])} rates on GSM8K (SmolLM2-135M, {swept['updates']} updates)" in text
    assert (
        f"the best was {best}; the advice, 3.2e-3, ends {swept['regret_of_the_advice']:.2%}"[:-1] + " % above it"
        in text
    )
    usual = swept["regret_of_defaults"]["Unsloth, Axolotl"]
    assert f"the usual 2e-4 {usual:.0%}.".replace("%", " %") in text
    exact = json.loads((RESULTS / "sweep_gsm8k_float32.json").read_text())
    spent = exact["found"]["share_of_a_grid_of_seven"]
    assert exact["chosen"]["learning_rate"] == exact["grid_best"]["learning_rate"] == 3.2e-3
    assert f"of {len(exact['grid'])} rates, and a sweep finds that for {100 * spent:.0f} % of the tokens" in text
    replayed = json.loads((RESULTS / "sweep_policy.json").read_text())["after"]["grids"]
    short, near_zero = replayed["sweep_grid_gsm8k_float32"], replayed["sweep_grid_tickets"]
    assert f"end {100 * short['regret_mean']:.2f} % above its best on average for" in text
    assert f"for {100 * short['share_of_a_grid_of_seven']:.0f} % of the tokens, where the moved advice alone" in text
    share, alone = (100 * near_zero[name] for name in ("share_of_a_grid_of_seven", "regret_of_advice"))
    assert f"for {share:.0f} %, where it ends {alone:.1f} % above" in text
    assert f"alone ends {100 * short['regret_of_advice']:.2f} % above; on the demo's tickets" in text
    assert f"near zero, {100 * near_zero['regret_mean']:.1f} %" in text


def test_every_figure_of_a_result_is_looked_at():
    """No paragraph that cites a result without one of the figures above."""
    cited = set(re.findall(r"benchmarks/results/(\w+\.json)", page("docs/how_it_works.md")))
    assert cited == {file for file, _ in figures()}
