"""Conversations rendered with a chat template: text, trained spans, who says what, and control tokens told apart."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from welltuned.data.control import Guard, Hidden, Twin
from welltuned.data.conversation import Conversation
from welltuned.data.parts import Parts
from welltuned.data.spans import LossOn, MaskFrom, Rendered, prefix_turns, rendered_spans
from welltuned.data.speakers import Said, Span, Speakers, who_says
from welltuned.data.templates import Prompt, closing_text, render_texts
from welltuned.data.tokens import Tokenised, Tokeniser
from welltuned.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Chat:
    """What one chat template needs: the guard of control tokens, who says what, and the twin tokenizer if needed."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str):
        self.tokenizer = tokenizer
        self.template = template
        self.guard = Guard(tokenizer, template)
        self.speakers = Speakers(tokenizer, template)
        self.twin: Tokeniser | None = None
        self.closing: str | None = None  # what the template writes after the last turn, when asked for

    def rows(
        self, conversations: Sequence[Conversation], loss_on: LossOn, parts: Parts | None
    ) -> tuple[list[Rendered], MaskFrom]:
        """Each conversation's text with its trained spans, and who says what."""
        rows, how = rendered_spans(conversations, self.tokenizer, self.template, loss_on, parts, self._closing())
        spoken = []
        for conversation, row in zip(conversations, rows, strict=True):
            spans = self.speakers.spans(conversation, row.text, row.answers)
            trained = row.spans
            if loss_on is LossOn.EVERYTHING and any(m.trained is False for m in conversation.messages):
                trained = _without(row, conversation, spans)
            spoken.append(replace(row, spans=trained, said=who_says(conversation, spans)))
        return spoken, how

    def prompt(self, conversation: Conversation) -> tuple[Hidden | None, Rendered]:
        """The text with its generation prompt; answers in it begin where the model began them."""
        hidden = self.guard.hide(conversation)
        shown = conversation if hidden is None else hidden.conversation
        [text] = render_texts(self.tokenizer, self.template, [Prompt(shown, len(shown.messages), True)])
        if hidden is not None:
            self.guard.require_harmless(conversation, hidden, text, prompt=True)
        [turns] = prefix_turns([shown], [text], self.tokenizer, self.template, self._closing())
        starts = sorted(turn[0] for turn in turns.values() if isinstance(turn, tuple))
        return hidden, Rendered(text, (), conversation.origin, starts=tuple(starts))

    def _closing(self) -> str:
        if self.closing is None:
            self.closing = closing_text(self.tokenizer, self.template)
        return self.closing

    def tokenised(self, rows: Sequence[tuple[Rendered, Hidden]]) -> list[Tokenised]:
        """Tokens of rows that spell control tokens: the template's are control tokens, the rows' are text."""
        if not self.tokenizer.is_fast:
            what = "the row spells a control token, and a slow tokenizer cannot tell it from the template's"
            raise InputError(what, where=rows[0][0].origin, mend="use the model's fast tokenizer (tokenizer.json)")
        if self.twin is None:
            self.twin = Tokeniser(Twin(self.tokenizer, self.guard.renamed))
        revealed = [self._revealed(row, hidden) for row, hidden in rows]
        result = self.twin.rows(revealed)
        for row, tokens in zip(revealed, result, strict=True):
            written = row.text.count("\ufdd0")
            if sum(int(i) in self.twin.control_ids for i in tokens.ids) != written:
                what = "the row spells a control token, and the tokenizer reads that as the token even as plain text"
                raise InputError(what, where=row.origin, mend="take it out of the row, or drop the row")
        return result

    def _revealed(self, row: Rendered, hidden: Hidden) -> Rendered:
        borders = [b for span in (*row.spans, *((s, e) for s, e, _ in row.said)) for b in span] + list(row.starts)
        text, places = self.guard.reveal(row.text, hidden.spelled, borders)
        trained = 2 * len(row.spans)
        spoken = trained + 2 * len(row.said)
        spans = tuple(zip(places[:trained:2], places[1:trained:2], strict=True))
        ends = zip(row.said, places[trained:spoken:2], places[trained + 1 : spoken : 2], strict=True)
        said: tuple[Said, ...] = tuple((start, end, speaker) for (_, _, speaker), start, end in ends)
        return replace(row, text=text, spans=spans, said=said, starts=tuple(places[spoken:]))


def _without(row: Rendered, conversation: Conversation, spans: Mapping[int, Span]) -> tuple[Span, ...]:
    """The row's trained spans without the messages that are marked not to be trained."""
    left_out = [i for i, message in enumerate(conversation.messages) if message.trained is False]
    unknown = next((i for i in left_out if i not in spans and conversation.messages[i].content.strip()), None)
    if unknown is not None:
        what = f"message {unknown} is not to be trained, and it is not found in what the chat template renders"
        raise InputError(what, where=row.origin, mend="train on the assistant's turns only")
    trained = list(row.spans)
    for start, end in (spans[i] for i in left_out if i in spans):
        trained = [(s, e) for a, b in trained for s, e in ((a, min(b, start)), (max(a, end), b)) if s < e]
    return tuple(trained)
