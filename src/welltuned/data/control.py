"""Control tokens that a row's own text spells (`<|im_end|>` in a user's message) stay text, in training and after.

Which strings are control tokens: the tokenizer's special tokens, and those of its other added tokens with which the
template opens and closes turns (DeepSeek's `<｜User｜>` is not marked special). Thinking tags are an answer's own to
write, so in an assistant's text they keep their token; so does whatever else is an added token and not special, as
`<tool_call>`. Markers that are no tokens at all (`### Response:`) are text wherever they stand, and nothing can tell a
template's from a row's.

How: such a string gets a placeholder before the template sees it, so the template's own are the only ones left in the
rendered text. These are then given spellings that no text has, the row's own strings are put back, and the text is
tokenised, whole, by a copy of the tokenizer that knows its control tokens by those spellings only. So the row's text is
tokenised exactly as a tokenizer without control tokens would do it. Rows without such strings pay for one search.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from welltuned.data.conversation import Conversation, Message
from welltuned.data.templates import Prompt, any_of, render_texts, try_render_texts
from welltuned.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

HIDDEN = "\ufdd2{}\ufdd3"  # noncharacters of Unicode: no text should hold them, no template looks for them
RENAMED = "\ufdd0{}\ufdd1"
STRAY = re.compile("[\ufdd0-\ufdd3]|\\\\ufdd[0-3]", re.IGNORECASE)  # as they are, or as JSON escapes them
THINKING = re.compile("think|thought", re.IGNORECASE)
BRACKETED = re.compile(r"\W.*[^\W\d_].*\W", re.DOTALL)  # <|user|>, [INST]; not an added word
PROBES = (("user",), ("system", "user"), ("user", "assistant", "user"), ("user", "assistant"))


def control_strings(tokenizer: "PreTrainedTokenizerBase", template: str) -> tuple[str, ...]:
    """The strings that are control tokens in a text rendered with this template, and never in a row's own text."""
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    special = [token.content for token in added if token.special]
    others = [t.content for t in added if not t.special and BRACKETED.fullmatch(t.content)]
    others = [text for text in others if not THINKING.search(text)]
    if others:
        probes = [Conversation(tuple(Message(role, "x") for role in roles), "probe") for roles in PROBES]
        prompts = [Prompt(c, len(c.messages), generation_prompt=True) for c in probes]
        texts = [t for t in try_render_texts(tokenizer, template, prompts) if isinstance(t, str)]
        special += [token for token in others if any(token in text for text in texts)]
    return tuple(special)


@dataclass(frozen=True, slots=True)
class Hidden:
    """A conversation with placeholders where it spelled control tokens, and what each placeholder stands for."""

    conversation: Conversation
    spelled: tuple[str, ...]


