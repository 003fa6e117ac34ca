"""Tokenizers and chat templates of many model families, small: no test by itself, run with `runpy` by those that are.

The templates in templates/ are written after the published formats; the vocabularies are trained here, and only the
control tokens are the families' own, with the flags that they have there.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEMPLATES = Path(__file__).with_name("templates")
CORPUS = [
    "The cat sat on the mat and the dog sat on the log. What is 2 + 2? The answer is 4. im_end im_start",
    "system user assistant model tool Human: Assistant: 48/2 = <<48/2=24>>24 clips in May.\n#### 72\n\n\n",
    "start_header_id end_of_turn channel message final analysis <|end|> </s> [INST] think",
] * 4
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    special: tuple[str, ...]  # control tokens, marked special; the first is bos unless told otherwise, `eos` the end
    plain: tuple[str, ...] = ()  # added tokens that are not marked special
    eos: str = ""
    bos: str | None = None
    model: str = "llama3"  # how text is tokenised: llama3, gpt2, always, first, gemma
    system: bool = True
    tools: bool = False
    lstrip: bool = False
    rstrip: bool = False
    closing: str = ""  # what the template writes after the last turn, unless it asks for an answer
    steady: bool = True  # a turn looks the same whatever follows it


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<|python_tag|>",
)
QWEN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
PHI3 = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
DEEPSEEK_PLAIN = (
    *("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"),
    *("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
)
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
HARMONY = ("<|startoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>")
GRANITE = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>")
COMMAND_R = (
    *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    *("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
)
FAMILIES = {
    "chatml": Family(CHATML, eos="<|im_end|>", model="gpt2"),
    "smollm2": Family(CHATML, eos="<|im_end|>", model="gpt2"),
    "smollm3": Family(CHATML, ("<think>", "</think>"), eos="<|im_end|>"),
    "llama2": Family(("<s>", "</s>"), eos="</s>", model="always"),
    "llama3": Family(LLAMA3, eos="<|eot_id|>"),
    "llama3_2": Family(LLAMA3, eos="<|eot_id|>", tools=True),
    "qwen2_5": Family(CHATML, QWEN[2:4], eos="<|im_end|>", tools=True),
    "qwen3": Family(CHATML, QWEN, eos="<|im_end|>", tools=True, steady=False),
    "mistral_v1": Family(("<s>", "</s>"), eos="</s>", model="always"),
    "mistral_v3": Family(("<s>", "</s>", "[INST]", "[/INST]"), eos="</s>", model="first", steady=False),
    "mistral_tekken": Family(("<s>", "</s>", "[INST]", "[/INST]"), eos="</s>", steady=False),
    "gemma2": Family(GEMMA, ("<h1>",), eos="<eos>", model="gemma", system=False),
    "gemma3": Family(GEMMA, ("<h1>",), eos="<eos>", model="gemma"),
    "phi3": Family(PHI3, eos="<|endoftext|>", model="always", rstrip=True, closing="<|endoftext|>"),
    "phi4": Family((*CHATML, "<|im_sep|>"), eos="<|im_end|>", lstrip=True, rstrip=True),
    "phi4_mini": Family(PHI3, eos="<|endoftext|>", closing="<|endoftext|>"),
    "zephyr": Family(("<s>", "</s>"), eos="</s>", model="always"),
    "deepseek_v3": Family(DEEPSEEK, DEEPSEEK_PLAIN, eos=DEEPSEEK[1]),
    "deepseek_r1": Family(DEEPSEEK, DEEPSEEK_PLAIN, eos=DEEPSEEK[1], steady=False),
    "gpt_oss": Family(HARMONY, eos="<|return|>", tools=True, steady=False),
    "granite3": Family(GRANITE, eos="<|end_of_text|>", tools=True),
    "command_r": Family(COMMAND_R, eos="<|END_OF_TURN_TOKEN|>"),
}  # fmt: skip


@cache
def raw_model(kind):
    """A tokenizer's JSON without any added token."""
    raw = Tokenizer(models.BPE())
    if kind in ("gpt2", "llama3"):
        words = [pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")] if kind == "llama3" else []
        raw.pre_tokenizer = pre_tokenizers.Sequence(
            [*words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")]
        )
        raw.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        raw.train_from_iterator(
            CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
        )
        return raw.to_str()
    scheme = {"always": "always", "first": "first"}.get(kind, "never")
    spaces = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    state = json.loads(raw.to_str())["model"]
    vocab = {"<unk>": 0} | {p: i + 1 for i, p in enumerate(p for p in state["vocab"] if p != "\n")}
    vocab |= {f"<0x{byte:02X}>": 1000 + byte for byte in range(256)}
    merges = [tuple(m) for m in state["merges"] if "\n" not in "".join(m)]
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if kind == "gemma":
        raw.normalizer = normalizers.Replace(" ", "\u2581")
    else:
        raw.pre_tokenizer = spaces
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return raw.to_str()


@cache
def tokenizer_of(name):
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    raw = Tokenizer.from_str(raw_model(family.model))
    strip = {"lstrip": family.lstrip, "rstrip": family.rstrip}
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False, **strip) for t in family.special])
    raw.add_tokens([AddedToken(t, normalized=False) for t in family.plain])
    bos = family.bos or family.special[0]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=family.eos)
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer
