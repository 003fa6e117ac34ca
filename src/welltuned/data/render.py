"""One function gives a conversation's token ids and its loss mask together.

The text is tokenised once and as a whole, with offsets, and a token is trained when its characters lie in a trained
span. At inference the prompt is tokenised on its own. Where that gives other tokens (one would straddle prompt and
answer; or GPT-2's rule, by which two newlines are one token at the end of a text and two before a word), the text is
split there, so that the model is trained on the ids that it will see. The template writes every special token itself,
so none is added (no double BOS). Control tokens inside users' texts are tokenised as control tokens, as
`apply_chat_template` does too: the audit counts them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from welltuned.data.conversation import Conversation, Defect, Format, Policy
from welltuned.data.spans import LossOn, MaskFrom, Parts, Rendered, rendered_spans
from welltuned.data.templates import MEND_TEMPLATE, control_tokens, resolve_chat_template
from welltuned.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Example", "LossOn", "MaskFrom", "Overlong", "Rendering", "render", "render_all", "trained_texts"]

CHUNK = 512  # conversations tokenised at a time: long enough to use all cores, short enough to bound the memory


class Overlong(StrEnum):
    """What happens to an example of more than `max_length` tokens; each is named in the result."""

    TRUNCATE = "truncate"
    DROP = "drop"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Example:
    """ids [n] int32 and mask [n] bool: mask[t] says that token t is a target. The first token never is."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    origin: str
    cut: bool = False  # shortened to max_length


@dataclass(frozen=True, slots=True)
class Rendering:
    """All examples, how their masks were found, and what was cut, dropped, or tokenised in pieces."""

    examples: list[Example]
    mask_from: MaskFrom
    cut: tuple[str, ...] = ()  # origins of the examples shortened to max_length
    dropped: tuple[Defect, ...] = ()
    boundary_splits: int = 0  # examples split between prompt and answer, since inference tokenises the prompt alone


class Tokens(NamedTuple):
    """Ids [n], and the characters of each token: starts and ends [n] tile the text, raw_starts [n] as reported."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    raw_starts: NDArray[np.int64]


def render(
    conversation: Conversation,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    loss_on: LossOn = LossOn.ASSISTANT,
    max_length: int | None = None,
    instruction_part: str | None = None,
    response_part: str | None = None,
    chat_template: str | None = None,
) -> Example:
    """Ids and mask of one conversation; see `render_all`, of which this is the case of one row."""
    return render_all(
        [conversation],
        tokenizer,
        loss_on=loss_on,
        max_length=max_length,
        instruction_part=instruction_part,
        response_part=response_part,
        chat_template=chat_template,
    ).examples[0]


def render_all(
    conversations: Sequence[Conversation],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    loss_on: LossOn = LossOn.ASSISTANT,
    max_length: int | None = None,
    overlong: Overlong = Overlong.TRUNCATE,
    on_defect: Policy = Policy.ERROR,
    instruction_part: str | None = None,
    response_part: str | None = None,
    chat_template: str | None = None,
) -> Rendering:
    """Ids and masks of all conversations, in order; the rows left out are named in the result.

    `chat_template` is a file, an inline template, `chatml`, or None for the tokenizer's own. A row none of whose tokens
    is trained (cut before its answer, say) is a defect: an error, or dropped under `on_defect`.
    """
    if (instruction_part is None) != (response_part is None):
        missing = "instruction_part" if instruction_part is None else "response_part"
        raise InputError(f"`{missing}` is missing", mend="give both parts, or neither")
    if instruction_part == "" or response_part == "":
        raise InputError("`instruction_part` and `response_part` must not be empty")
    if max_length is not None and max_length < 2:
        raise InputError(f"max_length is {max_length}, and a token is learned from the one before it", mend="give more")
    parts = Parts(instruction_part, response_part) if instruction_part and response_part else None
    template = resolve_chat_template(tokenizer, chat_template)
    if parts is not None and template is None:
        raise InputError("`instruction_part` and `response_part` need a chat template", mend=MEND_TEMPLATE)
    tokeniser = _Tokeniser(tokenizer)
    examples: list[Example] = []
    how: MaskFrom | None = None
    for first in range(0, len(conversations), CHUNK):
        chunk = conversations[first : first + CHUNK]
        if template is None:
            examples += tokeniser.plain(chunk, loss_on)
            how = MaskFrom.PLAIN
        else:
            rendered, chunk_how = rendered_spans(chunk, tokenizer, template, loss_on, parts)
            examples += tokeniser.examples(rendered)
            how = MaskFrom.MARKERS if MaskFrom.MARKERS in (how, chunk_how) else chunk_how
    kept, dropped = _shorten(examples, max_length, overlong, on_defect)
    cut = tuple(e.origin for e in kept if e.cut)
    return Rendering(kept, how or MaskFrom.PREFIXES, cut, dropped, tokeniser.boundary_splits)


def trained_texts(example: Example, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The text of each trained run of tokens, special tokens shown: what the model learns to say."""
    return [str(tokenizer.decode(example.ids[a:b].tolist())) for a, b in trained_runs(example.mask)]


