"""The commands that work: what they print where, what they leave behind, and what they cost to start."""

import io
import json
import subprocess
import sys

import pytest

CHOICES = {
    *("learning_rate", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "init_lora_weights"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "effective_batch_size", "num_train_epochs"),
    *("warmup_steps", "lr_scheduler_type", "weight_decay", "optim", "max_grad_norm", "max_length", "packing"),
    *("assistant_only_loss", "gradient_checkpointing", "seed"),
}
LORA_ONLY = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "init_lora_weights"}


def strict_json(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def given(tiny_model_dir, data_file):
    return ("--model", tiny_model_dir, "--data", data_file)


# ── plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tune", ["lora", "qlora", "full"])
def test_plan_json(welltuned, given, tune):
    """One JSON document on stdout, and nothing else anywhere."""
    said = welltuned("plan", *given, "--tune", tune, "--json")
    assert said.code == 0 and said.err == "" and said.out.count("\n") == 1
    plan = strict_json(said.out)
    assert plan.keys() == {"choices", "facts", "memory", "warnings"}
    assert plan["choices"].keys() >= (CHOICES - LORA_ONLY if tune == "full" else CHOICES)
    for name, choice in plan["choices"].items():
        assert choice.keys() == {"value", "low", "high", "reason", "evidence", "set_by"}, name
        assert choice["set_by"] == "advice" and choice["reason"] and isinstance(choice["evidence"], list)
        if isinstance(choice["low"], int | float):
            assert choice["low"] <= choice["value"] <= choice["high"], name
    assert plan["memory"].keys() == {"total_bytes", "parts", "fits"} and plan["memory"]["fits"] is True
    assert sum(plan["memory"]["parts"].values()) == plan["memory"]["total_bytes"]
    assert isinstance(plan["warnings"], list) and plan["facts"].keys() >= {"model", "dataset", "machine"}


def test_plan_of_what_does_not_fit(welltuned, given):
    """A plan that does not fit is a plan; only training refuses it."""
    said = welltuned("plan", *given, "--memory", "50MB", "--json")
    plan = strict_json(said.out)
    assert said.code == 0 and plan["memory"]["fits"] is False
    assert plan["warnings"][0].startswith("does not fit")


def test_users_values_in_the_plan(welltuned, given, tmp_path):
    """Options win over the file; whatever the user set says so, and is as the user set it."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 2e-5\nr: 4\nlora_dropout: 0.05\n")
    said = welltuned("plan", recipe, *given, "--set", "r=64", "--set", "seed=7", "--json")
    choices = strict_json(said.out)["choices"]
    assert {name for name, c in choices.items() if c["set_by"] == "user"} == {
        "learning_rate", "r", "lora_dropout", "seed",
    }  # fmt: skip
    assert [choices[n]["value"] for n in ("learning_rate", "r", "lora_dropout", "seed")] == [2e-5, 64, 0.05, 7]


def test_plan_for_people(welltuned, given):
    said = welltuned("plan", *given, "--set", "learning_rate=0.5")
    assert said.code == 0 and said.out == ""
    for word in ("learning_rate", "lora_alpha", "Memory", "Time", "rows are held out"):
        assert word in said.err
    assert "! learning_rate 0.5 (yours) is above the sound range" in " ".join(said.err.split())


def test_plan_with_brackets_in_names(welltuned, tiny_model_dir, rows, write_rows, tmp_path):
    """Terminal markup in a user's own names is text."""
    import shutil

    model = shutil.copytree(tiny_model_dir, tmp_path / "[bold]model[/red]")
    data = write_rows(tmp_path / "[x].jsonl", rows)
    out = tmp_path / "[dim]out[/]"
    said = welltuned("train", "--model", model, "--data", data, "--out", out, "--set", "max_steps=2")
    assert said.code == 0 and (out / "run.json").exists()
    assert "[bold]model[/red]" in said.err.replace("\n", "") and "[dim]out[/]" in said.err.replace("\n", "")


# ── train ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("tune", "rate"), [("lora", 2e-2), ("qlora", 2e-2), ("full", 5e-3)])
def test_train(welltuned, given, tmp_path, tune, rate):
    if tune == "qlora":
        pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    arguments = ("--method", "sft", "--tune", tune, "--set", f"learning_rate={rate}", "--set", "max_steps=30")
    said = welltuned("train", *given, "--out", out, "--json", *arguments)
    assert said.code == 0 and not said.complaints
    run = strict_json(said.out)
    assert run == json.loads((out / "run.json").read_text())
    assert run["held_out"]["after"]["loss"] < 0.8 * run["held_out"]["before"]["loss"]
    assert (out / ("model" if tune == "full" else "adapter")).is_dir()
    text = " ".join(said.err.split())
    for words in ("Held-out loss", "Verified: all", "trained tensors moved", "welltuned chat", "30/30 loss"):
        assert words in text
    for noise in ("Warning", "warning", "Loading weights", "Writing model shards", "kernels", "UserWarning"):
        assert noise not in said.err, noise


def test_train_in_a_process_of_its_own(given, tmp_path):
    """Here no test tool keeps the libraries' warnings away. The longest way through them: qlora."""
    pytest.importorskip("bitsandbytes")
    command = [sys.executable, "-m", "welltuned", "train", *map(str, given), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--tune", "qlora", "--set", "max_steps=2", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0 and strict_json(done.stdout)["tune"] == "qlora"
    for noise in ("Warning", "Loading", "kernels", "site-packages", "Traceback"):
        assert noise not in done.stderr, noise


def test_train_without_json_is_silent_on_stdout(welltuned, given, tmp_path):
    said = welltuned("train", *given, "--out", tmp_path / "out", "--set", "max_steps=2")
    assert said.code == 0 and said.out == ""


def test_train_from_a_recipe_alone(welltuned, tiny_model_dir, data_file, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_model_dir}\ndata: {data_file}\nmax_steps: 3\nlearning_rate: auto\n")
    said = welltuned("train", recipe, "--out", tmp_path / "deep" / "er" / "out")
    assert said.code == 0 and (tmp_path / "deep" / "er" / "out" / "adapter").is_dir()


def test_an_empty_folder_will_do(welltuned, given, tmp_path):
    (tmp_path / "out").mkdir()
    assert welltuned("train", *given, "--out", tmp_path / "out", "--set", "max_steps=2").code == 0


# ── chat ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tuned(tiny_model_dir, data_file, tmp_path_factory):
    import welltuned

    out = tmp_path_factory.mktemp("run") / "out"
    options = dict(tune="full", learning_rate=1e-2, effective_batch_size=8, num_train_epochs=20)
    welltuned.train(model=str(tiny_model_dir), data=data_file, out=out, **options)
    return out


def test_chat_answers(welltuned, tuned, rows):
    """It learned to answer in the form of the data, and stops by itself."""
    said = welltuned("chat", tuned, "--prompt", rows[3]["messages"][0]["content"])
    assert said.code == 0 and said.err == ""
    assert said.out.endswith("\n") and ":" in said.out and len(said.out) < 150 and "<|im_end|>" not in said.out


def test_chat_options(welltuned, given, tmp_path):
    welltuned("train", *given, "--out", tmp_path / "out", "--set", "max_steps=2")
    said = welltuned("chat", tmp_path / "out", "--prompt", "hat", "--base", "--system", "Be brief.",
                     "--max-new-tokens", "5")  # fmt: skip
    assert said.code == 0 and "base:" in said.err and "tuned:" in said.err and said.out.count("\n") >= 2


def test_chat_from_stdin(welltuned, tuned, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("3 times the red hat\nmore\n\n"))
    said = welltuned("chat", tuned, "--max-new-tokens", "4")
    assert said.code == 0 and len(said.out.splitlines()) == 2 and "empty line" in said.err


# ── what it costs to start ───────────────────────────────────────────────────────────────────────────────────────────


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


HEAVY = "[m for m in ('torch', 'transformers', 'numpy', 'datasets', 'peft', 'rich') if m in sys.modules]"


def test_import_brings_nothing_heavy():
    assert run_python(f"import sys, welltuned; print({HEAVY})") == "[]"


@pytest.mark.parametrize("argument", ["--help", "train --help", "--version"])
def test_help_brings_no_torch(argument):
    code = f"""
import sys
from welltuned.cli.main import main
try:
    main({argument.split()!r})
except SystemExit as end:
    print("exit", end.code, {HEAVY})
"""
    assert run_python(code).splitlines()[-1] == "exit 0 []"


def test_a_command_that_is_ended_leaves_nothing_behind(tmp_path):
    code = f"""
import sys, time, types
from pathlib import Path
from welltuned.adapters.place import written_whole
from welltuned.cli import main
def run(_):
    with written_whole(Path({str(tmp_path / "out")!r})) as folder:
        (folder / "half").write_text("half")
        print("writing", flush=True)
        time.sleep(60)
sys.modules["slow"] = types.SimpleNamespace(run=run)
main.COMMANDS["why"] = ("slow", "")
sys.exit(main.main(["why"]))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n" and len(list(tmp_path.iterdir())) == 1
        process.terminate()
    assert process.returncode == 143 and list(tmp_path.iterdir()) == []


def test_public_names():
    import welltuned

    assert dir(welltuned) == [
        *("LoraSettings", "__version__", "attach", "average", "evaluate", "export", "inspect", "load", "merge"),
        *("plan", "resume", "scale", "sweep", "train", "verify", "write_report"),
    ]
    assert all(getattr(welltuned, name) for name in dir(welltuned))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        welltuned.trian  # noqa: B018


def test_a_plan_needs_no_weights_and_no_torch(tiny_model_dir, data_file, tmp_path):
    """A configuration and a tokenizer will do; training then says what is missing."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((tiny_model_dir / name).read_bytes())
    script = """
import sys
from welltuned.cli.main import main
code = main(sys.argv[1:])
print("torch" in sys.modules, file=sys.stderr)
sys.exit(code)
"""
    command = [sys.executable, "-c", script]
    options = ["--model", str(tmp_path), "--data", data_file]
    planned = subprocess.run([*command, "plan", *options, "--json"], capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["facts"]["model"]["parameters"] > 0
    from welltuned.facts.machine import _has_driver

    assert planned.stderr.split()[-1] == str(_has_driver())
    trained = subprocess.run(
        [*command, "train", *options, "--out", str(tmp_path / "run")], capture_output=True, text=True
    )
    assert trained.returncode == 2 and "the model folder has no weights" in trained.stderr
