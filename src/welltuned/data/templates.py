"""Chat templates: which one is used, and texts rendered with it; a template's failure names the row it failed on."""

import json
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from welltuned.data.conversation import Conversation, Message
from welltuned.data.deadline import limited, require_short
from welltuned.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML_NAME = "chatml"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
NO_VALUES: Mapping[str, Any] = MappingProxyType({})
MEND_TEMPLATE = "set `chat_template: chatml` in the recipe, or use a model that has a chat template"


@dataclass(frozen=True, slots=True)
class Prompt:
    """The first `turns` messages of a conversation, with or without the header that asks for an answer."""

    conversation: Conversation
    turns: int
    generation_prompt: bool = False


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Text and id of the tokens that a tokenizer matches whole (<|im_end|>, </s>, ...); whitespace ones left out."""
    added = tokenizer.added_tokens_decoder
    return {token.content: index for index, token in added.items() if token.content.strip()}


def any_of(strings: Sequence[str]) -> str:
    """A regular expression for any of the strings, the longest that fits; branching by character, since thousands of
    alternatives tried one by one at every `<` are slow."""
    if not strings:
        return "(?!)"
    tree: dict[str, Any] = {}
    for string in strings:
        node = tree
        for character in string:
            node = node.setdefault(character, {})
        node[""] = {}
    return _branch(tree)


def _branch(node: dict[str, Any]) -> str:
    options = [re.escape(character) + _branch(below) for character, below in node.items() if character]
    if not options:
        return ""
    joined = options[0] if len(options) == 1 else f"(?:{'|'.join(options)})"
    return f"(?:{joined})?" if "" in node else joined


def resolve_chat_template(
    tokenizer: "PreTrainedTokenizerBase", spec: str | None = None, values: Mapping[str, Any] = NO_VALUES
) -> str | None:
    """The jinja text: the tokenizer's own (None where it has none), `chatml`, an inline template, or a file's; with
    `values` for its variables.

    The named ChatML ends a turn with the tokenizer's own end token where <|im_end|> is not one of its tokens, since a
    model that spells out its end-of-turn in pieces would not stop there.
    """
    template = _resolved(tokenizer, spec)
    if values and template is None:
        raise InputError("the tokenizer has no chat template", where="chat_template_kwargs", mend=MEND_TEMPLATE)
    return None if template is None else with_values(template, values)


def _resolved(tokenizer: "PreTrainedTokenizerBase", spec: str | None) -> str | None:
    if spec is None:
        try:
            return tokenizer.get_chat_template() if tokenizer.chat_template else None
        except ValueError as error:
            raise InputError(f"the tokenizer's chat templates have no default ({error})", mend=MEND_TEMPLATE) from error
    if spec == CHATML_NAME:
        if "<|im_end|>" in control_tokens(tokenizer):
            return CHATML
        if tokenizer.eos_token is None:
            raise InputError("the tokenizer has neither <|im_end|> nor an end token", where="chat_template")
        return CHATML.replace("'<|im_end|>'", "eos_token")
    if "{{" in spec or "{%" in spec:
        return spec
    try:
        return Path(spec).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        mend = "give a template file, an inline template, or the name `chatml`"
        raise InputError(f"{spec} is not a readable template ({error})", where="chat_template", mend=mend) from error


def with_values(template: str, values: Mapping[str, Any]) -> str:
    """The template with these values for its variables, unless whoever renders it gives others.

    They are part of the text, so whatever has the template has them too: the Run, chat, a merged model, a server. The
    newline is one that transformers' `trim_blocks` takes away again, so the template begins where it began.

    Raises:
        InputError: the template does not ask for one of them, or gets it from elsewhere.
    """
    for name in values:
        if name in _GIVEN:
            what = f"{name} is given to every chat template with the row"
            raise InputError(what, where="chat_template_kwargs", mend=f"take {name} out")
        if not re.search(rf"\b{re.escape(name)}\b", template):
            what = f"the chat template never asks for {name}"
            raise InputError(what, where="chat_template_kwargs", mend="see what its variables are called")
    return preset(values) + template if values else template


def preset(values: Mapping[str, Any]) -> str:
    """What is put before a template to give its variables values."""
    sets = (f"{{% if {n} is not defined %}}{{% set {n} = {_literal(v)} %}}{{% endif %}}" for n, v in values.items())
    return "".join(sets) + "\n"


# What transformers hands to a template by itself.
_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


def _literal(value: Any) -> str:
    """The value as jinja writes it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value, ensure_ascii=False)


def has_generation_markers(template: str) -> bool:
    return GENERATION.search(template) is not None


def render_texts(tokenizer: "PreTrainedTokenizerBase", template: str, prompts: Sequence[Prompt]) -> list[str]:
    """The text of each prompt; InputError with the origin of the first that the template cannot render."""
    texts = []
    for text in try_render_texts(tokenizer, template, prompts):
        if isinstance(text, InputError):
            raise text
        texts.append(text)
    return texts


