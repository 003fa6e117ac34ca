"""welltuned check: what it prints, its document, its exit codes, its time."""

import json
import subprocess
import sys
import time

import pytest

SOUND = (
    "base_model: org/Base-7B\nadapter: lora\nlora_r: 16\nlora_alpha: 32\nlora_target_linear: true\nsequence_len: 2048\n"
)
SOUND += "val_set_size: 0.05\nlearning_rate: 2e-4\nmicro_batch_size: 2\nnum_epochs: 2\n"


@pytest.fixture
def config(tmp_path):
    def write(text, name="config.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_sound_config_is_0(welltuned, config):
    said = welltuned("check", config(SOUND))
    assert said.code == 0 and "axolotl sft lora: 0 errors, 0 warnings, 0 notes" in said.out


def test_an_error_is_1_with_its_line_and_mend(welltuned, config):
    path = config(SOUND.replace("2e-4", "0.05"))
    said = welltuned("check", path)
    assert said.code == 1
    assert f"{path}:8: error WT001: learning_rate 0.05" in said.out and "mend:" in said.out and "E024" in said.out


def test_warnings_and_notes_are_0(welltuned, config):
    said = welltuned("check", config(SOUND.replace("2e-4", "2e-5")))
    assert said.code == 0 and "warning WT003" in said.out


def test_the_document(welltuned, config):
    path = config(SOUND.replace("2e-4", "2e-5"))
    said = welltuned("check", path, "--json")
    document = json.loads(said.out)
    assert said.code == 0 and said.err == ""
    assert document.keys() == {"file", "tool", "findings", "unread"}
    assert (document["file"], document["tool"], document["unread"]) == (str(path), "axolotl", [])
    (finding,) = document["findings"]
    assert finding.keys() == {"id", "severity", "key", "line", "sentence", "evidence", "mend"}
    assert (finding["id"], finding["severity"], finding["key"], finding["line"]) == (
        "WT003",
        "warning",
        "learning_rate",
        8,
    )


def test_what_is_unread_is_listed(welltuned, config):
    text = "from trl import SFTConfig, SFTTrainer\nSFTTrainer(model='m', args=SFTConfig(learning_rate=a.lr))\n"
    document = json.loads(welltuned("check", config(text, "train.py"), "--json").out)
    assert document["unread"] == [{"key": "learning_rate", "line": 2, "text": "a.lr"}]
    assert document["tool"] == "trl"


def test_a_tool_and_a_method_can_be_named(welltuned, config):
    path = config("learning_rate: 5.0e-5\nuse_peft: true\nlora_alpha: 16\n")
    assert "WT009" in welltuned("check", path, "--tool", "trl", "--method", "dpo").out
    assert welltuned("check", path, "--tool", "nothing").code == 2


@pytest.mark.parametrize("text", ["", "fruit: apple\n", "a: [\n", "seed: 1\nlearning_rate: 1e-4\nweight_decay: 0.1\n"])
def test_what_is_not_known_is_2_with_one_sentence(welltuned, config, text):
    said = welltuned("check", config(text), "--json")
    assert said.code == 2 and said.out == "" and len(said.complaints) == 1 and "Traceback" not in said.err


def test_no_file_is_2(welltuned, tmp_path):
    assert welltuned("check", tmp_path / "absent.yaml").code == 2
    assert welltuned("check").code == 2


def test_torch_is_not_imported_and_time_is_short(config):
    path = config(SOUND)
    code = (
        "import sys, time; start = time.process_time(); from welltuned.cli.main import main; "
        f"main(['check', {str(path)!r}]); print(time.process_time() - start, 'torch' in sys.modules, file=sys.stderr)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, torch = done.stderr.split()
    assert torch == "False"
    assert float(seconds) < 1.0, f"{seconds} s of processor time, {time.perf_counter() - start:.1f} s in all"
