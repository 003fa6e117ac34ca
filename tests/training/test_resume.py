"""A run that was cut off goes on bit for bit: at every update, in one, at epoch edges, again and again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import welltuned
from welltuned.errors import InputError
from welltuned.training import durable
from welltuned.training import step as step_module
from welltuned.training.checkpoint import checkpoints, folder_of
from welltuned.training.events import Evaluated, Note, Updated
from welltuned.training.resume import resume

TIMES = ("tokens_per_second", "memory_bytes")
UPDATES = 11
FILES = ("trained.safetensors", "optimizer.safetensors")


class CutOff(Exception):
    """The run ends here, as it would by a kill."""


def cut_off_at(step, kind=Updated):
    def observer(event):
        if isinstance(event, kind) and event.step == step:
            raise CutOff

    return observer


@pytest.fixture(scope="module")
def options(tiny_model_dir, data_file):
    """72 rows in updates of 16: an epoch ends after 5 and after 10. Dropout, packing, several micro-batches."""
    return dict(
        model=str(tiny_model_dir), data=data_file, effective_batch_size=16, max_steps=UPDATES, learning_rate=2e-2,
        lora_dropout=0.1, packing=True, token_budget=200, eval_steps=4, save_steps=1, save_total_limit=20, r=4,
        load_best_model_at_end=False, early_stopping_patience=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory):
    """The run that nothing disturbed, with the checkpoint of every update."""
    out = tmp_path_factory.mktemp("straight") / "out"
    welltuned.train(out=out, **options)
    assert [step for step, _ in checkpoints(out)] == list(range(UPDATES, 0, -1))
    return out


def lines(run):
    """metrics.jsonl without times and notes."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found if line.get("event") != "note"]


def same(run, straight):
    """Loss, held-out loss, rate, adapter, weights and moments: all bits of them; no update is written twice."""
    name = "adapter" if (straight / "adapter").is_dir() else "model"
    weights = "adapter_model.safetensors" if name == "adapter" else "model.safetensors"
    a, b = (json.loads((r / "run.json").read_text()) for r in (run, straight))
    return (
        lines(run) == lines(straight)
        and (run / name / weights).read_bytes() == (straight / name / weights).read_bytes()
        and all(
            (folder_of(run, UPDATES) / f).read_bytes() == (folder_of(straight, UPDATES) / f).read_bytes() for f in FILES
        )
        and a["trained_tensors"] == b["trained_tensors"]
        and a["held_out"] == b["held_out"]
    )


def as_killed_after(straight, step, place):
    """What a kill right after the checkpoint of `step` leaves: later lines of metrics.jsonl, half an adapter."""
    shutil.copytree(straight, place)
    (place / "run.json").unlink()
    (place / "adapter" / "adapter_config.json").unlink()
    for number, folder in checkpoints(place):
        if number > step:
            shutil.rmtree(folder)
    shutil.copytree(folder_of(straight, UPDATES), place / "checkpoints" / "step-000099.tmp")
    return place


def test_it_would_be_seen(straight, options, tmp_path):
    """Planted: a resumed run whose moments start at zero."""
    place = as_killed_after(straight, 6, tmp_path / "run")
    from welltuned.training.optimizer import FlatAdamW

    real, FlatAdamW.restore = FlatAdamW.restore, lambda self, *moments: None
    try:
        resume(place)
    finally:
        FlatAdamW.restore = real
    assert not same(place, straight)


def test_what_a_checkpoint_holds(straight):
    """The rate, the rows that come next and all randomness are functions of the update's number and of the plan."""
    folder = folder_of(straight, 8)
    state = json.loads((folder / "state.json").read_text())
    assert state["position"]["step"] == 8 and state["position"]["monitor"]["history"]["step"] == 8
    identity = state["identity"]
    assert identity.keys() == {"recipe", "plan", "data", "base", "tokenizer", "chat_template"}
    assert identity["plan"]["seed"] is not None and identity["plan"]["learning_rate"] == 2e-2
    assert {"training rows", "held out"} < identity["data"].keys() and all(identity["data"].values())
    assert {"welltuned", "python", "torch", "transformers", "numpy", "threads"} <= state["versions"].keys()
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