def trained_runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Token ranges [start, end) in which every token is trained."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _shorten(
    examples: Sequence[Example], max_length: int | None, overlong: Overlong, on_defect: Policy
) -> tuple[list[Example], tuple[Defect, ...]]:
    """Examples within max_length and with something to learn; the others as defects, or as an InputError."""
    kept: list[Example] = []
    dropped: list[Defect] = []
    for example in examples:
        length = len(example.ids)
        if max_length is not None and length > max_length:
            what = f"the row has {length:,} tokens, more than max_length {max_length:,}"
            if overlong is Overlong.ERROR:
                raise InputError(what, where=example.origin, mend="raise max_length, or choose to truncate or drop")
            if overlong is Overlong.DROP:
                dropped.append(Defect(example.origin, what))
                continue
            example = Example(example.ids[:max_length], example.mask[:max_length], example.origin, cut=True)
        if not example.mask.any():
            what = "none of the row's tokens is trained"
            what += f": cut to max_length {max_length:,} it loses its whole answer" if example.cut else ""
            if on_defect is Policy.ERROR:
                mend = "raise max_length, or drop such rows" if example.cut else "see what the chat template renders"
                raise InputError(what, where=example.origin, mend=mend)
            dropped.append(Defect(example.origin, what))
            continue
        kept.append(example)
    return kept, tuple(dropped)


