"""Whole runs: what is learned, what lies in the Run's directory, and that a run which did not learn says so."""

import json
import math

import pytest

from welltuned.advice.plan import plan_from_yaml, plan_to_yaml
from welltuned.errors import InputError, RunError
from welltuned.recipe import load_recipe
from welltuned.training import result as result_module
from welltuned.training import run as run_module
from welltuned.training import step as step_module
from welltuned.training.events import Evaluated, Finding, Note, Updated

FIELDS = {"step", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "tokens_per_second", "epoch"}
RATES = {"lora": 2e-2, "qlora": 2e-2, "full": 5e-3}


@pytest.fixture(scope="module")
def finished(run):
    """One run of each kind, made when first asked for."""
    made = {}

    def of(tune):
        if tune == "qlora":
            pytest.importorskip("bitsandbytes")
        if tune not in made:
            made[tune] = run(tune=tune, learning_rate=RATES[tune], effective_batch_size=8, max_steps=40, seed=1)
        return made[tune]

    return of


@pytest.fixture(params=["lora", "qlora", "full"])
def each(request, finished):
    return finished(request.param)


# ── it learns ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_held_out_loss_falls(each):
    before, after = each.result.before, each.result.after
    assert after.loss < before.loss - 10 * after.standard_error
    assert after.loss < 0.6 * before.loss
    assert each.summary["held_out"]["before"]["loss"] == before.loss
    assert each.summary["held_out"]["after"]["loss"] == after.loss


def test_held_out_rows_are_not_trained_on(each):
    assert each.summary["held_out"]["rows"] == 8 and len(set(each.summary["held_out"]["origins"])) == 8
    assert any("8 rows are held out (10% of 80 rows)" in note for note in each.summary["notes"])


def test_every_tensor_moved(each):
    tensors = each.summary["trained_tensors"]
    assert all(t["moved"] and t["finite"] and t["change"] > 0 for t in tensors)
    assert len(tensors) == (20 if each.summary["tune"] == "full" else 2 * 7 * 2)


# ── the directory ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_lies_in_the_directory(each):
    names = {p.name for p in each.path.iterdir()}
    result = "model" if each.summary["tune"] == "full" else "adapter"
    files = {"recipe.yaml", "plan.yaml", "started.json", "metrics.jsonl", "run.json", "shown.json", "report.html"}
    assert names == {*files, "checkpoints", result}
    assert [p.name for p in (each.path / "checkpoints").iterdir()] == ["step-000040"]
    assert not list(each.path.rglob("*.tmp")) and not list(each.path.rglob("*.bin"))


def test_metrics(each):
    """One object an update with the contract's fields; whatever is not an update is an event."""
    updates = [line for line in each.metrics if "event" not in line]
    assert [line["step"] for line in updates] == list(range(1, 41))
    assert all(line.keys() >= FIELDS for line in updates)
    assert all(math.isfinite(value) for line in updates for value in line.values())
    assert all(line["tokens"] >= line["supervised_tokens"] > 0 and line["grad_norm"] > 0 for line in updates)
    assert updates[8]["epoch"] == 1.0 and updates[-1]["epoch"] == pytest.approx(40 / 9)
    evaluated = [line for line in updates if "eval_loss" in line]
    assert evaluated and evaluated[-1]["step"] == 40 and all(line["eval_loss_se"] > 0 for line in evaluated)
    assert evaluated[-1]["eval_loss"] == each.result.after.loss
    [first] = [line for line in each.metrics if line.get("event") == "evaluation"]
    assert first["step"] == 0 and first["eval_loss"] == each.result.before.loss


def test_plan_and_recipe_read_back(each, tiny_model_dir):
    text = (each.path / "plan.yaml").read_text()
    plan = plan_from_yaml(text)
    assert plan_to_yaml(plan) == text
    assert plan.value("learning_rate") == RATES[plan.recipe.tune] and plan.choices["learning_rate"].set_by == "user"
    assert plan.updates == 40 and plan.recipe.model == str(tiny_model_dir)
    assert load_recipe(str(each.path / "recipe.yaml")) == plan.recipe


def test_summary(each):
    run = each.summary
    assert run["updates"] == 40 and run["method"] == "sft" and run["chat_template"].startswith("{% for")
    assert run["seconds"] > 0 and run["tokens_per_second"] > 0
    assert 0 < run["peak_memory_bytes"] < 100e9 and run["memory_forecast_bytes"] > 0
    assert run["versions"].keys() == {"welltuned", "torch", "transformers", "numpy"}
    assert run["audit"]["rows"] == 72


