"""An Ollama Modelfile. Its template is taken from what the chat template renders, and must render the same again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from welltuned.data.conversation import Conversation, Message
from welltuned.data.templates import Prompt, render_texts
from welltuned.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MEND = "export --to gguf: the file holds the chat template itself, which llama.cpp and LM Studio read"
_USER, _ANSWER, _SYSTEM, _AGAIN = "@@first@@", "@@answer@@", "@@system@@", "@@second@@"


@dataclass(frozen=True, slots=True)
class Turns:
    """A chat template as text before and after each kind of message.

    Attributes:
        opening: before everything where there is no system message (a default one, say).
        system: around a system message, what stands before everything included.
        user, assistant: around the messages.
        asking: what asks for an answer.
    """

    opening: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    asking: str

    def render(self, messages: Sequence[Message]) -> str:
        """What Ollama will make of the messages, the first of which may be the system's."""
        text = self.opening
        if messages and messages[0].role == "system":
            text, messages = messages[0].content.join(self.system), messages[1:]
        around = {"user": self.user, "assistant": self.assistant}
        return text + "".join(m.content.join(around[m.role]) for m in messages) + self.asking

    def go(self) -> str:
        """The same as a Go template, whose actions stand in double braces."""
        content, system = _action(".Content").join, _action(".System").join(self.system)
        user, assistant = _action('if eq .Role "user"'), _action('else if eq .Role "assistant"')
        turn = f"{user}{content(self.user)}{assistant}{content(self.assistant)}{_action('end')}"
        first = f"{_action('if .System')}{system}{_action('else')}{self.opening}{_action('end')}"
        return f"{first}{_action('range .Messages')}{turn}{_action('end')}{self.asking}"


def _action(text: str) -> str:
    return "{{ " + text + " }}"


def turns_of(tokenizer: "PreTrainedTokenizerBase", template: str) -> Turns:
    """Find the texts around messages by rendering some, and prove that they render others too.

    Raises:
        InputError: a template that does more than writing one message after the other.
    """

    def render(*messages: Message) -> str:
        conversation = Conversation(messages, "a probe")
        return render_texts(tokenizer, template, [Prompt(conversation, len(messages), True)])[0]

    user, answer, again = Message("user", _USER), Message("assistant", _ANSWER), Message("user", _AGAIN)
    system = Message("system", _SYSTEM)
    once, twice = render(user), render(user, answer, again)
    opening_user, _, rest = once.partition(_USER)
    between, _, _ = twice.partition(_USER)[2].partition(_AGAIN)
    after_user, _, after_answer = between.partition(_ANSWER)
    try:
        before_system, _, more = render(system, user).partition(_SYSTEM)
    except InputError:  # Gemma's templates refuse a system message
        before_system, more = "", ""
    found = _assembled(opening_user, rest, after_user, after_answer, before_system, more)
    if found is None:
        raise InputError("the chat template is not one message after the other", where="--to ollama", mend=_MEND)
    probes = [(user,), (user, answer, again), (user, answer, again, answer, user)]
    probes += [(system, *probe) for probe in probes] if more else []
    if any(found.render(probe) != render(*probe) for probe in probes):
        raise InputError("the chat template does more than Ollama's can say", where="--to ollama", mend=_MEND)
    bos = tokenizer.bos_token
    written: list[int] = tokenizer("a").input_ids
    if bos and written and written[0] == tokenizer.bos_token_id:  # Ollama adds it, and once is enough
        found = Turns(
            found.opening.removeprefix(bos),
            (found.system[0].removeprefix(bos), found.system[1]),
            found.user,
            found.assistant,
            found.asking,
        )
    return found


def _assembled(
    opening_user: str, rest: str, after_user: str, after_answer: str, before_system: str, more: str
) -> Turns | None:
    """From: what stands before the first message and after it; between messages; before and after a system message.

    What follows a message ends where the header that asks for an answer begins; what precedes a later user message is
    what follows an answer, less the answer's end: the longest text with which the opening ends too.
    """
    before_user = _common_end(opening_user, after_answer)
    before_user = before_user if not more else _common_end(before_user, more.partition(_USER)[0])
    end = after_answer.removesuffix(before_user)
    opening = opening_user.removesuffix(before_user)
    # The header of an answer in the history is the one that asks for it, or a part of it.
    user_end = rest if after_user.startswith(rest) else None
    if user_end is None:
        return None
    cut = _common_start(rest, end)
    header = rest.removeprefix(cut)
    system_end = more.partition(_USER)[0].removesuffix(before_user) if more else ""
    return Turns(
        opening=opening,
        system=(before_system, system_end),
        user=(before_user, cut),
        assistant=(header + after_user.removeprefix(rest), end),
        asking=header,
    )


def _common_end(a: str, b: str) -> str:
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return a[len(a) - count :]


def _common_start(a: str, b: str) -> str:
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return a[:count]


def modelfile(weights: str, turns: Turns, stops: Sequence[str]) -> str:
    """The text of a Modelfile beside the file `weights`."""
    go = turns.go()
    texts = (turns.opening, *turns.system, *turns.user, *turns.assistant, turns.asking)
    if any('"""' in text or "{{" in text for text in texts):
        raise InputError('the chat template writes """ or {{, which a Modelfile cannot hold', mend=_MEND)
    lines = [f"FROM ./{weights}", f'TEMPLATE """{go}"""']
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'
