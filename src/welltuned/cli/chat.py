"""welltuned chat."""

import argparse
import sys
from contextlib import nullcontext

from welltuned.cli.terminal import console, quiet_libraries


def run(arguments: argparse.Namespace) -> int:
    from welltuned.api import Tuned, load
    from welltuned.data.conversation import Message
    from welltuned.models.generate import Decoding, stream

    quiet_libraries()
    tuned: Tuned = load(arguments.run)
    history = [Message("system", arguments.system)] if arguments.system is not None else []
    decoding = Decoding(max_new_tokens=arguments.max_new_tokens)

    def answer(text: str, base: bool) -> str:
        pieces = []
        with tuned.bank.disabled() if base and tuned.bank is not None else nullcontext():
            for piece in stream(
                tuned.model, tuned.tokenizer, tuned.prompt([*history, Message("user", text)]), decoding
            ):
                pieces.append(piece)
                print(piece, end="", flush=True)
        print()
        return "".join(pieces)

    def turn(text: str) -> str:
        if arguments.base and tuned.bank is not None:
            console.print("base:", style="dim")
            answer(text, base=True)
            console.print("tuned:", style="dim")
        return answer(text, base=False)

    if arguments.prompt is not None:
        turn(arguments.prompt)
        return 0
    console.print("Type a message; an empty line or Ctrl-D ends.", style="dim")
    while text := _read():
        reply = turn(text)
        history += [Message("user", text), Message("assistant", reply)]
    return 0


def _read() -> str:
    if sys.stdin.isatty():
        console.print("you: ", end="", style="bold")
    return sys.stdin.readline().strip()
