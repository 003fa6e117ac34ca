"""`plan --emit`: scripts and configurations that other tools take, with the plan's reasons and with the user's rows."""

import ast
import json
import re
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from welltuned.advice.plan import make_plan
from welltuned.choice import SetBy
from welltuned.cli.main import build_parser, main
from welltuned.errors import InputError
from welltuned.facts.data import dataset_facts
from welltuned.facts.machine import Device, MachineFacts
from welltuned.facts.model import read_model_facts
from welltuned.interop.emit import METHODS, Target, emit
from welltuned.recipe import Method, load_recipe

KEYS = json.loads(files("welltuned.interop").joinpath("known_keys.json").read_text())
SMOLLM2 = dict(
    model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip


def turns(i, answer="a"):
    return [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"{answer}{i}"}]


ROWS = {
    "messages": lambda i: {"messages": turns(i)},
    "several": lambda i: {"messages": turns(i) + turns(i + 1)},
    "sharegpt": lambda i: {"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}]},
    "system": lambda i: {"messages": turns(i), "system": "be kind"},
    "alpaca": lambda i: {"instruction": f"q{i}", "input": "in" if i % 2 else "", "output": f"a{i}"},
    "pair": lambda i: {"prompt": f"q{i}", "completion": f"a{i}"},
    "question": lambda i: {"question": f"q{i}", "answer": f"a{i}"},
    "text": lambda i: {"text": f"q{i} a{i}"},
    "preference": lambda i: {"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}"},
    "whole": lambda i: {"chosen": turns(i), "rejected": turns(i, "b")},
    "kto": lambda i: {"prompt": f"q{i}", "completion": f"a{i}", "label": i % 2 == 0},
    "number": lambda i: {"problem": f"q{i}", "answer": i},
}
CASES = [(name, "sft", "lora") for name in ROWS] + [
    ("question", "sft", "qlora"), ("several", "sft", "full"), ("preference", "dpo", "lora"), ("whole", "dpo", "full"),
    ("preference", "orpo", "qlora"), ("kto", "kto", "lora"), ("number", "grpo", "lora"),
    ("preference", "reward", "lora"), ("preference", "reward", "full"),
]  # fmt: skip
NAMED = ["-".join(case) for case in CASES]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SMOLLM2))
    return replace(read_model_facts(str(folder), weights_needed=False), has_chat_template=True)


@pytest.fixture
def plan_for(model, tmp_path, monkeypatch, write_rows):
    """A plan for 40 rows of a kind, of which 4 are held out; the data lie in the current folder."""
    monkeypatch.chdir(tmp_path)

    def plan(kind, method="sft", tune="lora", *sets, device=Device.CPU, chat=True, **fields):
        if "data" not in fields:
            write_rows(tmp_path / "rows.jsonl", [ROWS[kind](i) for i in range(40)])
        options = {"model": "org/model", "data": "rows.jsonl", "method": method, "tune": tune, **fields}
        gpu = 10**11 if device is Device.CUDA else None
        machine = MachineFacts(
            device=device, cores=2, memory_total=10**11, memory_available=10**11, native_bf16=gpu is not None,
            gpu_name="a GPU" if gpu else None, gpu_memory_total=gpu, gpu_memory_available=gpu,
        )  # fmt: skip
        facts = dataset_facts([50] * 36, [20] * 36, [50] * 4, [20] * 4, kind)
        return make_plan(load_recipe(None, options, sets), replace(model, has_chat_template=chat), facts, machine)

    return plan


def loaded(text, monkeypatch):
    """The names that a script defines, with stand-ins for the libraries that it imports."""
    kwargs = type("Recorder", (), {"__init__": lambda self, *args, **given: vars(self).update(given, args=args)})
    libraries = ("trl", "trl.experimental.orpo", "peft", "transformers", "unsloth", "datasets", "torch")
    ends = "Config|Trainer|Model|Tokenizer|CausalLM|Callback|Classification"
    names = set(re.findall(rf"\b[A-Z]\w+(?:{ends})\b", text))
    module = SimpleNamespace(**dict.fromkeys(names, kwargs), Dataset=kwargs, load_dataset=read, bfloat16="bfloat16")
    for library in libraries:
        monkeypatch.setitem(sys.modules, library, module)
    defined = {"__name__": "emitted"}
    exec(compile(text, "emitted.py", "exec"), defined)
    return SimpleNamespace(**defined)