# ── bit for bit ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("step", range(1, UPDATES + 1))
def test_from_every_update(straight, tmp_path, step):
    place = as_killed_after(straight, step, tmp_path / "run")
    seen = []
    resume(place, seen.append)
    assert same(place, straight)
    assert Note(f"goes on after update {step} of {UPDATES}") in seen
    assert [e.step for e in seen if isinstance(e, Updated)] == list(range(step + 1, UPDATES + 1))
    assert not list(place.rglob("*.tmp")) and not list(place.rglob("*.old"))


@pytest.mark.parametrize("event,step", [(Updated, 1), (Updated, 8), (Evaluated, 8), (Evaluated, 11)])
def test_cut_off_and_resumed(straight, options, tmp_path, event, step):
    with pytest.raises(CutOff):
        welltuned.train(out=tmp_path / "run", observer=cut_off_at(step, event), **options)
    resume(tmp_path / "run")
    assert same(tmp_path / "run", straight)


def test_again_and_again(straight, options, tmp_path):
    place = tmp_path / "run"
    with pytest.raises(CutOff):
        welltuned.train(out=place, observer=cut_off_at(2), **{**options, "save_steps": 2})
    for step in (4, 5, 7, 9):
        with pytest.raises(CutOff):
            resume(place, cut_off_at(step))
    resume(place)
    assert same(place, straight)


def test_in_the_middle_of_an_update(straight, options, tmp_path, monkeypatch):
    real, passes = step_module._loss, []

    def loss(*arguments):
        passes.append(1)
        if len(passes) == 30:
            raise CutOff
        return real(*arguments)

    monkeypatch.setattr(step_module, "_loss", loss)
    with pytest.raises(CutOff):
        welltuned.train(out=tmp_path / "run", **options)
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert same(tmp_path / "run", straight)


def test_before_the_first_checkpoint_it_starts_over(straight, options, tmp_path):
    with pytest.raises(CutOff):
        welltuned.train(out=tmp_path / "run", observer=cut_off_at(3), **{**options, "save_steps": 100})
    seen = []
    resume(tmp_path / "run", seen.append)
    assert Note("there is no checkpoint: the run starts over") in seen
    assert lines(tmp_path / "run") == lines(straight)


def test_before_the_plan_was_written(straight, options, tmp_path):
    place = tmp_path / "run"
    with pytest.raises(CutOff):
        welltuned.train(out=place, observer=cut_off_at(0, Evaluated), **options)
    for name in ("plan.yaml", "started.json", "metrics.jsonl"):
        (place / name).unlink()
    resume(place)
    assert lines(place) == lines(straight)


@pytest.mark.parametrize("tune", [pytest.param("qlora", marks=pytest.mark.slow), "full"])
def test_other_ways_to_tune(options, tmp_path, tune):
    if tune == "qlora":
        pytest.importorskip("bitsandbytes")
    mine = {k: v for k, v in options.items() if tune != "full" or k not in ("r", "lora_dropout")}
    mine |= {"tune": tune, "learning_rate": 5e-3, "save_steps": 3}
    welltuned.train(out=tmp_path / "straight", **mine)
    with pytest.raises(CutOff):
        welltuned.train(out=tmp_path / "run", observer=cut_off_at(8), **mine)
    resume(tmp_path / "run")
    assert same(tmp_path / "run", tmp_path / "straight")


VARIANTS = {
    "average": {"ema_decay": 0.9},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "dora": {"use_dora": True, "lora_dropout": 0.0},
}


