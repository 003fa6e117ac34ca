"""One JSON value becomes a text, a message, messages or tools. Whatever else it is gives one sentence with its origin.

Tools and their calls come out in the form that transformers documents for chat templates: `{"type": "function",
"function": {"name": ..., "arguments": {...}}}`. OpenAI's interface has the arguments as a JSON string, and a template
that writes them as JSON would then write a string within a string, which the model would learn.
"""

import json
from collections.abc import Mapping
from typing import Any

from welltuned.data.conversation import Conversation, Message
from welltuned.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
ROLE_OF = {**{role: role for role in ROLES}, **SHAREGPT_ROLES}
KNOWN_ROLES = f"known are {', '.join(ROLE_OF)}"
OPENING = ("system", "developer")
DEEPEST = 100  # levels of nesting in a tool or another field; jinja and json recurse, and Python allows about 1,000


def shown(text: Any) -> str:
    """A name as a sentence can hold it: short, on one line, in printable characters; of other values, their kind."""
    if not isinstance(text, str):
        return kind(text)
    text = text if len(text) <= 60 else text[:60] + "…"
    return text if text.isprintable() else repr(text)


def shown_all(names: Any) -> str:
    """The first names of many, comma between them."""
    names = list(names)
    more = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
    return ", ".join(map(shown, names[:20])) + more


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "a boolean"
    kinds: dict[type, str] = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"of type {type(value).__name__}")


def text(value: Any, place: str, origin: str) -> str:
    """A string as it is, or the text parts of a content list joined; anything else is an error."""
    if not isinstance(value, str):
        value = _joined(value, place, origin)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{place} holds half a surrogate pair, which is not text", where=origin) from error
    return value


def _joined(value: Any, place: str, origin: str) -> str:
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise InputError(f"{place} is {kind(value)}", where=origin, mend="it must be text")
    texts = []
    for part in value:
        found, content = part.get("type"), part.get("text")
        if found is not None and found != "text":
            what = f"{place} has {shown(found)} content, and only text is read"
            raise InputError(what, where=origin, mend="leave such rows out: this trains the text of a model")
        if not isinstance(content, str):
            raise InputError(f"a part of {place} is {kind(content)}", where=origin, mend="its `text` must be text")
        texts.append(content)
    return "".join(texts)


def messages(value: Any, column: str, origin: str) -> tuple[Message, ...]:
    """A list of messages, also one that is written as JSON in a text (a CSV file has no other way)."""
    if isinstance(value, str):
        value = _from_json(value)
    if not isinstance(value, list) or not value:
        found = "empty" if value == [] else kind(value)
        raise InputError(f"`{shown(column)}` is {found}", where=origin, mend="it must be a list of messages")
    return tuple([message(item, column, origin, index) for index, item in enumerate(value)])


def message(item: Any, column: str, origin: str, index: int | None = None) -> Message:
    """A message in either spelling: role/content, or from/value. Nulls among its other fields are left out."""
    if not isinstance(item, dict):
        what = f"{_place(column, index)} is {kind(item)}, not an object with role and content"
        raise InputError(what, where=origin)
    name, content_key = item.get("role"), "content"
    if name is None and "from" in item:
        name, content_key = item["from"], "value"
    role = ROLE_OF.get(name) if isinstance(name, str) else None
    if role is None:
        what = f"{_place(column, index)} has " + ("no role" if name is None else f"the unknown role {shown(name)!r}")
        raise InputError(what, where=origin, mend=KNOWN_ROLES)
    content = item.get(content_key)
    if len(item) == 2 and content_key in item and name != "function_call":
        extra, trained = {}, None
    else:
        extra = {k: v for k, v in item.items() if v is not None and k not in ("role", "from", content_key)}
        trained = _trained(extra, role, _place(column, index), origin)
        if name == "function_call":
            extra["tool_calls"], content = content, ""
        _tidy(extra, role, _place(column, index), origin)
        content = "" if content is None and "tool_calls" in extra else content
    if not isinstance(content, str) or not content.isascii():
        content = text(content, f"the content of {_place(column, index)}", origin)
    if role == "assistant" and (not content or content.isspace()) and not (extra and "tool_calls" in extra):
        raise InputError(f"the row has an empty answer ({_place(column, index)})", where=origin)
    return Message(role, content, extra, trained) if extra or trained is not None else Message(role, content)


def _place(column: str, index: int | None) -> str:
    return f"`{shown(column)}`" if index is None else f"`{shown(column)}[{index}]`"


