"""Tokenizers that are loaded without asking AutoTokenizer are those that it would have loaded."""

import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from welltuned.models.tokenizer import _PLAIN_CLASSES, _PLAIN_FAMILIES, load_tokenizer, plain_class

TEXT = "Über  <|im_start|>user\n1234 apples\n\n don't"


def same(ours, theirs):
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map and ours.chat_template == theirs.chat_template


@pytest.fixture
def folder(tiny_tokenizer, tmp_path):
    def write(family, name):
        tiny_tokenizer.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "vocab_size": 400}))
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": name}))
        return tmp_path

    return write


@pytest.mark.parametrize("name", sorted(_PLAIN_CLASSES))
@pytest.mark.parametrize("kind", sorted(_PLAIN_FAMILIES))
def test_plain_from_the_files(folder, kind, name):
    path = folder(kind, name)
    assert plain_class(path) is not None
    ours, theirs = load_tokenizer(str(path)), AutoTokenizer.from_pretrained(path)
    same(ours, theirs)
    assert ours(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]


@pytest.mark.parametrize(("kind", "name"), [("gemma3_text", "GemmaTokenizer"), ("qwen2", "Qwen2Tokenizer"),
                                              ("mistral", "LlamaTokenizer"), ("phi3", "LlamaTokenizer")])  # fmt: skip
def test_the_rest_is_asked_for_once(folder, kind, name, monkeypatch):
    path = folder(kind, name)
    assert plain_class(path) is None
    first = load_tokenizer(str(path))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    same(load_tokenizer(str(path)), first)


def test_a_tokenizer_with_code_of_its_own_is_not_plain(folder):
    path = folder("llama", "GPT2Tokenizer")
    config = path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    assert plain_class(path) is None


def test_no_torch(folder):
    script = f"""
import sys
from welltuned.models.tokenizer import load_tokenizer
load_tokenizer({str(folder("llama", "TokenizersBackend"))!r})
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