def read(path, data_files, split):
    assert (path, split) == ("json", "train")
    return [json.loads(line) for file in data_files for line in Path(file).read_text().splitlines()]


def values_of(config):
    return {name: value for name, value in vars(config).items() if name != "args"}


# ── every format, method and target ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "method", "tune"), CASES, ids=NAMED)
@pytest.mark.parametrize("target", Target)
def test_text_is_well_formed_and_reasoned(kind, method, tune, target, plan_for):
    if Method(method) not in METHODS[target]:
        with pytest.raises(InputError, match=f"{method} is not emitted for {target}"):
            emit(plan_for(kind, method, tune), target)
        return
    plan = plan_for(kind, method, tune, device=Device.CUDA if tune == "qlora" else Device.CPU)
    emitted = emit(plan, target)
    assert emitted.text.endswith("\n") and emitted.missing
    script = target in (Target.TRL, Target.UNSLOTH)
    if script:
        ast.parse(emitted.text)
    else:
        settings = yaml.safe_load(emitted.text)
        assert isinstance(settings["learning_rate"], float) and settings["seed"] == 3407
        shared = KEYS["TrainingArguments"] if target is Target.LLAMAFACTORY else ()
        assert set(settings) <= {*KEYS[target], *shared}
    flat = re.sub(r"[\s#]+", " ", emitted.text)
    said = {"learning_rate", "warmup_steps", "weight_decay", "num_train_epochs", "max_grad_norm", "seed", "eval_steps"}
    said |= {"r", "lora_alpha", "lora_dropout", "target_modules"} & set(plan.choices)
    for name in said:
        assert re.sub(r"\s+", " ", plan.choices[name].reason) in flat, name
    for sentence in emitted.missing:
        assert sentence in flat


@pytest.mark.parametrize("target", list(Target))
def test_eight_bits_are_handed_on_by_their_name(target, plan_for):
    plan = plan_for("pair", "sft", "lora", "optim=adamw_bnb_8bit")
    assert "adamw_bnb_8bit" in emit(plan, target).text and "adamw_torch" not in emit(plan, target).text


@pytest.mark.parametrize(("kind", "method", "tune"), CASES, ids=NAMED)
def test_settings_are_the_plans(kind, method, tune, plan_for, monkeypatch):
    plan = plan_for(kind, method, tune, device=Device.CUDA if tune == "qlora" else Device.CPU)
    script = loaded(emit(plan, Target.TRL).text, monkeypatch)
    config = values_of(script.config)
    known = "RewardConfig" if method == "reward" else f"{method.upper()}Config"
    assert set(config) <= set(KEYS["TrainingArguments"]) | set(KEYS[known])
    own = {name: config[name] for name in config if name in plan.choices}
    if method == "grpo":
        answers = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
        assert answers == plan.value("effective_batch_size") and answers % config["num_generations"] == 0
    optim = own.pop("optim")
    assert optim.startswith("adamw_torch") and own.pop("packing", False) is False
    assert own == {name: plan.value(name) for name in own}
    assert config["bf16"] == (plan.value("dtype") == "bfloat16")
    assert config["activation_checkpointing"] == plan.value("gradient_checkpointing")
    if tune != "full":
        adapter = values_of(script.adapter)
        assert set(adapter) <= set(KEYS["LoraConfig"])
        assert all(adapter[name] == plan.value(name) for name in adapter if name != "task_type")
    if tune == "qlora":
        assert values_of(script.four_bits)["bnb_4bit_compute_dtype"] == "bfloat16"


def test_the_best_is_kept_and_the_run_stops_there_too(plan_for, monkeypatch):
    sets = ("load_best_model_at_end=true", "early_stopping_patience=2", "eval_steps=4", "save_steps=3")
    text = emit(plan_for("preference", "dpo", "lora", *sets), Target.TRL).text
    config = values_of(loaded(text, monkeypatch).config)
    assert config["load_best_model_at_end"] and config["save_steps"] == config["eval_steps"] == 4
    assert "callbacks=[EarlyStoppingCallback(2)]" in text and "AutoTokenizer, EarlyStoppingCallback" in text
    there = emit(plan_for("preference", "dpo", "lora", *sets), Target.LLAMAFACTORY)
    assert any("the last state is kept there" in sentence for sentence in there.missing)
    plain = emit(plan_for("preference", "dpo", "lora", "early_stopping_patience=0", "save_steps=3"), Target.TRL).text
    assert "EarlyStopping" not in plain and "save_steps=3" in plain