@pytest.mark.parametrize(
    "name", ["average", *(pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS if n != "average")]
)
def test_variants(options, tmp_path, name):
    mine = {**options, **VARIANTS[name], "save_steps": 3}
    welltuned.train(out=tmp_path / "straight", **mine)
    with pytest.raises(CutOff):
        welltuned.train(out=tmp_path / "run", observer=cut_off_at(8), **mine)
    resume(tmp_path / "run")
    assert same(tmp_path / "run", tmp_path / "straight")
    files = [sorted((tmp_path / which).glob("ema/*.safetensors")) for which in ("run", "straight")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert bool(files[0]) == (name == "average")


def test_evaluating_and_saving_change_nothing(straight, options, tmp_path):
    rare = {**options, "eval_steps": 100, "save_steps": 100}
    welltuned.train(out=tmp_path / "run", **rare)
    a, b = ([line["loss"] for line in lines(run) if "loss" in line] for run in (tmp_path / "run", straight))
    name = "adapter/adapter_model.safetensors"
    assert a == b and (tmp_path / "run" / name).read_bytes() == (straight / name).read_bytes()


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_goes_on(straight, tmp_path):
    place = as_killed_after(straight, 8, tmp_path / "run")
    path = folder_of(place, 8) / "trained.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    seen = []
    resume(place, seen.append)
    assert same(place, straight)
    said = "trained.safetensors is not what was written: its sha256 differs"
    texts = [e.text for e in seen if isinstance(e, Note)]
    assert f"the checkpoint of update 8 was set aside as checkpoints/damaged/step-000008: {said}" in texts
    assert (place / "checkpoints" / "damaged" / "step-000008" / "trained.safetensors").read_bytes() == data


@pytest.mark.parametrize("left", [0, 7])
def test_metrics_that_a_power_cut_shortened(straight, tmp_path, left):
    place = as_killed_after(straight, 8, tmp_path / "run")
    whole = (place / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (place / "metrics.jsonl").write_bytes(b"".join(whole[:left]) + whole[left][:9])
    seen = []
    resume(place, seen.append)
    assert any(isinstance(e, Note) and e.text.startswith("metrics.jsonl had lost") for e in seen)
    name = "adapter/adapter_model.safetensors"
    assert (place / name).read_bytes() == (straight / name).read_bytes()
    assert all(json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines())


# ── what changed ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def unfinished(options, data_file, tiny_model_dir, tmp_path):
    """A run of files of its own, cut off after four updates."""
    data, model = tmp_path / "rows.jsonl", tmp_path / "model"
    shutil.copy(data_file, data)
    shutil.copytree(tiny_model_dir, model)
    with pytest.raises(CutOff):
        mine = {**options, "model": str(model), "data": str(data), "max_steps": 6}
        welltuned.train(out=tmp_path / "run", observer=cut_off_at(5), **mine)
    return tmp_path


def replace_text(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_changed_recipe_is_refused_with_the_difference(unfinished):
    run = unfinished / "run"
    replace_text(run / "recipe.yaml", "learning_rate: 0.02", "learning_rate: 0.01")
    with pytest.raises(InputError) as caught:
        resume(run)
    assert "recipe: learning_rate was 0.02 and is 0.01" in str(caught.value)
    assert "--accept-changes" in str(caught.value) and not (run / "run.json").exists()
    seen = []
    resume(run, seen.append, accept_changes=True)
    rates = {e.step: e.learning_rate for e in seen if isinstance(e, Updated)}
    assert min(rates) in (5, 6) and max(rates.values()) <= 0.01
    assert any("learning_rate was 0.02 and is 0.01" in e.text for e in seen if isinstance(e, Note))
    assert "learning_rate: 0.01" in (run / "recipe.yaml").read_text()
    before = [line["learning_rate"] for line in lines(run) if line.get("step", 9) <= 4 and "loss" in line]
    assert len(before) == 4 and max(before) > 0.01


def test_a_changed_recipe_that_trains_other_tensors(unfinished):
    run = unfinished / "run"
    replace_text(run / "recipe.yaml", "r: 4", "r: 8")
    with pytest.raises(InputError, match="other tensors than this recipe trains"):
        resume(run, accept_changes=True)


def test_changed_data(unfinished):
    path = unfinished / "rows.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    with pytest.raises(InputError, match=f"data: {path} changed; data: training rows changed"):
        resume(unfinished / "run")
    resume(unfinished / "run", accept_changes=True)


def test_a_changed_base_model(unfinished, make_model_dir):
    other = make_model_dir(seed=1)
    shutil.copy(other / "model.safetensors", unfinished / "model" / "model.safetensors")
    with pytest.raises(InputError, match="the base model changed"):
        resume(unfinished / "run")


def test_a_changed_tokenizer(unfinished):
    path = unfinished / "model" / "tokenizer.json"
    plain = json.loads(path.read_text())
    plain["model"]["merges"].pop()
    path.write_text(json.dumps(plain))
    with pytest.raises(InputError, match="the tokenizer changed"):
        resume(unfinished / "run")


def test_a_changed_chat_template(unfinished):
    replace_text(unfinished / "model" / "chat_template.jinja", "\n{% endfor %}", "{% endfor %}")
    with pytest.raises(InputError, match="the chat template changed"):
        resume(unfinished / "run")


def test_other_libraries_are_said(unfinished):
    path = folder_of(unfinished / "run", 4)
    from welltuned.training import resume as module

    real = module.versions
    module.versions = lambda: {**real(), "torch": "9.9"}
    try:
        seen = []
        resume(unfinished / "run", seen.append)
    finally:
        module.versions = real
    assert path.is_dir()
    assert any("torch was" in e.text and "9.9" in e.text for e in seen if isinstance(e, Note))


def test_relative_paths_are_meant_from_where_the_run_began(options, data_file, tmp_path, monkeypatch):
    shutil.copy(data_file, tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CutOff):
        welltuned.train(out="run", observer=cut_off_at(2), **{**options, "data": "rows.jsonl", "max_steps": 3})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resume(Path("../run"))
    assert (tmp_path / "run" / "run.json").is_file() and Path.cwd() == tmp_path / "elsewhere"


# ── what cannot be resumed ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_finished_run(straight):
    with pytest.raises(InputError, match="the run is finished"):
        resume(straight)


def test_no_run(tmp_path):
    with pytest.raises(InputError, match="there is no run here"):
        resume(tmp_path)
    with pytest.raises(InputError, match="there is no run here"):
        resume(tmp_path / "nowhere")


def test_the_place_of_an_unfinished_run_is_not_free(unfinished, options):
    with pytest.raises(InputError, match="welltuned resume"):
        welltuned.train(out=unfinished / "run", **options)
    with pytest.raises(InputError, match="finish it first: welltuned resume"):
        welltuned.load(unfinished / "run")


HOLDER = """
import sys
from pathlib import Path
from welltuned.training.lock import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_two_processes_on_one_run(unfinished, options):
    run = unfinished / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout.readline() == b"held\n"
        before = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
        with pytest.raises(InputError, match=rf"another process \(number {holder.pid} on .*\) is at work on this run"):
            resume(run)
        assert {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()} == before
        holder.kill()
    resume(run)  # a dead holder holds nothing
    assert not (run / ".lock").exists()


def test_two_processes_on_one_new_place(options, tmp_path):
    """The second one finds the first one's lock, though nothing else is there yet."""
    from welltuned.training.rundir import RunDir

    first = RunDir(tmp_path / "run")
    with pytest.raises(InputError, match="not empty|at work on this run"):
        RunDir(tmp_path / "run")
    first.close()


# ── the best ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Judge:
    """Holds update 4 for the best, whatever comes, and ends the run where it is told to."""

    findings = ()

    def __init__(self, state, stop=None):
        self.seen, self._stop = list(state.get("seen", [])), stop

    @property
    def stop_reason(self):
        return f"enough after {self._stop}" if self._stop is not None and self._stop in self.seen else None

    @property
    def best_step(self):
        return 4 if 4 in self.seen else None

    def see(self, event):
        if isinstance(event, Evaluated):
            self.seen.append(event.step)
            return (Note(f"saw {event.step}"),)
        return ()

    def state(self):
        return {"seen": self.seen}


def trained_with(options, out, stop=None, observer=lambda e: None, **changes):
    from welltuned.recipe import load_recipe
    from welltuned.training.prepare import prepare
    from welltuned.training.run import train

    prepared = prepare(load_recipe(None, {**options, **changes}))
    return train(prepared, out, observer, make_watch=lambda plan, state: Judge(state, stop))


def test_the_best_stays_and_is_the_result(straight, options, tmp_path):
    place = tmp_path / "run"
    changes = dict(save_steps=2, save_total_limit=1, load_best_model_at_end=True)
    done = trained_with(options, place, **changes)
    assert [step for step, _ in checkpoints(place)] == [UPDATES, 4]
    from safetensors.torch import load_file

    best, last = (load_file(folder_of(straight, step) / "trained.safetensors") for step in (4, UPDATES))
    adapter = load_file(place / "adapter" / "adapter_model.safetensors")
    for name, tensor in best.items():
        stored = adapter[f"base_model.model.{name}.weight"]
        assert stored.equal(tensor.view(stored.shape)) and not stored.equal(last[name].view(stored.shape))
    at_4 = next(line for line in lines(straight) if line.get("step") == 4 and "eval_loss" in line)
    assert done.after.loss == at_4["eval_loss"] and json.loads((place / "run.json").read_text())["best_step"] == 4
    notes = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines() if "note" in line]
    assert {"event": "note", "text": "saw 4"} in notes


def test_the_last_is_the_result_where_the_plan_says_so(straight, options, tmp_path):
    trained_with(options, tmp_path / "run", load_best_model_at_end=False)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (straight / name).read_bytes()


def test_an_early_end(straight, options, tmp_path):
    place = tmp_path / "run"
    done = trained_with(options, place, stop=8, load_best_model_at_end=True)
    assert done.updates == 8 and checkpoints(place)[0][0] == 8
    summary = json.loads((place / "run.json").read_text())
    assert summary["updates"] == 8 and summary["stop_reason"] == "enough after 8"


def test_what_the_monitor_knew_goes_on(options, tmp_path):
    place = tmp_path / "run"
    with pytest.raises(CutOff):
        trained_with(options, place, observer=cut_off_at(7), load_best_model_at_end=True)
    made = []

    def make(plan, state):
        made.append(Judge(state))
        return made[-1]

    resume(place, make_watch=make)
    assert made[-1].seen == [0, 4, 8, 11] and json.loads((place / "run.json").read_text())["best_step"] == 4


def test_a_damaged_best_is_said_and_the_last_weights_stay(straight, options, tmp_path):
    def spoil(event):
        if isinstance(event, Updated) and event.step == 9:
            (folder_of(tmp_path / "run", 4) / "state.json").write_text("{}")

    trained_with(options, tmp_path / "run", observer=spoil, load_best_model_at_end=True)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (straight / name).read_bytes()
    assert "the weights of update 4 were the best, but state.json" in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_killed_at_every_call_of_writing_the_result(straight, tmp_path):
    """From the last checkpoint on: adapter/, its names, run.json."""
    from faulty import KILLED, Faulty, in_child, kill_before

    def names(at):
        place = as_killed_after(straight, UPDATES, tmp_path / f"run{at}")
        system = Faulty(at, kill_before)
        code = in_child(lambda: (setattr(durable, "SYSTEM", system), resume(place)))
        return place, code

    for at in range(0, 200, 2):
        place, code = names(at)
        if code == 0:
            break
        assert code == KILLED
        if not (place / "run.json").exists():
            resume(place)
        assert same(place, straight), at
    assert at > 20
