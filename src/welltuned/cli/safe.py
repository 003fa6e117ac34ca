"""Text of others, made harmless for a terminal: what a row or a file name holds must not move the cursor."""

import re
from unicodedata import category

# Joiners stay, since emoji and Persian need them: they move nothing.
_KEPT = "\u200c\u200d"
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control characters, directions, invisible marks, half pairs, line separators
_PLAIN = re.compile(r"[ -~]*\Z")


def visible(text: str, kept: str = "") -> str:
    r"""The text with every character that a terminal would obey, or not show, written as its escape.

    >>> print(visible("red \x1b[31m, a \u202e turn, caf\u00e9"))
    red \x1b[31m, a \u202e turn, café
    """
    if _PLAIN.match(text):
        return text
    return "".join(c if c in kept or c in _KEPT or category(c) not in _UNSAFE else _escape(c) for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def json_text(text: str) -> str:
    """A JSON document with the same characters as JSON's own escapes; they occur in its strings only."""
    return re.sub(r"[^\n -~]", lambda found: _json_escape(found[0]), text)


def _json_escape(character: str) -> str:
    if category(character) not in _UNSAFE:
        return character
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
