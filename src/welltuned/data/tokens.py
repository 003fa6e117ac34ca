"""A rendered text with its spans becomes ids, mask and roles.

The text is tokenised once and as a whole, with offsets, and a token is trained when its characters lie in a trained
span. At inference the prompt is tokenised on its own. Where that gives other tokens (one would straddle prompt and
answer; or GPT-2's rule, by which two newlines are one token at the end of a text and two before a word), the text is
split there, so that the model is trained on the ids that it will see. That is done at every answer, trained or not, so
the ids of a row do not depend on what is trained of it.
"""

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from welltuned.data.spans import Rendered
from welltuned.data.speakers import Speaker
from welltuned.data.templates import control_tokens
from welltuned.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = tuple[list[int], list[tuple[int, int]]]  # ids and the characters of each, of one text


class Encoder(Protocol):
    """Texts to ids with offsets, no special tokens added."""

    @property
    def control_ids(self) -> frozenset[int]: ...

    def encode(self, texts: Sequence[str]) -> list[Encoded]: ...


class Tokenised(NamedTuple):
    """ids [n] int32; mask [n] bool, a token that is trained; roles [n] uint8, whose it is (a Speaker's value)."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    roles: NDArray[np.uint8]


class Tokens(NamedTuple):
    """Ids [n], and the characters of each token: starts and ends [n] tile the text, raw_starts [n] as reported."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    raw_starts: NDArray[np.int64]


class FastEncoder:
    """A fast tokenizer of transformers, asked below its Python layer, which costs as much as the tokenising itself."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.backend = tokenizer.backend_tokenizer
        self.control_ids = frozenset(control_tokens(tokenizer).values())

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        self.backend.no_truncation()  # whoever used the tokenizer last may have set these
        self.backend.no_padding()
        self.backend.encode_special_tokens = False
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]


class Tokeniser:
    """Rendered texts to ids, masks and roles."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.control_ids = encoder.control_ids
        self.boundary_splits = 0  # rows that were split where an answer begins
        self.headers: dict[str, list[int]] = {}  # ids of the short texts between a prompt's last control token and end

    def rows(self, rendered: Sequence[Rendered]) -> list[Tokenised]:
        if not rendered:  # transformers cannot encode an empty batch
            return []
        rows = []
        for row, encoded in zip(rendered, self.encoder.encode([row.text for row in rendered]), strict=True):
            tokens = _tokens(*encoded)
            marked, cuts = self._mark(row, tokens)
            if cuts:
                self.boundary_splits += 1
                marked, _ = self._mark(row, self._encode_pieces(row.text, cuts))
            rows.append(marked)
        return rows

    def ids(self, text: str) -> list[int]:
        return list(self.encoder.encode([text])[0][0])

    def _mark(self, row: Rendered, tokens: Tokens) -> tuple[Tokenised, list[int]]:
        """Mask and roles of the tokens, and the borders at which the text has to be split."""
        count = len(tokens.ids)
        mask, roles = np.zeros(count, bool), np.zeros(count, np.uint8)
        trained = [border for span in row.spans for border in span]
        spoken = [border for start, end, _ in row.said for border in (start, end)]
        borders = np.array([*row.starts, *trained, *spoken], np.int64)
        places = np.searchsorted(tokens.ends, borders, "right").tolist()
        cuts = [
            at for at, first in zip(row.starts, places, strict=False) if not self._splits_at(row, tokens, at, first)
        ]
        at_spans, at_said = len(row.starts), len(row.starts) + len(trained)
        for (start, _, speaker), first, stop in zip(
            row.said, places[at_said::2], places[at_said + 1 :: 2], strict=True
        ):
            if first < stop and tokens.starts[first] < start and int(tokens.ids[first]) in self.control_ids:
                first += 1  # the template's, with the whitespace after it
            roles[first:stop] = speaker
        for (_, end), first, stop in zip(
            row.spans, places[at_spans:at_said:2], places[at_spans + 1 : at_said : 2], strict=True
        ):
            # Tokens of no width at `end`: the last bytes of a character before it, or a marker of what comes after it.
            while stop > first and tokens.raw_starts[stop - 1] >= end and tokens.starts[stop - 1] >= end:
                stop -= 1
            if stop < count and tokens.starts[stop] < end:
                if int(tokens.ids[stop]) in self.control_ids:
                    roles[stop] = roles[stop - 1]  # the answer's
                    stop += 1  # an end-of-turn token that takes in the whitespace after it (Phi-3's <|end|>)
                else:
                    cuts.append(end)
            mask[first:stop] = True
        return Tokenised(tokens.ids, mask, roles), cuts

    def _splits_at(self, row: Rendered, tokens: Tokens, start: int, first: int) -> bool:
        """Whether a token begins at `start`, and text[:start], tokenised alone, gives the `first` tokens of the whole.

        A control token separates what is before it from what is after it, so only the text from the last one on (the
        header) can differ.
        """
        if first < len(tokens.ids) and tokens.starts[first] < start:
            return False
        if first == 0:
            return True
        at = first - 1
        while at > 0 and int(tokens.ids[at]) not in self.control_ids:
            at -= 1
        header = row.text[int(tokens.raw_starts[at]) if at else 0 : start]
        alone = self.headers.get(header)
        if alone is None:
            alone = self.ids(header)
            if len(header) <= 100 and len(self.headers) < 1000:
                self.headers[header] = alone
        return bool(alone == tokens.ids[at:first].tolist())

    def _encode_pieces(self, text: str, cuts: Sequence[int]) -> Tokens:
        """Tokens of the text split at `cuts`. Later pieces are encoded after a newline, which is taken off again, so
        that SentencePiece tokenizers don't put the space there that they put at the start of a text."""
        borders = [0, *sorted(set(cuts)), len(text)]
        newline = self.ids("\n")
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end in zip(borders, borders[1:], strict=False):
            piece = text[start:end]
            for lead, skip in ((("\n", len(newline)) if start else ("", 0)), ("", 0)):
                [(piece_ids, piece_offsets)] = self.encoder.encode([lead + piece])
                if piece_ids[:skip] == newline[:skip]:
                    break
            ids += piece_ids[skip:]
            shift = start - len(lead)
            offsets += [(a + shift, b + shift) for a, b in piece_offsets[skip:]]
        return _tokens(ids, offsets)


