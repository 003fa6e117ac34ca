"""Replies from a model: transformers' own batched generation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from welltuned.errors import InputError
from welltuned.models.oom import is_out_of_memory, release_memory

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")


@dataclass(frozen=True, slots=True)
class Decoding:
    """`temperature` 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    batch_size: int = 32


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a reply: the tokenizer's end, the model's own ends, and the usual end-of-turn marks."""
    ends = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    vocabulary = tokenizer.get_vocab()
    ids.update(vocabulary[mark] for mark in _TURN_ENDS if mark in vocabulary)
    return sorted(i for i in ids if i is not None)


def replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding | None = None,
) -> list[str]:
    """One reply a prompt (token ids that end where the assistant begins), end-of-turn token removed.

    Where memory does not suffice for a batch, this and the later ones are smaller.
    """
    decoding = decoding or Decoding()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: less padding
    out, start, size = [""] * len(prompts), 0, decoding.batch_size
    while start < len(order):
        chosen = order[start : start + size]
        texts = _batch_in_memory(model, tokenizer, [prompts[i] for i in chosen], decoding)
        if texts is None:
            size = (len(chosen) + 1) // 2
            continue
        for index, text in zip(chosen, texts, strict=True):
            out[index] = text
        start += len(chosen)
    return out


def _batch_in_memory(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Sequence[int]], decoding: Decoding
) -> list[str] | None:
    """Replies to one batch; None where memory does not suffice and fewer prompts may do."""
    try:
        return _batch(model, tokenizer, prompts, decoding)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or len(prompts) == 1:
            raise
    release_memory()  # here the traceback, and with it the failed pass, is gone
    return None


def stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], decoding: Decoding
) -> Iterator[str]:
    """One reply, piece by piece as it is generated."""
    from threading import Thread

    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = torch.tensor([list(prompt)], device=model.device)
    arguments = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "streamer": streamer,
        **_arguments(model, tokenizer, decoding, len(prompt)),
    }
    failures: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(**arguments)
        except BaseException as error:
            failures.append(error)
            streamer.end()  # else the reader below would wait for ever

    thread = Thread(target=work)
    thread.start()
    yield from streamer
    thread.join()
    if failures:
        raise failures[0]


def _arguments(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding, prompt: int
) -> dict[str, Any]:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # some name none
    room = decoding.max_new_tokens if context is None else min(decoding.max_new_tokens, context - prompt)
    if room < 1:
        what = f"the prompt has {prompt:,} tokens and the model's context only {context:,}"
        raise InputError(what, mend="shorten the conversation")
    ends = stop_ids(model, tokenizer)
    sampling = {"temperature": decoding.temperature} if decoding.temperature > 0 else {}
    return {
        "max_new_tokens": room,
        "do_sample": bool(sampling),
        **sampling,
        "eos_token_id": ends,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0],
    }


@contextmanager
def _contiguous_head_input(model: PreTrainedModel) -> Iterator[None]:
    """Of a prompt only the last position meets the head: a strided batch of vectors, which torch multiplies one by one
    where the head is frozen, with a copy of it for each (28 prompts and SmolLM2: 1.6 GB)."""
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))
    try:
        yield
    finally:
        hook.remove()


@torch.inference_mode()
def _batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Sequence[int]], decoding: Decoding
) -> list[str]:
    width = max(map(len, prompts))
    arguments = _arguments(model, tokenizer, decoding, width)
    ids = torch.full((len(prompts), width), arguments["pad_token_id"])
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # left padding: every reply starts in the same column
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    with _contiguous_head_input(model):
        generated = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **arguments)
    ends = set(arguments["eos_token_id"])
    texts = []
    for row in generated[:, width:].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        texts.append(tokenizer.decode(row[:stop], skip_special_tokens=True))
    return texts