def test_forms_of_the_loss(plan_for, monkeypatch):
    text = emit(plan_for("number", "grpo", "lora", "loss_type=gspo"), Target.TRL).text
    config = values_of(loaded(text, monkeypatch).config)
    assert (config["loss_type"], config["importance_sampling_level"], config["epsilon"]) == ("grpo", "sequence", 3e-4)
    robust = emit(plan_for("preference", "dpo", "lora", "loss_type=robust"), Target.TRL).text
    assert 'loss_type="robust"' in robust and "label_smoothing=0.1" in robust
    simpo = plan_for("preference", "dpo", "lora", "loss_type=simpo")
    with pytest.raises(InputError, match="simpo is not emitted for trl"):
        emit(simpo, Target.TRL)
    there = yaml.safe_load(emit(simpo, Target.LLAMAFACTORY).text)
    assert (there["pref_loss"], there["pref_beta"], there["simpo_gamma"]) == ("simpo", 2.0, 1.0)
    script = emit(plan_for("preference", "reward", "lora"), Target.TRL).text
    assert "AutoModelForSequenceClassification" in script and "num_labels=1" in script and '"SEQ_CLS"' in script


USER, ANSWER = [{"role": "user", "content": "q1"}], [{"role": "assistant", "content": "a1"}]
SECOND = {
    ("messages", "sft"): {"prompt": USER, "completion": ANSWER},
    ("several", "sft"): {"messages": turns(1) + turns(2)},
    ("sharegpt", "sft"): {"prompt": USER, "completion": ANSWER},
    ("system", "sft"): {"prompt": [{"role": "system", "content": "be kind"}, *USER], "completion": ANSWER},
    ("alpaca", "sft"): {"prompt": [{"role": "user", "content": "q1\n\nin"}], "completion": ANSWER},
    ("pair", "sft"): {"prompt": USER, "completion": ANSWER},
    ("question", "sft"): {"prompt": USER, "completion": ANSWER},
    ("text", "sft"): {"text": "q1 a1"},
    ("preference", "sft"): {"prompt": USER, "completion": ANSWER},
    ("whole", "sft"): {"prompt": USER, "completion": ANSWER},
    ("kto", "sft"): None,  # labelled undesirable
    ("number", "sft"): {"prompt": USER, "completion": [{"role": "assistant", "content": "1"}]},
    ("preference", "dpo"): {"prompt": USER, "chosen": ANSWER, "rejected": turns(1, "b")[1:]},
    ("whole", "dpo"): {"prompt": USER, "chosen": ANSWER, "rejected": turns(1, "b")[1:]},
    ("kto", "kto"): {"prompt": USER, "completion": ANSWER, "label": False},
    ("number", "grpo"): {"prompt": USER, "answer": "1"},
}


@pytest.mark.parametrize(("kind", "method"), SECOND, ids=["-".join(case) for case in SECOND])
@pytest.mark.parametrize("target", [Target.TRL, Target.UNSLOTH])
def test_rows_of_the_scripts(kind, method, target, plan_for, monkeypatch):
    script = loaded(emit(plan_for(kind, method), target).text, monkeypatch)
    assert script.to_row_0(ROWS[kind](1)) == SECOND[kind, method]
    train, held_out = script.split(script.TRAIN)
    every = [row for i in range(40) if (row := script.to_row_0(ROWS[kind](i))) is not None]
    assert len(held_out) == len(every) // 10 and len(train) + len(held_out) == len(every)
    assert all(row in every for row in train) and not any(row in train for row in held_out)


@pytest.mark.parametrize("target", [Target.AXOLOTL, Target.LLAMAFACTORY])
@pytest.mark.parametrize("kind", ["alpaca", "preference", "system", "kto"])
def test_converted_rows(kind, target, plan_for, monkeypatch):
    """Rows that the tool does not read by itself are written anew by the Python in the comments."""
    text = emit(plan_for(kind), target).text
    code = "\n".join(line.removeprefix("#py ") for line in text.splitlines() if line.startswith("#py"))
    assert "rows.py && python rows.py" in text
    loaded(code, monkeypatch)
    train, held_out = (read("json", [f"{name}.rows.jsonl"], "train") for name in ("train", "heldout"))
    assert len(held_out) == len(train) // 9 and all(row["messages"][-1]["role"] == "assistant" for row in train)
    settings = yaml.safe_load(text)
    if target is Target.AXOLOTL:
        assert settings["datasets"][0]["path"] == "train.rows.jsonl" and "val_set_size" not in settings
        assert settings["test_datasets"][0]["path"] == "heldout.rows.jsonl"
    else:
        assert info_of(text)["heldout"]["file_name"] == "heldout.rows.jsonl" and "val_size" not in settings