def test_the_users_rate_is_used_unchanged(run):
    for rate in (1.234e-3, 7e-7):
        steady = run(learning_rate=rate, lr_scheduler_type="constant", max_steps=2)
        assert [line["learning_rate"] for line in steady.updates] == [rate] * 2
    climbing = run(learning_rate=1e-3, warmup_steps=1, max_steps=3)
    assert [line["learning_rate"] for line in climbing.updates] == [0.5e-3, 1e-3, 0.5e-3]


def test_the_same_run_again_from_its_recipe(run, finished):
    """recipe.yaml is the run: the same file gives the same adapter."""
    import welltuned

    first = finished("lora")
    out = first.path.parent / "again"
    welltuned.train(str(first.path / "recipe.yaml"), out=out)
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (first.path / name).read_bytes()


def test_events_reach_the_observer(run):
    seen = []
    done = run(observer=seen.append, max_steps=3, eval_steps=2)
    updates = [e for e in seen if isinstance(e, Updated)]
    assert [e.step for e in updates] == [1, 2, 3] and {e.total_steps for e in updates} == {3}
    assert [e.evaluation_follows for e in updates] == [False, True, True]
    assert [e.step for e in seen if isinstance(e, Evaluated)] == [0, 2, 3]
    assert updates[-1].seconds_left == 0 and all(isinstance(e, Note | Updated | Evaluated | Finding) for e in seen)
    assert [e.loss for e in updates] == done.losses


# ── rows of other kinds ──────────────────────────────────────────────────────────────────────────────────────────────


def test_prompt_and_completion(run, rows, write_rows, tmp_path):
    pairs = [{"prompt": r["messages"][0]["content"], "completion": r["messages"][1]["content"]} for r in rows]
    done = run(data=write_rows(tmp_path / "pairs.jsonl", pairs), max_steps=20)
    assert done.result.after.loss < done.result.before.loss