def _trained(extra: dict[str, Any], role: str, place: str, origin: str) -> bool | None:
    """What the message's own `train` and `weight` say, which are taken out of `extra`."""
    said: bool | None = None
    for key in ("train", "weight"):
        value = extra.pop(key, None)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            what = f"the `{key}` of {place} is neither 0 nor 1"
            raise InputError(what, where=origin, mend="a message is trained or it is not: there is nothing between")
        if said is not None and said != bool(value):
            raise InputError(f"`train` and `weight` of {place} contradict each other", where=origin)
        said = bool(value)
    if said and role != "assistant":
        what = f"{place} says that it is trained, and it is no assistant's message"
        raise InputError(what, where=origin, mend=f"take the mark off, or train everything; its role is {role}")
    return said


def _tidy(extra: dict[str, Any], role: str, place: str, origin: str) -> None:
    """Tool calls into the form that templates expect; every other field must be one that can be written out."""
    call = extra.pop("function_call", None) if role == "assistant" else None
    calls = extra.pop("tool_calls", None)
    if calls or call is not None:
        extra["tool_calls"] = _calls(calls or call, place, origin)
    check_value(extra, place, origin)


def _calls(value: Any, place: str, origin: str) -> list[dict[str, Any]]:
    """Calls of functions: a list of them, one by itself, or either as JSON in a text."""
    if isinstance(value, str):
        value = _from_json(value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        mend = 'write {"name": ..., "arguments": {...}}, or a list of such objects'
        raise InputError(f"{place} has a tool call that is {kind(value)}", where=origin, mend=mend)
    return [_call(item, place, origin) for item in value]


def _call(item: Any, place: str, origin: str) -> dict[str, Any]:
    """One call, whether its name and arguments lie in a `function` of their own or beside the call's other fields."""
    if not isinstance(item, dict):
        raise InputError(f"{place} has a tool call that is {kind(item)}, not an object", where=origin)
    function = item.get("function")
    rest = {k: v for k, v in item.items() if v is not None and k not in ("type", "function")}
    if not isinstance(function, dict):
        name, given = rest.pop("name", None), rest.pop("arguments", None)
        function = {"name": name if function is None else function, "arguments": given}
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise InputError(f"{place} has a tool call without the name of a function", where=origin)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _from_json(arguments) if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        what = f"{place} calls {shown(function['name'])} with arguments that are {kind(arguments)}"
        raise InputError(what, where=origin, mend="they must be a JSON object")
    return {**rest, "type": "function", "function": {**function, "arguments": arguments}}


def tools(value: Any, column: str, origin: str) -> tuple[Mapping[str, Any], ...] | None:
    """The tools of a row: a list of objects, or the same as JSON in a text; None where there are none."""
    if not value:
        return None
    found = _from_json(value) if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        what = (
            f"`{shown(column)}` is {'a text that is not JSON' if isinstance(found, str) else 'not a list of objects'}"
        )
        raise InputError(what, where=origin, mend="it must be a list of tools, each an object")
    check_value(found, f"`{shown(column)}`", origin)
    return tuple([_tool(tool) for tool in found]) or None


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    bare = "name" in tool and tool.get("function") is None and tool.get("type") in (None, "function")
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} if bare else tool


def check_value(value: Any, place: str, origin: str) -> None:
    """InputError where a nested value holds half a surrogate pair, or is nested too deep to be written out."""
    level, depth = [value], 0
    while level:
        if depth > DEEPEST:
            raise InputError(f"{place} is nested more than {DEEPEST} levels deep", where=origin)
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and not item.isascii():
                text(item, f"a text in {place}", origin)
        level, depth = below, depth + 1


def _from_json(value: str) -> Any:
    """What a text says in JSON; the text itself where it is none, so that the caller's sentence says so."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def check_turns(conversation: Conversation) -> None:
    """InputError unless the turns are in an order from which something can be learnt."""
    roles = [message.role for message in conversation.messages]
    if "assistant" not in roles[conversation.trained_from :]:
        raise InputError("the row has no answer (no assistant message)", where=conversation.origin)
    start = 0
    while roles[start] in OPENING:
        if roles[start] in roles[:start]:
            what = f"the row has two {roles[start]} messages"
            raise InputError(what, where=conversation.origin, mend="make them one, at the start")
        start += 1
    if start == 0 and roles[0] != "user":
        what = f"the row begins with {_article(roles[0])} message, so there is nothing that it answers"
        raise InputError(what, where=conversation.origin, mend="put the user's message before it, or drop the row")
    if "system" in roles[start:] or "developer" in roles[start:]:
        late = next(role for role in roles[start:] if role in OPENING)
        what = f"the row has two {late} messages" if late in roles[:start] else f"a {late} message comes after others"
        raise InputError(what, where=conversation.origin, mend="make them one, at the start")
    if conversation.trained_from and any(m.trained for m in conversation.messages[: conversation.trained_from]):
        what = "a message of the prompt says that it is trained, and prompts never are"
        raise InputError(what, where=conversation.origin, mend="take its `train` or `weight` away")


def _article(role: str) -> str:
    return f"an {role}" if role[0] in "aeiou" else f"a {role}"