class SlowTokeniser:
    """The same for a tokenizer without offsets: pieces between the spans' borders, which must be the whole text's
    tokens. Whose the tokens outside the trained spans are is not known."""

    boundary_splits = 0

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self.control_ids = frozenset(control_tokens(tokenizer).values())

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def rows(self, rendered: Sequence[Rendered]) -> list[Tokenised]:
        return [self._row(row) for row in rendered]

    def _row(self, row: Rendered) -> Tokenised:
        ids: list[int] = []
        mask: list[bool] = []
        borders = sorted({0, len(row.text), *(border for span in row.spans for border in span)})
        for start, end in zip(borders, borders[1:], strict=False):
            piece = self.ids(row.text[start:end])
            ids += piece
            mask += [any(a <= start and end <= b for a, b in row.spans)] * len(piece)
        if ids != self.ids(row.text):
            what = "this slow tokenizer gives other tokens for the text in pieces, so the mask is not certain"
            raise InputError(what, where=row.origin, mend="use the model's fast tokenizer (tokenizer.json)")
        trained = np.array(mask, bool)
        return Tokenised(np.array(ids, np.int32), trained, np.where(trained, Speaker.ASSISTANT, 0).astype(np.uint8))


def opening_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The special tokens that the tokenizer puts before a text by itself (BOS, for most of those that do)."""
    bare, full = (list(tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (False, True))
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return full[:at]


def opened(ids: NDArray[np.int32], opening: list[int]) -> NDArray[np.int32]:
    """The ids with the start token before them, unless it is there already."""
    if ids[: len(opening)].tolist() == opening:
        return ids
    return np.concatenate([np.array(opening, np.int32), ids])


def _tokens(ids: list[int], offsets: list[tuple[int, int]]) -> Tokens:
    """Byte-level tokenizers may leave a token's leading spaces out of its offsets: the ends alone are reliable, and
    each token begins where the one before it ended."""
    pairs = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2)
    ends = np.maximum.accumulate(pairs[:, 1])
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(ends)]
    return Tokens(np.array(ids, np.int32), starts, ends, pairs[:, 0])