def try_render_texts(
    tokenizer: "PreTrainedTokenizerBase", template: str, prompts: Sequence[Prompt]
) -> list[str | InputError]:
    """The text of each prompt, or why the template cannot render it. Prompts without tools are rendered as one batch,
    which costs a third less."""
    texts: list[str | InputError] = [""] * len(prompts)
    batches: dict[bool, list[int]] = {False: [], True: []}
    for index, prompt in enumerate(prompts):
        if prompt.conversation.tools is None:
            batches[prompt.generation_prompt].append(index)
        else:
            texts[index] = _render_one(tokenizer, template, prompt)
    for generation_prompt, indices in batches.items():
        chats = [_chat(prompts[i]) for i in indices]
        try:
            with limited():
                rendered: Sequence[Any] = tokenizer.apply_chat_template(
                    chats, chat_template=template, add_generation_prompt=generation_prompt, tokenize=False
                )
        except _template_failures():
            rendered = [_render_one(tokenizer, template, prompts[i]) for i in indices]
        for index, text in zip(indices, rendered, strict=True):
            texts[index] = (
                text if isinstance(text, InputError) else require_short(text, prompts[index].conversation.origin)
            )
    return texts


def render_marked(
    tokenizer: "PreTrainedTokenizerBase", template: str, conversation: Conversation
) -> tuple[str, list[tuple[int, int]]]:
    """The full text, and the character spans [(start, end)] inside {% generation %} ... {% endgeneration %}."""
    from transformers.utils.chat_template_utils import render_jinja_template

    special: dict[str, Any] = dict(tokenizer.special_tokens_map)
    try:
        with limited():
            rendered: Any = render_jinja_template(
                conversations=[_chat(Prompt(conversation, len(conversation.messages)))],
                tools=_tools(conversation),
                chat_template=template,
                return_assistant_tokens_mask=True,
                **special,
            )
    except _template_failures() as error:
        raise _failure(error, conversation.origin) from error
    texts, spans = rendered
    return texts[0], [(int(start), int(end)) for start, end in spans[0]]


def _render_one(tokenizer: "PreTrainedTokenizerBase", template: str, prompt: Prompt) -> str | InputError:
    try:
        with limited():
            text = tokenizer.apply_chat_template(
                _chat(prompt),
                tools=_tools(prompt.conversation),
                chat_template=template,
                add_generation_prompt=prompt.generation_prompt,
                tokenize=False,
            )
    except _template_failures() as error:
        return _failure(error, prompt.conversation.origin)
    return str(text)


def _chat(prompt: Prompt) -> list[dict[str, Any]]:
    return [message.to_template() for message in prompt.conversation.messages[: prompt.turns]]


def _tools(conversation: Conversation) -> list[Any] | None:
    return None if conversation.tools is None else list(conversation.tools)


def _template_failures() -> tuple[type[Exception], ...]:
    """A template's own raise_exception and syntax errors, and what its expressions raise on unexpected values."""
    import jinja2

    wrong = TypeError, ValueError, LookupError, AttributeError, ArithmeticError
    return jinja2.TemplateError, *wrong, RecursionError, MemoryError


def _failure(error: Exception, origin: str) -> InputError:
    import jinja2

    if isinstance(error, jinja2.TemplateSyntaxError):
        return InputError(f"line {error.lineno} is not valid jinja ({error.message})", where="chat_template")
    what = f"the chat template cannot render this row ({error or type(error).__name__})"
    return InputError(what, where=origin, mend="change the row, or give another `chat_template`")


def closing_text(tokenizer: "PreTrainedTokenizerBase", template: str) -> str:
    """What the template writes after the last turn's end when no answer is asked for, as the end of the whole text
    (Phi-3's <|endoftext|>) or as a generation prompt that nobody asked for; "" for most.

    It follows the last answer and no other, and a turn's end or the beginning of a header tells it from the answer's
    own end (gpt-oss ends the last answer with another token, which is the answer's).
    """
    turns = (Message("user", "first"), Message("assistant", "@answer@"), Message("user", "second"))
    probe = Conversation(turns, "probe")
    prompts = [Prompt(probe, 2), Prompt(probe, 3, generation_prompt=True), Prompt(probe, 1, generation_prompt=True)]
    last, inner, asked = (t if isinstance(t, str) else "" for t in try_render_texts(tokenizer, template, prompts))
    if last.count("@answer@") != 1 or inner.count("@answer@") != 1:
        return ""
    tail, following = (text.split("@answer@")[1] for text in (last, inner))
    common = os.path.commonprefix([tail, following])
    if common == tail:
        return ""
    ends = [common.find(token) + len(token) for token in control_tokens(tokenizer) if token in common]
    if ends:
        return tail[min(ends) :]
    rest = tail[len(common) :]
    return rest if asked.rpartition("first")[2].endswith(rest) else ""