class _Tokeniser:
    """Rendered texts to examples, for one tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self.control_ids = frozenset(control_tokens(tokenizer).values())
        self.boundary_splits = 0
        self.headers: dict[str, list[int]] = {}  # ids of the short texts between a prompt's last control token and end

    def examples(self, rendered: Sequence[Rendered]) -> list[Example]:
        rows = self._rows(rendered)
        return [_example(ids, mask, row.origin) for row, (ids, mask) in zip(rendered, rows, strict=True)]

    def plain(self, conversations: Sequence[Conversation], loss_on: LossOn) -> list[Example]:
        """Prompt + completion + end token, with the start token once if the tokenizer adds one by itself."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise InputError("the tokenizer has no end token, so the model would never learn to stop")
        rendered = [_plain_text(c, loss_on) for c in conversations]
        opening = np.array(self._opening_ids(), np.int32)
        examples = []
        for row, (ids, mask) in zip(rendered, self._rows(rendered), strict=True):
            if not np.array_equal(ids[: len(opening)], opening):
                ids = np.concatenate([opening, ids])
                mask = np.concatenate([np.zeros(len(opening), bool), mask])
            if ids[-1] != end:
                ids, mask = np.append(ids, np.int32(end)), np.append(mask, True)
            examples.append(_example(ids, mask, row.origin))
        return examples

    def _rows(self, rendered: Sequence[Rendered]) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """Ids [n] and mask [n] of each text."""
        if not self.tokenizer.is_fast:
            return [self._slow(row) for row in rendered]
        rows = []
        for row, tokens in zip(rendered, self._encode([row.text for row in rendered]), strict=True):
            mask, cuts = self._mark(row, tokens)
            if cuts:
                self.boundary_splits += 1
                tokens = self._encode_pieces(row.text, cuts)
                mask, _ = self._mark(row, tokens)
            rows.append((tokens.ids, mask))
        return rows

    def _opening_ids(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text by itself (BOS, for most of those that do)."""
        bare = self._ids("a", add_special_tokens=False)
        full = self._ids("a", add_special_tokens=True)
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        return full[:at]

    def _ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _mark(self, row: Rendered, tokens: Tokens) -> tuple[NDArray[np.bool_], list[int]]:
        """mask [n] of the tokens inside the spans, and the borders of spans where the text has to be split."""
        mask = np.zeros(len(tokens.ids), bool)
        cuts: list[int] = []
        for start, end in row.spans:
            first = int(np.searchsorted(tokens.ends, start, "right"))
            stop = int(np.searchsorted(tokens.ends, end, "right"))
            # Tokens of no width at `end`: the last bytes of a character before it, or a marker of what comes after it.
            while stop > first and tokens.raw_starts[stop - 1] >= end and tokens.starts[stop - 1] >= end:
                stop -= 1
            straddled = first < len(mask) and tokens.starts[first] < start
            if straddled or not self._prompt_as_at_inference(row.text, tokens, first, start):
                cuts.append(start)
            if stop < len(mask) and tokens.starts[stop] < end:
                if int(tokens.ids[stop]) in self.control_ids:
                    stop += 1  # an end-of-turn token that takes in the whitespace after it (Phi-3's <|end|>)
                else:
                    cuts.append(end)
            mask[first:stop] = True
        return mask, cuts

    def _prompt_as_at_inference(self, text: str, tokens: Tokens, first: int, start: int) -> bool:
        """Whether text[:start], tokenised alone, gives the `first` tokens of the whole. A control token separates what
        is before it from what is after it, so only the text from the last one on (the header) can differ."""
        if first == 0:
            return True
        at = first - 1
        while at > 0 and int(tokens.ids[at]) not in self.control_ids:
            at -= 1
        header = text[int(tokens.raw_starts[at]) if at else 0 : start]
        alone = self.headers.get(header)
        if alone is None:
            alone = self._ids(header)
            if len(header) <= 100 and len(self.headers) < 1000:
                self.headers[header] = alone
        return bool(alone == tokens.ids[at:first].tolist())

    def _encode(self, texts: list[str]) -> list[Tokens]:
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about the model's length: max_length is ours to judge
        )
        return [
            _tokens(ids, offsets) for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

    def _encode_pieces(self, text: str, cuts: Sequence[int]) -> Tokens:
        """Tokens of the text split at `cuts`. Later pieces are encoded after a newline, which is taken off again, so
        that SentencePiece tokenizers don't put the space there that they put at the start of a text."""
        borders = [0, *sorted(set(cuts)), len(text)]
        newline = self._ids("\n")
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end in zip(borders, borders[1:], strict=False):
            piece = text[start:end]
            for lead, skip in ((("\n", len(newline)) if start else ("", 0)), ("", 0)):
                encoded = self.tokenizer(lead + piece, add_special_tokens=False, return_offsets_mapping=True)
                if encoded["input_ids"][:skip] == newline[:skip]:
                    break
            ids += encoded["input_ids"][skip:]
            shift = start - len(lead)
            offsets += [(a + shift, b + shift) for a, b in encoded["offset_mapping"][skip:]]
        return _tokens(ids, offsets)

    def _slow(self, row: Rendered) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """A tokenizer without offsets: pieces between the spans' borders, which must be the whole text's tokens."""
        ids: list[int] = []
        mask: list[bool] = []
        borders = sorted({0, len(row.text), *(border for span in row.spans for border in span)})
        for start, end in zip(borders, borders[1:], strict=False):
            piece = self._ids(row.text[start:end])
            ids += piece
            mask += [any(a <= start and end <= b for a, b in row.spans)] * len(piece)
        if ids != self._ids(row.text):
            what = "this slow tokenizer gives other tokens for the text in pieces, so the mask is not certain"
            raise InputError(what, where=row.origin, mend="use the model's fast tokenizer (tokenizer.json)")
        return np.array(ids, np.int32), np.array(mask, bool)


def _example(ids: NDArray[np.int32], mask: NDArray[np.bool_], origin: str) -> Example:
    mask[:1] = False  # nothing comes before the first token that it could be predicted from
    return Example(ids, mask, origin)


def _plain_text(conversation: Conversation, loss_on: LossOn) -> Rendered:
    if conversation.format is not Format.PROMPT_COMPLETION:
        what = f"the tokenizer has no chat template, and the data are {conversation.format.value}"
        raise InputError(what, where=conversation.origin, mend=MEND_TEMPLATE)
    prompt, completion = (message.content for message in conversation.messages)
    start = 0 if loss_on is LossOn.EVERYTHING else len(prompt)
    return Rendered(prompt + completion, ((start, len(prompt) + len(completion)),), conversation.origin)


def _tokens(ids: list[int], offsets: list[tuple[int, int]]) -> Tokens:
    """Byte-level tokenizers may leave a token's leading spaces out of its offsets: the ends alone are reliable, and
    each token begins where the one before it ended."""
    pairs = np.array(offsets, np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(pairs[:, 1])
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(ends)]
    return Tokens(np.array(ids, np.int32), starts, ends, pairs[:, 0])
