"""YAML files: which tool's, where each value stands, and what cannot be read."""

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from welltuned.advice.lint import findings_of
from welltuned.advice.lint.config import KeyTrouble, Tool
from welltuned.errors import InputError
from welltuned.interop import read_config
from welltuned.interop.yaml_file import parse_yaml
from welltuned.recipe import Method, Tune

TRL = "model_name_or_path: a/b-7b\nlearning_rate: 2e-4\nlora_r: 16\nuse_peft: true\nassistant_only_loss: true\n"
AXOLOTL = "base_model: a/b-7b\nadapter: qlora\nload_in_4bit: true\nmicro_batch_size: 2\nlearning_rate: 2e-4\n"
FACTORY = "model_name_or_path: a/b-7b\nstage: sft\nfinetuning_type: lora\nlora_rank: 16\n"
OURS = "model: a/b-7b\ndata: rows.jsonl\nr: 16\n"


@pytest.mark.parametrize(
    ("text", "tool", "tune"),
    [
        (TRL, Tool.TRL, Tune.LORA),
        (TRL + "load_in_4bit: true\n", Tool.TRL, Tune.QLORA),
        (AXOLOTL, Tool.AXOLOTL, Tune.QLORA),
        (FACTORY, Tool.LLAMAFACTORY, Tune.LORA),
        (FACTORY + "quantization_bit: 4\n", Tool.LLAMAFACTORY, Tune.QLORA),
        (OURS, Tool.WELLTUNED, Tune.LORA),
        (
            "output_dir: x\nlearning_rate: 1e-5\nper_device_train_batch_size: 1\nwarmup_ratio: 0.1\n",
            Tool.TRL,
            Tune.FULL,
        ),
    ],
)
def test_the_tool_is_seen_by_its_keys(read, text, tool, tune):
    config = read(text)
    assert (config.tool, config.tune) == (tool, tune)
    if "r: 16" in text or "rank: 16" in text:
        assert config.whole("r") == 16


def test_a_tool_can_be_named(read):
    text = "learning_rate: 1e-4\nseed: 1\nweight_decay: 0.1\n"
    assert read(text, tool=Tool.AXOLOTL).tool is Tool.AXOLOTL
    assert read(text, tool=Tool.LLAMAFACTORY).tool is Tool.LLAMAFACTORY


def test_a_tie_is_named_and_not_broken(read):
    with pytest.raises(InputError, match=r"could be of .* and .*; say which with --tool"):
        read("seed: 1\nlearning_rate: 1e-4\nweight_decay: 0.1\n")


def test_keys_of_two_tools_are_decided_by_their_number(read):
    assert read(FACTORY + "use_peft: true\n").tool is Tool.LLAMAFACTORY


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no configuration"),
        ("just a text", "no configuration"),
        ("- a\n- b\n", "no configuration"),
        ("12", "no configuration"),
        ("a: b: c\n", "not valid YAML"),
        ("a: [1, 2\n", "not valid YAML"),
        ("\tx: 1\n", "not valid YAML"),
        ("fruit: apple\ncolour: red\n", "no known format"),
        ("a: \x00\n", "not valid YAML"),
        ("a: &a\n  b: *a\n", "nested too deeply|no known format"),
        ("base_model: x\nother: " + "[" * 3000 + "]" * 3000, "not valid YAML|nested too deeply"),
    ],
)
def test_what_is_no_configuration_is_one_sentence(read, text, words):
    with pytest.raises(InputError, match=words):
        read(text)


def test_what_cannot_be_opened_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_config(str(tmp_path / "absent.yaml"))
    with pytest.raises(InputError, match="is a folder"):
        read_config(str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match="UTF-8"):
        read_config(str(tmp_path / "binary.yaml"))


def test_aliases_of_aliases_do_not_multiply():
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{" + ", ".join(f"k{m}: *a{n - 1}" for m in range(9)) + "}" for n in range(1, 30)]
    with pytest.raises(InputError, match="repeats itself without end"):
        parse_yaml("\n".join(lines), "x")
    assert len(parse_yaml("\n".join(lines[:4]), "x").entries) < 2000


def test_lines_and_nested_keys(read):
    config = read(AXOLOTL + "trl:\n  num_generations: 8\n  beta: 0.04\nrl: grpo\n")
    assert config.method is Method.GRPO
    assert config.whole("num_generations") == 8 and config.line_of("num_generations") == 7
    assert config.key("num_generations") == "trl.num_generations"
    assert config.number("beta") == 0.04


def test_an_empty_key_is_not_set(read):
    config = read(AXOLOTL + "sequence_len:\nwandb_project:\n")
    assert not config.given("max_length") and config.whole("max_length") == 512


def test_a_key_that_stands_twice_counts_as_the_last(read):
    config = read(TRL + "learning_rate: 1e-5\n")
    (bad,) = [bad for bad in config.bad_keys if bad.trouble is KeyTrouble.TWICE]
    assert config.number("learning_rate") == 1e-5 and bad.line == 6 and bad.why == "2"


@pytest.mark.parametrize("number", ["2e-4", "2.0e-4", "0.0002", "2E-4", "2.0e-04", "'2e-4'", "+2e-4"])
def test_numbers_as_people_write_them(read, number):
    assert read(TRL + f"weight_decay: {number}\n").number("weight_decay") == pytest.approx(2e-4)


@pytest.mark.parametrize(
    ("extra", "method"),
    [("", None), ("beta: 0.1\n", Method.DPO), ("num_generations: 8\n", Method.GRPO), ("packing: true\n", Method.SFT)],
)
def test_the_method_is_seen_by_its_keys(read, extra, method):
    plain = TRL.replace("assistant_only_loss: true\n", "")
    assert read(plain + extra).method is method
    assert read(plain + extra, method=Method.KTO).method is Method.KTO


def test_the_method_is_seen_by_the_files_name(read):
    plain = TRL.replace("assistant_only_loss: true\n", "")
    assert read(plain, name="zephyr_dpo.yaml").method is Method.DPO
    assert read(TRL, name="zephyr_dpo.yaml").method is Method.SFT


def test_a_local_model_and_local_rows_are_looked_at(read, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "abc"}]}\n' * 7, encoding="utf-8")
    look = read(OURS).look
    assert look.rows == 7 and look.rows_are_all and set(look.characters) == {3} and look.columns == {"messages"}
    (tmp_path / "rows.jsonl").write_text("not json\n", encoding="utf-8")
    assert read(OURS).look.rows is None


_WORDS = (
    "learning_rate lora_r lora_alpha datasets base_model adapter rl trl stage lora_target val_set_size beta loss_type "
    "fp16 model data method tune special_tokens use_peft eval_strategy max_steps "
    "warmup_ratio temperature micro_batch_size"
)
KEYS = _WORDS.split()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats() | st.text(max_size=8) | st.sampled_from(KEYS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("tool", [tool for tool in Tool if tool is not Tool.UNSLOTH])
@settings(max_examples=60, deadline=None)
@given(content=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=12))
@example(content={"lora_alpha": -1.0, "r": 16, "lora_r": 16, "use_peft": True, "learning_rate": 2e-4})
@example(content={"lora_alpha": 16, "r": -4, "lora_r": -4, "use_peft": True, "use_rslora": True})
def test_no_value_of_any_kind_breaks_a_reader_or_a_check(tool, content, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    for config in read_config(str(path), tool):
        for finding in findings_of(config):
            assert finding.sentence