def info_of(text):
    return json.loads("\n".join(line.removeprefix("#json ") for line in text.splitlines() if line.startswith("#json")))


def test_rows_read_as_they_lie(plan_for):
    sharegpt = emit(plan_for("sharegpt"), Target.AXOLOTL)
    entry = yaml.safe_load(sharegpt.text)["datasets"][0]
    assert entry["path"] == "rows.jsonl" and entry["field_messages"] == "conversations"
    assert entry["message_property_mappings"] == {"role": "from", "content": "value"}
    assert any("rows that share a prompt can be on both sides" in sentence for sentence in sharegpt.missing)
    question = emit(plan_for("question"), Target.LLAMAFACTORY).text
    assert info_of(question)["train"] == {
        "file_name": "rows.jsonl",
        "columns": {"prompt": "question", "response": "answer"},
    }
    assert yaml.safe_load(question)["val_size"] == 0.1
    assert yaml.safe_load(emit(plan_for("text"), Target.LLAMAFACTORY).text)["stage"] == "pt"


# ── what is asked of the data ────────────────────────────────────────────────────────────────────────────────────────


def test_loss_on(plan_for, monkeypatch):
    def config(*sets, kind="several"):
        return values_of(loaded(emit(plan_for(kind, "sft", "lora", *sets), Target.TRL).text, monkeypatch).config)

    assert config()["assistant_only_loss"] is True
    assert config("loss_on=everything")["assistant_only_loss"] is False
    assert config("loss_on=last")["completion_only_loss"] is True
    assert config(kind="question")["completion_only_loss"] is True and "assistant_only_loss" not in config(kind="text")
    last = yaml.safe_load(emit(plan_for("several", "sft", "lora", "loss_on=last"), Target.LLAMAFACTORY).text)
    assert last["mask_history"] is True and last["train_on_prompt"] is False
    axolotl = emit(plan_for("several", "sft", "lora", "loss_on=last"), Target.AXOLOTL)
    assert any("loss_on last" in sentence for sentence in axolotl.missing)


def test_a_later_row_of_another_shape_is_an_error_there(plan_for, monkeypatch):
    script = loaded(emit(plan_for("messages"), Target.TRL).text, monkeypatch)
    with pytest.raises(ValueError, match="one answer, at the end, was expected"):
        script.to_row_0(ROWS["several"](0))


def test_held_out_data_of_ones_own(plan_for, monkeypatch, tmp_path, write_rows):
    write_rows(tmp_path / "own.jsonl", [ROWS["pair"](i) for i in range(100, 104)])
    plan = plan_for("messages", eval_data="own.jsonl")
    script = loaded(emit(plan, Target.TRL).text, monkeypatch)
    assert len(script.split(script.TRAIN)[0]) == 40 and len(script.split(script.EVAL)[0]) == 4
    assert yaml.safe_load(emit(plan, Target.AXOLOTL).text)["test_datasets"][0]["path"] == "heldout.rows.jsonl"
    assert not any("held out" in sentence for sentence in emit(plan, Target.TRL).missing)


def test_groups_stay_together(plan_for, monkeypatch, tmp_path, write_rows):
    rows = [{**ROWS["messages"](i), "who": f"w{i % 8}"} for i in range(40)]
    write_rows(tmp_path / "grouped.jsonl", rows)
    text = emit(plan_for("messages", data="grouped.jsonl", group_by="who"), Target.TRL).text
    script = loaded(text, monkeypatch)
    train, held_out = ([row["prompt"][0]["content"] for row in rows] for rows in script.split(script.TRAIN))
    assert len(held_out) == 5 and len({int(name[1:]) % 8 for name in held_out}) == 1 and len(train) == 35