def test_a_model_without_a_template_trains_on_plain_pairs(run, rows, write_rows, tmp_path, tiny_model_dir):
    import shutil

    from welltuned.api import load

    folder = shutil.copytree(tiny_model_dir, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    pairs = [{"prompt": r["messages"][0]["content"] + "\n", "completion": r["messages"][1]["content"]} for r in rows]
    done = run(model=str(folder), data=write_rows(tmp_path / "pairs.jsonl", pairs), max_steps=20)
    assert done.result.after.loss < done.result.before.loss
    assert done.summary["chat_template"] is None
    assert isinstance(load(done.path, device="cpu").reply("3 times the red hat\n"), str)


def test_held_out_rows_of_ones_own(run, rows, write_rows, tmp_path):
    own = write_rows(tmp_path / "own.jsonl", rows[:5])
    done = run(eval_data=own, max_steps=2)
    assert done.summary["held_out"]["rows"] == 5
    assert all(origin.startswith(own) for origin in done.summary["held_out"]["origins"])
    warnings = plan_from_yaml((done.path / "plan.yaml").read_text()).warnings
    assert any("also found in the training data" in warning for warning in warnings)
    assert any("repeat a training row" in note for note in done.summary["notes"])


def test_one_held_out_row_has_no_standard_error(run, rows, write_rows, tmp_path):
    """NaN is no JSON: the files say null."""
    done = run(eval_data=write_rows(tmp_path / "own.jsonl", rows[:1]), max_steps=2)

    def refuse(name):
        raise AssertionError(f"{name} in JSON")

    for line in (done.path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    summary = json.loads((done.path / "run.json").read_text(), parse_constant=refuse)
    assert summary["held_out"]["after"]["standard_error"] is None and done.evaluations[-1]["eval_loss_se"] is None


def test_a_single_row_trains_without_held_out(run, rows, write_rows, tmp_path):
    done = run(data=write_rows(tmp_path / "one.jsonl", rows[:1]), max_steps=3, effective_batch_size=1)
    assert done.result.before is None and done.result.after is None and not done.evaluations
    assert done.summary["held_out"]["after"] is None and len(done.updates) == 3


def test_cut_rows_are_named(run):
    done = run(max_length=34, max_steps=2)
    assert any("longer than max_length 34 and were cut" in note for note in done.summary["notes"])


def test_held_out_rows_are_cut_only_where_training_rows_or_the_model_end(
    run, rows, write_rows, tmp_path, make_model_dir
):
    """A held-out row longer than every training row is whole; one longer than the model's context would crash it."""
    words = " ".join(["drum:gold"] * 30)
    long = {"messages": [{"role": "user", "content": "30 drums"}, {"role": "assistant", "content": words}]}
    own = write_rows(tmp_path / "own.jsonl", [*rows[:3], long])
    whole = run(eval_data=own, max_steps=1)
    assert not any("held-out rows are longer" in note for note in whole.summary["notes"])
    short = make_model_dir(
        "gpt2",
        n_embd=32,
        n_layer=2,
        n_head=4,
        max_position_embeddings=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    cut = run(model=str(short), eval_data=own, max_steps=1)
    assert any("1 held-out rows are longer than 64 tokens" in note for note in cut.summary["notes"])
    asked = run(eval_data=own, max_steps=1, max_length=50)
    assert any("1 held-out rows are longer than 50 tokens" in note for note in asked.summary["notes"])


def test_more_rows_an_update_than_there_are(run):
    done = run(effective_batch_size=1000, max_steps=3)
    assert [line["epoch"] for line in done.updates] == [1.0, 2.0, 3.0]
    assert len({line["tokens"] for line in done.updates}) == 1


@pytest.mark.parametrize(
    "options",
    [
        dict(dtype="bfloat16", learning_rate=2e-2),
        dict(init_lora_weights="gaussian"),
        dict(use_rslora=True, learning_rate=5e-3),
        dict(assistant_only_loss=False),
        dict(lr_scheduler_type="cosine", weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95),
        dict(gradient_checkpointing=True, tune="full", learning_rate=5e-3),
        dict(target_modules=["q_proj", "v_proj"], learning_rate=5e-2),
    ],
)
def test_every_option_still_learns(run, options):
    done = run(max_steps=15, **options)
    assert done.result.after.loss < 0.9 * done.result.before.loss


def test_full_fine_tuning_is_not_done_in_half_precision_unasked(run):
    with pytest.raises(InputError, match="full fine-tuning trains float32"):
        run(tune="full", dtype="bfloat16")


@pytest.mark.parametrize("how", ["sharded", "bfloat16", "untied"])
def test_other_ways_that_weights_lie_on_disk(run, tiny_model_dir, tmp_path, how):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    if how == "untied":
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
    elif how == "bfloat16":
        model = model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB" if how == "sharded" else "1GB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1 or how != "sharded"
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "model")
    for tune in ("lora", "full"):
        done = run(model=str(tmp_path / "model"), tune=tune, learning_rate=RATES[tune], max_steps=15)
        assert done.result.after.loss < 0.9 * done.result.before.loss
        assert len(done.summary["trained_tensors"]) == {"lora": 28, "full": 21 if how == "untied" else 20}[tune]


# ── models that also see ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def seeing_model_dir(tiny_tokenizer, tmp_path_factory):
    """A tiny Gemma 3 with its vision tower, whose names (q_proj, ...) are also those of the language model."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3Config

    text = dict(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["sliding_attention", "full_attention"],
        sliding_window=16, max_position_embeddings=256, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                  patch_size=14)  # fmt: skip
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=300,
                          boi_token_index=301, eoi_token_index=302)  # fmt: skip
    folder = tmp_path_factory.mktemp("gemma3")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_vision_tower_stays_as_it_is(run, seeing_model_dir, tune):
    """Text never reaches it: adapters there could not move, and the run would fail its verification at the end."""
    import torch
    from safetensors.torch import load_file

    done = run(model=seeing_model_dir, tune=tune, learning_rate=RATES[tune], max_steps=15)
    assert done.result.after.loss < 0.9 * done.result.before.loss
    assert not any("vision" in t["name"] or "projector" in t["name"] for t in done.summary["trained_tensors"])
    assert "text never reaches model.vision_tower, which stays as it is" in done.summary["notes"]
    if tune == "lora":
        assert len(done.summary["trained_tensors"]) == 28
        return
    before = load_file(f"{seeing_model_dir}/model.safetensors")
    after = load_file(done.path / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) == ("language_model" not in name) for name in before)


def test_an_adapter_beside_a_vision_tower_loads_in_peft(run, seeing_model_dir):
    import torch
    from transformers import AutoModelForCausalLM

    from welltuned.api import load

    peft = pytest.importorskip("peft")
    done = run(model=seeing_model_dir, target_modules=["q_proj", "v_proj"], max_steps=3)
    base = AutoModelForCausalLM.from_pretrained(seeing_model_dir, dtype=torch.float32).eval()
    theirs = peft.PeftModel.from_pretrained(base, done.path / "adapter").eval()
    ids = torch.arange(5, 29)[None]
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        ours = load(done.path, device="cpu").model(input_ids=ids).logits
    assert float((ours - expected).abs().max() / expected.abs().max()) < 1e-5


def test_targets_that_text_never_reaches(into, seeing_model_dir, tmp_path):
    with pytest.raises(InputError, match=r"all of the targets lie in model\.vision_tower"):
        into(
            tmp_path / "out", model=seeing_model_dir, target_modules=["vision_tower.encoder.layers.0.self_attn.q_proj"]
        )
    assert not (tmp_path / "out").exists()


# ── a run that did not learn fails loudly ────────────────────────────────────────────────────────────────────────────


def expect_failure(run, tmp_path, match, **options):
    with pytest.raises(RunError, match=match):
        run(max_steps=3, out=tmp_path / "out", **options)
    assert not (tmp_path / "out" / "adapter").exists()
    assert not (tmp_path / "out" / "model").exists()
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.fixture
def into(tiny_model_dir, data_file):
    """A function that trains into a folder of the test's own, which a failed run leaves behind."""
    import welltuned

    def into(out, **options):
        usual = dict(model=str(tiny_model_dir), data=data_file, effective_batch_size=16, learning_rate=2e-2)
        return welltuned.train(out=out, **{**usual, **options})

    return into


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_tensor_that_did_not_move(into, tmp_path, monkeypatch, tune):
    """Planted: the gradients of one tensor are lost on the way."""
    real = step_module.accumulate_gradient

    def losing(engine, examples, keys):
        made = real(engine, examples, keys)
        slot = next(s for s in engine.trained.slots if "layers.1.mlp.up_proj" in s.name)
        engine.trained.grad_KP[:, slot.start : slot.start + slot.size] = 0
        return made

    monkeypatch.setattr(step_module, "accumulate_gradient", losing)
    # Without decay: decay moves a tensor of full fine-tuning that no gradient reaches.
    expect_failure(into, tmp_path, r"layers\.1\.mlp\.up_proj.* did not move in 3 updates", tune=tune, weight_decay=0.0)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_tensor_that_is_not_finite(into, tmp_path, monkeypatch, tune):
    """Planted: one number is spoilt after the last update."""
    real = run_module.verify_and_save

    def spoiling(engine, *rest):
        slot = next(s for s in engine.trained.slots if "layers.0.self_attn.v_proj" in s.name)
        engine.trained.flat_KP[0, slot.start + 3] = math.nan
        return real(engine, *rest)

    monkeypatch.setattr(run_module, "verify_and_save", spoiling)
    expect_failure(into, tmp_path, r"layers\.0\.self_attn\.v_proj.* not finite", tune=tune)


def test_a_gradient_that_is_not_finite(into, tmp_path, monkeypatch):
    real = step_module.accumulate_gradient

    def spoiling(engine, examples, keys):
        made = real(engine, examples, keys)
        engine.trained.grad_KP[0, 0] = math.nan
        return made

    monkeypatch.setattr(step_module, "accumulate_gradient", spoiling)
    expect_failure(into, tmp_path, "3 updates in a row were not finite, the last: the gradient of update 3")


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_rate_so_large_that_nothing_is_left(into, tmp_path, tune):
    expect_failure(into, tmp_path, "lower learning_rate", tune=tune, learning_rate=1e30)


def test_a_target_without_a_match(into, tmp_path):
    with pytest.raises(InputError, match="'no_proj'"):
        into(tmp_path / "out", target_modules=["q_proj", "no_proj"])
    assert not (tmp_path / "out").exists()


def test_what_was_saved_is_read_back(into, tmp_path, monkeypatch):
    """Planted: the disk changes one number."""
    from welltuned.models import adapter_file

    real = adapter_file.read_tensors

    def failing_disk(path):
        tensors = real(path)
        next(iter(tensors.values()))[0, 0] += 1e-7
        return tensors

    monkeypatch.setattr(adapter_file, "read_tensors", failing_disk)
    with pytest.raises(RunError, match="what was read back is not what was saved"):
        into(tmp_path / "out", max_steps=2)


def test_a_base_model_that_changes_on_disk_during_full_fine_tuning(into, tmp_path, monkeypatch, tiny_model_dir):
    real = run_module.load_model
    loads = []

    def load(*arguments, **options):
        model = real(*arguments, **options)
        loads.append(model)
        if len(loads) == 2:  # the start that the result is compared with
            model.model.norm.weight.data += 0.1
        return model

    for module in (run_module, result_module):
        monkeypatch.setattr(module, "load_model", load)
    with pytest.raises(RunError, match="changed while it was trained"):
        into(tmp_path / "out", tune="full", max_steps=2)


def test_metrics_of_a_failed_run_stay(into, tmp_path, monkeypatch):
    """The updates up to the failure can be read, the one whose evaluation failed among them."""
    real = step_module.evaluate
    asked = []

    def failing(engine, examples):
        asked.append(1)
        if len(asked) == 2:
            raise RunError("the held-out loss is not finite in rows.jsonl:3")
        return real(engine, examples)

    monkeypatch.setattr(step_module, "evaluate", failing)
    with pytest.raises(RunError):
        into(tmp_path / "out", max_steps=6, eval_steps=2)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
