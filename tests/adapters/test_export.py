"""Handing a run on: what is written, that it runs where it is meant to, and what is refused."""

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from welltuned.adapters.ollama import modelfile, turns_of
from welltuned.api import export, load
from welltuned.cli.main import main
from welltuned.data.conversation import Conversation, Message
from welltuned.data.templates import Prompt, render_texts
from welltuned.errors import InputError, RunError
from welltuned.finished import export as exporting

peft = pytest.importorskip("peft")


def close(a, b, tolerance=1e-5):
    return float((a - b).abs().max() / b.abs().max()) < tolerance


def test_for_peft(trained_run, tmp_path, plain, tiny_model_dir, logits):
    run = trained_run()
    found = export(run, to="peft", out=tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(plain(tiny_model_dir), tmp_path / "out")
    assert close(logits(theirs), logits(load(run, device="cpu").model))
    assert set(found.files) >= {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"}
    assert "--max-lora-rank 16 " in found.commands[1] and str(tiny_model_dir) in found.commands[1]
    ours, copy = (load_file(folder / "adapter_model.safetensors") for folder in (run / "adapter", tmp_path / "out"))
    assert ours.keys() == copy.keys() and all(torch.equal(ours[name], copy[name]) for name in ours)
    # what was exported is as good as the run: it can be loaded and exported again
    assert load(tmp_path / "out", device="cpu").chat_template == load(run, device="cpu").chat_template


@pytest.mark.parametrize("tune", [pytest.param("lora", marks=pytest.mark.slow), "full"])
def test_merged(trained_run, tmp_path, plain, logits, tune):
    run = trained_run(tune)
    found = export(run, to="merged", out=tmp_path / "out", dtype="float32")
    assert close(logits(plain(tmp_path / "out")), logits(load(run, device="cpu").model), 1e-4)
    assert found.agreement.drift < 1e-4 and {"config.json", "chat_template.jinja", "README.md"} <= set(found.files)
    assert not list(tmp_path.glob(".*"))


def test_the_card(trained_run, tmp_path):
    run = trained_run()
    export(run, to="merged", out=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    summary = json.loads((run / "run.json").read_text())
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == summary["model"] and "lora" in yaml.safe_load(head)["tags"]
    held = summary["held_out"]
    assert f"{held['before']['loss']:.3f} → {held['after']['loss']:.3f}" in body
    assert "| learning_rate | 0.02 | the user |" in body or "| learning_rate | 2e-2 | the user |" in body
    assert "colours.jsonl" in body and "same" in body and "12 updates" in body


@pytest.mark.parametrize("quantize", ["f16", pytest.param("q8_0", marks=pytest.mark.slow)])
def test_gguf(trained_run, tmp_path, logits, quantize):
    run = trained_run()
    found = export(run, to="gguf", out=tmp_path / "out", quantize=quantize)
    path = next((tmp_path / "out").glob("*.gguf"))
    assert found.files == ("README.md", path.name) and path.name == f"{run.name}-{quantize}.gguf"
    theirs = load(path, device="cpu")
    assert close(logits(theirs.model), logits(load(run, device="cpu").model), 5e-2)
    assert theirs.chat_template == load(run, device="cpu").chat_template
    assert not list(tmp_path.glob(".*")), "the merged weights are forgotten"


def test_a_gguf_file_that_is_wrong(trained_run, tmp_path, monkeypatch):
    """Planted: q's rows stay as transformers has them. The file is read back, and nothing is left."""
    from welltuned.adapters.gguf import write

    monkeypatch.setattr(write, "arranged", lambda name, tensor, family, config: tensor)
    with pytest.raises(RunError, match="not base and adapter"):
        export(trained_run(), to="gguf", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_base_that_is_a_gguf_file(trained_run, tmp_path, logits, data_file):
    import welltuned

    export(trained_run(), to="gguf", out=tmp_path / "base", quantize="f32")
    base = next((tmp_path / "base").glob("*.gguf"))
    run = tmp_path / "run"
    welltuned.train(out=run, model=str(base), data=data_file, max_steps=4, learning_rate=2e-2, eval_fraction=0.1)
    assert "GGUF file, which PEFT and vLLM do not load" in export(run, to="peft", out=tmp_path / "peft").notes[0]
    found = export(run, to="merged", out=tmp_path / "merged", dtype="float32")
    assert found.agreement.drift < 1e-4
    again = export(run, to="gguf", out=tmp_path / "again", quantize="f32")
    assert again.agreement.drift < 1e-3


def test_lora_gguf(trained_run, tmp_path):
    gguf = pytest.importorskip("gguf")
    found = export(trained_run(), to="lora-gguf", out=tmp_path / "out")
    reader = gguf.GGUFReader(next((tmp_path / "out").glob("*.gguf")))
    assert reader.fields["adapter.type"].contents() == "lora" and len(reader.tensors) == 28
    assert "--lora" in found.commands[0]


# ── Ollama ───────────────────────────────────────────────────────────────────────────────────────────────────────────

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% else %}{{ raise_exception('no') }}{% endif %}"
    "{% endfor %}"
)
CHATML = DEFAULT_SYSTEM.replace("You help.", "").replace(
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n<|im_end|>\n{% endif %}", ""
)
THINKING = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] if not loop.last else 'x' }}")


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, DEFAULT_SYSTEM, MISTRAL])
def test_templates_in_ollamas_words(tiny_tokenizer, template):
    turns = turns_of(tiny_tokenizer, template)
    talk = [Message("user", "How are you?"), Message("assistant", "Well."), Message("user", "Good.")]
    probes = [talk[:1], talk]
    if template not in (GEMMA, MISTRAL):
        probes += [[Message("system", "Be brief."), *p] for p in probes]
    for messages in probes:
        prompt = Prompt(Conversation(tuple(messages), "x"), len(messages), True)
        assert turns.render(messages) == render_texts(tiny_tokenizer, template, [prompt])[0]
    text = modelfile("model.gguf", turns, ["<|im_end|>"])
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """') and 'PARAMETER stop "<|im_end|>"\n' in text


def test_chatml_word_for_word(tiny_tokenizer):
    go = turns_of(tiny_tokenizer, CHATML).go()
    assert go == (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ else }}{{ end }}{{ range .Messages }}"
        '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        "<|im_start|>assistant\n"
    )


def go_rendered(template, system, messages):
    """What Go's text/template makes of the actions that a Modelfile uses: if, else if, else, range, end, a field."""
    parts = re.split(r"\{\{ (.*?) \}\}", template, flags=re.DOTALL)
    tokens = [(i % 2 == 1, part) for i, part in enumerate(parts)]

    def holds(test, message):
        if test == ".System":
            return bool(system)
        kind, field, value = test.split(" ", 2)
        assert (kind, field) == ("eq", ".Role"), test
        return message["role"] == json.loads(value)

    def run(at, message, on):
        """(text, place behind the `end` or the `else` that closes this block, that word)."""
        out = ""
        while at < len(tokens):
            action, text = tokens[at]
            at += 1
            if not action:
                out += text * on
            elif text == ".System":
                out += system * on
            elif text == ".Content":
                out += message["content"] * on
            elif text == "range .Messages":
                made = [run(at, each, on) for each in messages] or [run(at, {"role": "", "content": ""}, False)]
                out, at = out + "".join(one for one, _, _ in made), made[0][1]
            elif text.startswith("if "):
                taken, word = False, text
                while word != "end":
                    test = word.removeprefix("else").strip().removeprefix("if ")
                    here = on and not taken and (word == "else" or holds(test, message))
                    one, at, word = run(at, message, here)
                    out, taken = out + one, taken or here
            else:
                assert text == "end" or text.startswith("else"), text
                return out, at, text
        return out, at, "end"

    return run(0, None, True)[0]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, DEFAULT_SYSTEM, MISTRAL])
def test_the_modelfile_renders_what_the_chat_template_does(tiny_tokenizer, template):
    """The text in the file itself, as Ollama's own language reads it."""
    text = modelfile("model.gguf", turns_of(tiny_tokenizer, template), ["<|im_end|>"])
    written = re.search(r'TEMPLATE """(.*?)"""', text, flags=re.DOTALL)[1]
    talk = [Message("user", "How are you?"), Message("assistant", "Well."), Message("user", "Good {{ .System }}.")]
    for messages in (talk[:1], talk):
        for system in ("", "Be brief.") if template not in (GEMMA, MISTRAL) else ("",):
            whole = [*([Message("system", system)] if system else []), *messages]
            prompt = Prompt(Conversation(tuple(whole), "x"), len(whole), True)
            plain = [{"role": m.role, "content": m.content} for m in messages]
            assert go_rendered(written, system, plain) == render_texts(tiny_tokenizer, template, [prompt])[0]


def test_templates_that_ollama_has_no_words_for(tiny_tokenizer):
    with pytest.raises(InputError, match="export --to gguf"):
        turns_of(tiny_tokenizer, THINKING)
    with pytest.raises(InputError, match="cannot hold"):
        modelfile("x", turns_of(tiny_tokenizer, CHATML.replace("<|im_end|>", '"""')), [])


@pytest.mark.slow
def test_for_ollama(trained_run, tmp_path):
    found = export(trained_run(), to="ollama", out=tmp_path / "out", quantize="q8_0")
    text = (tmp_path / "out" / "Modelfile").read_text()
    name = next((tmp_path / "out").glob("*.gguf")).name
    assert text.startswith(f"FROM ./{name}\n") and 'PARAMETER stop "<|im_end|>"' in text
    assert found.commands[0].startswith("ollama create ") and found.agreement.same_token > 0.9


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_cannot_be_exported(trained_run, make_model_dir, tmp_path, copied):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="has no adapter to export"):
        export(trained_run("full"), to="peft", out=out)
    olmo = trained_run(model=str(make_model_dir("olmo2")))
    for to in ("gguf", "lora-gguf", "ollama"):
        with pytest.raises(InputError, match="type olmo2 are not exported to GGUF.*export --to merged"):
            export(olmo, to=to, out=out)
    run = copied()
    run.config(lora_alpha=1)
    for to in ("peft", "merged", "gguf", "lora-gguf"):
        with pytest.raises(InputError, match="lora_alpha is 1"):
            export(run.path, to=to, out=out)
    with pytest.raises(InputError, match="what this model was before is not known"):
        export(make_model_dir(), to="merged", out=out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_plain_text_for_ollama(copied, tmp_path):
    run = copied()
    run.run_json(chat_template=None)
    with pytest.raises(InputError, match="trained on plain text"):
        export(run.path, to="ollama", out=tmp_path / "out")


def test_the_command(trained_run, tmp_path, capsys):
    run = str(trained_run())
    assert main(["adapter", "export", run, "--to", "peft", "--out", str(tmp_path / "out"), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["files"] and "PeftModel.from_pretrained" in said.err
    assert main(["adapter", "export", run, "--to", "peft", "--out", str(tmp_path / "out")]) == 2
    assert main(["adapter", "export", run, "--to", "onnx", "--out", str(tmp_path / "x")]) == 2
    assert main(["adapter"]) == 2
    shutil.rmtree(tmp_path / "out")
    assert exporting.Target.PEFT == "peft"
