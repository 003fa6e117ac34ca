"""A tokenizer in llama.cpp's words. How it splits text is recognised by its structure, not by the model's name."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from transformers import PreTrainedTokenizerBase

from welltuned.errors import InputError

MEND = "export --to merged or --to peft, and run it with vLLM or transformers"
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# The patterns by which byte-level tokenizers split text before merging, as tokenizer.json writes them.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


class Kind(IntEnum):
    """llama.cpp's kinds of token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens in the order of their ids.

    Attributes:
        model: "gpt2" for byte-level pairs, "llama" for SentencePiece's.
        pre: llama.cpp's name for how text is split first.
        scores: () for byte-level pairs.
        space_prefix: whether a text begins with a space of its own; None where that has no meaning.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[Kind, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    space_prefix: bool | None


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """Read a fast tokenizer; `rows` of the embedding beyond its tokens become unused tokens, and added tokens beyond
    the embedding, which the model could not read, are left out.

    Raises:
        InputError: a kind of tokenizer, or a way of splitting text, that is not known here.
    """
    if not tokenizer.is_fast:
        raise InputError("a slow tokenizer cannot be exported to GGUF", mend=MEND)
    said: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = said["model"]
    if model.get("type") != "BPE":
        raise InputError(f"tokenizers of type {model.get('type')} are not exported to GGUF", mend=MEND)
    added = {token["id"]: token for token in said["added_tokens"]}
    by_id = {index: text for text, index in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    beyond = [index for index in by_id if index >= rows and index not in added]
    if beyond:  # added ones may be: Gemma 3 1B's tokenizer has one more than its embedding, an image's
        raise InputError(f"the tokenizer has token {max(beyond)}, and the embedding ends with {rows - 1}", mend=MEND)
    tokens = tuple(by_id.get(index, f"[UNUSED{index}]") for index in range(rows))
    kinds = tuple(_kind(index, by_id, added, model) for index in range(rows))
    merges = tuple(m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    if model.get("byte_fallback"):
        prefix = _space_prefix(said)
        return Vocabulary("llama", "default", tokens, kinds, (), _scores(tokens, kinds, merges), prefix)
    return Vocabulary("gpt2", splitting_of(said), tokens, kinds, merges, (), None)


def _kind(index: int, by_id: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], model: Any) -> Kind:
    if index not in by_id:
        return Kind.UNUSED
    if by_id[index] == model.get("unk_token") and model.get("byte_fallback"):
        return Kind.UNKNOWN
    if index in added:
        return Kind.CONTROL if added[index]["special"] else Kind.USER_DEFINED
    return Kind.BYTE if model.get("byte_fallback") and _BYTE.fullmatch(by_id[index]) else Kind.NORMAL


def _scores(tokens: tuple[str, ...], kinds: tuple[Kind, ...], merges: tuple[str, ...]) -> tuple[float, ...]:
    """llama.cpp merges the pair whose token scores highest: the first merge that makes a token is its rank."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), number)
    return tuple(
        -float(rank[t]) if t in rank and kind is Kind.NORMAL else -1e6 if kind is Kind.NORMAL else 0.0
        for t, kind in zip(tokens, kinds, strict=True)
    )


def splitting_of(said: Mapping[str, Any]) -> str:
    """llama.cpp's name for a byte-level tokenizer's way of splitting text.

    Raises:
        InputError: a way that is not known here; a wrong one would give other tokens, and nobody would notice.
    """
    normalizer = said.get("normalizer")
    steps = _steps(said.get("pre_tokenizer"))
    shape = [step["type"] for step in steps]
    if normalizer is None or normalizer.get("type") == "NFC":
        if shape == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
            return "gpt-2"
        if shape == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
        if shape == ["Split", "ByteLevel"]:
            pattern = (steps[0].get("pattern") or {}).get("Regex")
            if pattern == _QWEN2:
                return "qwen2"
            if pattern == _LLAMA3:
                return "llama-bpe" if said["model"].get("ignore_merges") else "dbrx"
    raise InputError(f"this way of splitting text ({', '.join(shape) or 'none'}) is not known here", mend=MEND)


def _steps(pre: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre is None:
        return []
    return list(pre["pretokenizers"]) if pre["type"] == "Sequence" else [pre]


def _space_prefix(said: Mapping[str, Any]) -> bool:
    """Whether SentencePiece puts a space before a text: by a normaliser that prepends it, or by Metaspace."""
    normalizer = said.get("normalizer") or {}
    parts = normalizer.get("normalizers", [normalizer] if normalizer else [])
    if any(part.get("type") == "Prepend" for part in parts):
        return True
    return any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in _steps(said.get("pre_tokenizer"))
    )


def describe_vocabulary(
    writer: Any, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, template: str | None
) -> None:
    """Write it, with its special tokens and the chat template."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types([int(kind) for kind in vocabulary.kinds])
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    ids = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_eos_token_id: tokenizer.eos_token_id,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
        writer.add_eot_token_id: _turn_end(tokenizer),
    }
    for add, index in ids.items():
        if index is not None:
            add(index)
    written: list[int] = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(written) and written[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(written) and written[-1] == tokenizer.eos_token_id)
    if template is not None:
        writer.add_chat_template(template)


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    vocabulary = tokenizer.get_vocab()
    return next((vocabulary[mark] for mark in TURN_ENDS if mark in vocabulary), None)
