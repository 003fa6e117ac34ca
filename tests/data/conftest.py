"""Two small tokenizers, trained here in milliseconds: byte-level as in GPT-2, and with byte fallback as in Llama 2."""

import json

import pytest

CORPUS = [
    "The cat sat on the mat and the dog sat on the log. What is 2 + 2? The answer is 4.",
    "system user assistant model tool Human: Assistant: 48/2 = <<48/2=24>>24 clips in May.\n#### 72\n\n\n",
] * 4
SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|system|>", "<|assistant|>"),
]


def wrap(raw, **special):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def train_byte_level(special_tokens, trim_offsets=True):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    return raw


@pytest.fixture(scope="session")
def make_tokenizer():
    """A function that makes a byte-level tokenizer with the given special tokens (SPECIAL for None)."""

    def make(special_tokens=None, trim_offsets=True, **special):
        return wrap(train_byte_level(special_tokens or SPECIAL, trim_offsets), **special)

    return make


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level, offsets trimmed of leading spaces, with the special tokens of many templates and no template."""
    return wrap(train_byte_level(SPECIAL), bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def plain_tokenizer():
    """A base model's: <s> put before every text, </s> its end, neither chat tokens nor a chat template."""
    from tokenizers import processors

    raw = train_byte_level(["<s>", "</s>"])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return wrap(raw, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def sentencepiece_like_tokenizer():
    """Spaces as U+2581, one put before each text, characters not in the vocabulary as bytes: as Llama 2 and Mistral."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    model = json.loads(raw.to_str())["model"]
    vocab = model["vocab"]
    vocab.pop("\n", None)
    merges = [tuple(m) for m in model["merges"] if "\n" not in "".join(m)]
    vocab |= {f"<0x{byte:02X}>": 1000 + byte for byte in range(256)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens(special)
    return wrap(raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
