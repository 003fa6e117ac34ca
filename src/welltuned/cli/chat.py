"""welltuned chat."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from welltuned.cli.safe import json_text, visible
from welltuned.cli.terminal import console, quiet_libraries
from welltuned.errors import InputError

if TYPE_CHECKING:
    from welltuned.api import Tuned
    from welltuned.data.conversation import Message

_KEPT = "\n\t"  # of a reply's control characters


def run(arguments: argparse.Namespace) -> int:
    if arguments.max_new_tokens < 1:
        raise InputError("must be at least 1", where="--max-new-tokens")
    if arguments.json and arguments.prompt is None:
        raise InputError("answers one prompt", where="--json", mend="add --prompt TEXT")
    from welltuned.api import load, load_base
    from welltuned.data.conversation import Message

    quiet_libraries()
    tuned = load(arguments.run)
    base = load_base(arguments.run, tuned) if arguments.base else None
    talk = _Talk(tuned, base, arguments.max_new_tokens)
    history = [Message("system", arguments.system)] if arguments.system is not None else []
    if arguments.prompt is not None:
        asked = [*history, Message("user", arguments.prompt)]
        if arguments.json:
            print(json_text(json.dumps(talk.document(asked), ensure_ascii=False)))
        else:
            talk.answer(asked)
        return 0
    console.print("Type a message; an empty line or Ctrl-D ends.", style="dim")
    while text := _read():
        reply = talk.answer([*history, Message("user", text)])
        history += [Message("user", text), Message("assistant", reply)]
    return 0


class _Talk:
    """Replies of the tuned model, and of its base beside it where that is asked for."""

    def __init__(self, tuned: "Tuned", base: "Tuned | None", max_new_tokens: int):
        from welltuned.models.generate import Decoding

        self.tuned, self.base, self.decoding = tuned, base, Decoding(max_new_tokens=max_new_tokens)

    def _pieces(self, of: "Tuned", messages: "Sequence[Message]", plain: bool) -> Iterator[str]:
        from welltuned.models.generate import stream

        prompt = self.tuned.prompt(messages)
        with of.bank.disabled() if plain and of.bank is not None else nullcontext():
            yield from stream(of.model, of.tokenizer, prompt, self.decoding)

    def document(self, messages: "Sequence[Message]") -> dict[str, str | None]:
        """Both replies, for `--json`."""
        reply = "".join(self._pieces(self.tuned, messages, plain=False))
        base = None if self.base is None else "".join(self._pieces(self.base, messages, plain=True))
        return {"prompt": messages[-1].content, "reply": reply, "base": base}

    def answer(self, messages: "Sequence[Message]") -> str:
        """Print as it is generated; side by side in a terminal, one after the other elsewhere."""
        if self.base is None:
            return self._plain(self.tuned, messages, plain=False)
        if sys.stdout.isatty():
            return self._side_by_side(self.base, messages)
        console.print("base:", style="dim")
        self._plain(self.base, messages, plain=True)
        console.print("tuned:", style="dim")
        return self._plain(self.tuned, messages, plain=False)

    def _plain(self, of: "Tuned", messages: "Sequence[Message]", *, plain: bool) -> str:
        pieces = []
        for piece in self._pieces(of, messages, plain):
            pieces.append(piece)
            print(visible(piece, _KEPT), end="", flush=True)
        print()
        return "".join(pieces)

    def _side_by_side(self, base: "Tuned", messages: "Sequence[Message]") -> str:
        shown, replies = Console(highlight=False), ["", ""]
        with Live(_columns(replies), console=shown, refresh_per_second=8) as live:
            for index, (of, plain) in enumerate(((base, True), (self.tuned, False))):
                for piece in self._pieces(of, messages, plain):
                    replies[index] += piece
                    live.update(_columns(replies))
        return replies[1]


def _columns(replies: Sequence[str]) -> Table:
    table = Table(box=None, expand=True, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("base", "tuned"):
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(Text(visible(reply, _KEPT)) for reply in replies))
    return table


def _read() -> str:
    if sys.stdin.isatty():
        console.print("you: ", end="", style="bold")
    return sys.stdin.readline().strip()