class Guard:
    """Hides and reveals the control tokens that rows spell, for one tokenizer and template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str):
        self.tokenizer = tokenizer
        self.template = template
        self.strings = control_strings(tokenizer, template)
        self.renamed = {text: RENAMED.format(i) for i, text in enumerate(self.strings)}
        self.in_prompts = re.compile(any_of(self.strings))
        self.in_answers = re.compile(any_of([s for s in self.strings if not THINKING.search(s)]))
        self.in_rendered = re.compile(f"{HIDDEN.format('([0-9]+)')}|{any_of(self.strings)}")

    def hide(self, conversation: Conversation) -> Hidden | None:
        """The conversation with its spelled control tokens replaced; None where it spells none."""
        if not self.strings or not self._spells(conversation):
            return None
        if any(STRAY.search(text) for text in _all_texts(conversation)):
            what = "the row spells a control token and holds one of the noncharacters U+FDD0 to U+FDD3"
            raise InputError(what, where=conversation.origin, mend="take the noncharacters out: they are no text")
        places: dict[str, int] = {}

        def swap(match: re.Match[str]) -> str:
            return HIDDEN.format(places.setdefault(match.group(), len(places)))

        messages = tuple(
            replace(
                m,
                content=self._pattern(m).sub(swap, m.content),
                extra=_swapped(m.extra, self._pattern(m), swap) if m.extra else m.extra,
            )
            for m in conversation.messages
        )
        tools = None if conversation.tools is None else _swapped(conversation.tools, self.in_prompts, swap)
        return Hidden(replace(conversation, messages=messages, tools=tools), tuple(places))

    def require_harmless(self, conversation: Conversation, hidden: Hidden, rendered: str, prompt: bool = False) -> None:
        """InputError if the template does something else when it sees the strings themselves: looks for one of them,
        cuts or escapes the text around it, or refuses the row."""
        shown = re.sub(HIDDEN.format("([0-9]+)"), lambda m: hidden.spelled[int(m[1])], rendered)
        whole = Prompt(conversation, len(conversation.messages), prompt)
        [text] = render_texts(self.tokenizer, self.template, [whole])
        if shown != text or STRAY.search(shown):
            names = ", ".join(map(repr, hidden.spelled[:3]))
            what = f"the row's own text spells {names}, and the chat template treats that in a way of its own"
            raise InputError(what, where=conversation.origin, mend="take it out of the row, or drop the row")

    def reveal(self, text: str, spelled: Sequence[str], borders: Sequence[int]) -> tuple[str, list[int]]:
        """The text as the twin tokenizer reads it, and where its `borders` (positions in `text`) lie there."""
        pieces: list[str] = []
        old, new = [0], [0]
        for match in self.in_rendered.finditer(text):
            own = match[1] is not None
            between = text[old[-1] : match.start()]
            written = spelled[int(match[1])] if own else self.renamed[match.group()]
            pieces += (between, written)
            new += (new[-1] + len(between), new[-1] + len(between) + len(written))
            old += (match.start(), match.end())
        pieces.append(text[old[-1] :])
        places = [bisect_right(old, border) - 1 for border in borders]
        return "".join(pieces), [new[i] + border - old[i] for i, border in zip(places, borders, strict=True)]

    def _spells(self, conversation: Conversation) -> bool:
        for message in conversation.messages:
            pattern = self._pattern(message)
            if pattern.search(message.content):
                return True
            if message.extra and any(pattern.search(text) for text in _texts(message.extra)):
                return True
        return conversation.tools is not None and any(map(self.in_prompts.search, _texts(conversation.tools)))

    def _pattern(self, message: Message) -> re.Pattern[str]:
        return self.in_answers if message.role == "assistant" else self.in_prompts


def _all_texts(conversation: Conversation) -> Iterator[str]:
    for message in conversation.messages:
        yield message.content
        yield from _texts(message.extra)
    yield from _texts(conversation.tools)


def _texts(value: Any) -> Iterator[str]:
    """All strings in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, below in value.items():
            yield from _texts(key)
            yield from _texts(below)
    elif isinstance(value, list | tuple):
        for below in value:
            yield from _texts(below)


def _swapped(value: Any, pattern: re.Pattern[str], swap: Any) -> Any:
    if isinstance(value, str):
        return pattern.sub(swap, value)
    if isinstance(value, Mapping):
        return {_swapped(k, pattern, swap): _swapped(v, pattern, swap) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_swapped(v, pattern, swap) for v in value)
    return value


class Twin:
    """A copy of a tokenizer that knows its control tokens by other spellings; its ids are the original's."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", renamed: Mapping[str, str]):
        self.backend, self.ids_of = _copy(json.loads(tokenizer.backend_tokenizer.to_str()), renamed)
        self.control_ids = frozenset(tokenizer.convert_tokens_to_ids(list(renamed)))
        self.renamed = frozenset(renamed.values())
        spelled = self.backend.encode_batch(list(renamed.values()), add_special_tokens=False)
        for (text, _), encoding in zip(renamed.items(), spelled, strict=True):
            ids = [self.ids_of.get(i, i) for i in encoding.ids]
            if ids != [tokenizer.convert_tokens_to_ids(text)]:
                raise InputError(f"the control token {text!r} cannot be told from its spelling in this tokenizer")

    def encode(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids and character offsets of each text."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [([self.ids_of.get(i, i) for i in e.ids], e.offsets) for e in encodings]


def _copy(state: dict[str, Any], renamed: Mapping[str, str]) -> tuple["Tokenizer", dict[int, int]]:
    """The tokenizer of this state (its tokenizer.json) with tokens renamed, and its ids where they are others.

    A renamed token is renamed in the model's vocabulary too: a model of pieces could otherwise choose it for its
    spelling (Unigram with </s>). A vocabulary whose merges make the token cannot be changed so, and is left.
    """
    from tokenizers import Tokenizer

    state |= {"truncation": None, "padding": None}
    before = {token["content"]: token["id"] for token in state["added_tokens"]}
    state["added_tokens"] = [t | {"content": renamed.get(t["content"], t["content"])} for t in state["added_tokens"]]
    vocab = state["model"]["vocab"]
    if isinstance(vocab, dict):
        changed: Any = {renamed.get(piece, piece): index for piece, index in vocab.items()}
    else:
        changed = [[renamed.get(piece, piece), score] for piece, score in vocab]
    try:
        twin = Tokenizer.from_str(json.dumps(state | {"model": state["model"] | {"vocab": changed}}))
    except Exception:  # what the library raises for merges of tokens that the vocabulary lacks is a bare Exception
        twin = Tokenizer.from_str(json.dumps(state))
    after = {twin.token_to_id(renamed.get(text, text)): index for text, index in before.items()}
    return twin, {new: old for new, old in after.items() if new is not None and new != old}