def test_several_datasets(plan_for, monkeypatch, tmp_path, write_rows):
    write_rows(tmp_path / "more.jsonl", [ROWS["question"](i) for i in range(100, 120)])
    plan = plan_for("messages", data=("rows.jsonl", "more.jsonl"))
    write_rows(tmp_path / "rows.jsonl", [ROWS["messages"](i) for i in range(40)])
    script = loaded(emit(plan, Target.UNSLOTH).text, monkeypatch)
    assert [len(part) for part in script.split(script.TRAIN)] == [54, 6]
    assert len(yaml.safe_load(emit(plan, Target.AXOLOTL).text)["datasets"]) == 1  # written as one file
    script.TRAIN[:] = [(*script.TRAIN[0][:2], 100), (*script.TRAIN[1][:2], 5)]
    assert len(script.split(script.TRAIN)[0]) == 105


def test_what_cannot_be_emitted(plan_for, tmp_path, write_rows):
    with pytest.raises(InputError, match="cannot read this command's stdin"):
        emit(plan_for("messages", data="-"), Target.TRL)
    with pytest.raises(InputError, match="preference pairs .* are needed"):
        emit(plan_for("messages", "dpo"), Target.TRL)
    said = "\n\nHuman: q\n\nAssistant: "
    write_rows(tmp_path / "hh.jsonl", [{"chosen": said + "a", "rejected": said + "b"}])
    with pytest.raises(InputError, match="dialogues in one text"):
        emit(plan_for("whole", "dpo", data="hh.jsonl"), Target.TRL)


def test_what_is_said_to_be_missing(plan_for):
    sets = ("on_duplicate=drop", "instruction_part=U", "response_part=A", "warmup_steps=0")
    said = " ".join(emit(plan_for("messages", "sft", "lora", *sets), Target.TRL).missing)
    for words in ("on_duplicate: drop", "instruction_part", "token_budget", "packing is off", "not the same rows"):
        assert words in said
    assert "warmup_steps" not in said
    plain = emit(plan_for("question", chat=False), Target.TRL)
    assert any("no chat template" in sentence for sentence in plain.missing)
    assert '"prompt": turns[0]["content"]' in plain.text
    assert any("several answers" in sentence for sentence in emit(plan_for("several"), Target.TRL).missing)


def test_variants_of_lora(plan_for):
    """Under the name that each tool has for it; what one has no name for is said."""
    sets = ("use_dora=true", "rank_pattern={down_proj: 64}", "modules_to_save=[embed_tokens]", "loraplus_lr_ratio=4",
            "ema_decay=0.99", "layers_to_transform=[1]")  # fmt: skip
    plan = plan_for("messages", "sft", "lora", *sets)
    trl = emit(plan, Target.TRL)
    for words in ("use_dora=True", 'rank_pattern={"down_proj": 64}', 'modules_to_save=["embed_tokens"]',
                  "layers_to_transform=[1]"):  # fmt: skip
        assert words in trl.text
    assert "multiply learning_rate by 4" in " ".join(trl.missing) and "ema_decay" in " ".join(trl.missing)
    axolotl = yaml.safe_load(emit(plan, Target.AXOLOTL).text)
    assert axolotl["peft_use_dora"] is True and axolotl["loraplus_lr_ratio"] == 4.0
    assert axolotl["lora_rank_pattern"] == {"down_proj": 64} and axolotl["lora_modules_to_save"] == ["embed_tokens"]
    factory = emit(plan, Target.LLAMAFACTORY)
    there = yaml.safe_load(factory.text)
    assert (there["use_dora"], there["loraplus_lr_ratio"], there["additional_target"]) == (True, 4.0, "embed_tokens")
    assert "rank_pattern" in " ".join(factory.missing) and "layers_to_transform" in " ".join(factory.missing)
    assert "use_dora" not in emit(plan_for("messages"), Target.TRL).text


# ── with the real packages, where they are ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "method", "tune"), [case for case in CASES if case[2] != "qlora"])
def test_trl_takes_the_script(kind, method, tune, plan_for):
    pytest.importorskip("trl", reason="trl is no dependency; this is tested where it is installed")
    pytest.importorskip("peft")
    plan = plan_for(kind, method, tune)
    defined = {"__name__": "emitted"}
    exec(compile(emit(plan, Target.TRL).text, "emitted.py", "exec"), defined)
    config = defined["config"]
    assert config.learning_rate == plan.value("learning_rate") and config.warmup_steps == plan.value("warmup_steps")
    assert config.gradient_checkpointing == plan.value("gradient_checkpointing")
    if tune != "full":
        assert defined["adapter"].r == plan.value("r")
    train, held_out = defined["split"](defined["TRAIN"])
    assert len(train) > len(held_out) > 0


@pytest.mark.parametrize(("kind", "method", "tune"), CASES, ids=NAMED)
def test_axolotl_takes_the_configuration(kind, method, tune, plan_for):
    schema = pytest.importorskip("axolotl.utils.schemas.config", reason="axolotl is no dependency")
    if Method(method) in METHODS[Target.AXOLOTL]:
        plan = plan_for(kind, method, tune)
        parsed = schema.AxolotlInputConfig(**yaml.safe_load(emit(plan, Target.AXOLOTL).text))
        assert parsed.learning_rate == plan.value("learning_rate") and parsed.sequence_len == plan.value("max_length")


@pytest.mark.parametrize(("kind", "method", "tune"), CASES, ids=NAMED)
def test_llamafactory_takes_the_configuration(kind, method, tune, plan_for, monkeypatch):
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    parser = pytest.importorskip("llamafactory.hparams.parser", reason="llamafactory is no dependency")
    if Method(method) in METHODS[Target.LLAMAFACTORY]:
        plan = plan_for(kind, method, tune)
        _, data, training, tuning, _ = parser._parse_train_args(yaml.safe_load(emit(plan, Target.LLAMAFACTORY).text))
        assert training.learning_rate == plan.value("learning_rate") and data.cutoff_len == plan.value("max_length")
        assert tuning.lora_rank == (plan.value("r") if tune != "full" else 8)


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_command(tiny_model_dir, data_file, capsys):
    asked = ["plan", "--model", str(tiny_model_dir), "--data", data_file]
    assert main([*asked, "--emit", "trl"]) == 0
    said = capsys.readouterr()
    ast.parse(said.out)
    assert "SFTConfig(" in said.out and "- token_budget" in said.err and "learning_rate" not in said.err
    assert main([*asked, "--emit", "trl", "--json"]) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("welltuned:")]) == 1


@pytest.mark.parametrize(("kind", "method", "tune"), CASES, ids=NAMED)
@pytest.mark.parametrize("target", Target)
def test_our_own_check_finds_no_error(kind, method, tune, target, plan_for, tmp_path, capsys):
    if Method(method) in METHODS[target]:
        script = target in (Target.TRL, Target.UNSLOTH)
        file = tmp_path / ("train.py" if script else "train.yaml")
        file.write_text(emit(plan_for(kind, method, tune), target).text, encoding="utf-8")
        assert main(["check", str(file)]) == 0, capsys.readouterr().out


def test_targets_of_the_command():
    for target in Target:
        assert build_parser().parse_args(["plan", "--emit", target]).emit == target


def test_sampling_is_the_users(plan_for, monkeypatch):
    plan = plan_for("number", "grpo", "lora", "max_completion_length=8", "temperature=0.7", "num_generations=4")
    config = loaded(emit(plan, Target.TRL).text, monkeypatch).config
    assert (config.max_completion_length, config.temperature, config.num_generations) == (8, 0.7, 4)


def test_set_by_the_user_is_said(plan_for):
    plan = plan_for("messages", "sft", "lora", "learning_rate=1e-5", "max_steps=7")
    assert plan.choices["learning_rate"].set_by is SetBy.USER
    text = emit(plan, Target.LLAMAFACTORY).text
    settings = yaml.safe_load(text)
    assert settings["learning_rate"] == 1e-5 and settings["max_steps"] == 7 and "num_train_epochs" not in settings
    assert "# set by you where the advice is" in text


def test_values_of_the_chat_template_go_along(plan_for, monkeypatch):
    plan = plan_for("messages", chat_template_kwargs={"enable_thinking": False})
    preset = "{% if enable_thinking is not defined %}{% set enable_thinking = false %}{% endif %}\n"
    for target in (Target.TRL, Target.UNSLOTH):
        assert f"tokenizer.chat_template = {json.dumps(preset)} + tokenizer.chat_template" in emit(plan, target).text
    assert yaml.safe_load(emit(plan, Target.AXOLOTL).text)["chat_template_kwargs"] == {"enable_thinking": False}
    assert any("chat_template_kwargs" in text for text in emit(plan, Target.LLAMAFACTORY).missing)
