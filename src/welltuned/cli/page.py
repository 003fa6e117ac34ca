"""docs/commands.md: every command with its options, from the parser itself.

python -m welltuned.cli.page > docs/commands.md
"""

import argparse
from collections.abc import Iterator

from welltuned.cli.main import build_parser
from welltuned.recipe import FIELDS

HEAD = """\
# Commands

`welltuned COMMAND --help` says the same in a terminal. This page is made from the parser by `make docs`.

Exit codes: 0 fine; 1 the run failed, or a check found an error; 2 the input is wrong, with one sentence that says what,
where and how to mend it (`--debug` adds a traceback). A run that a signal ends is saved first, and gives 128 and the
signal's number: 130 for Ctrl-C. `--json` prints one JSON document on stdout, and everything for people on stderr.
"""


def page() -> str:
    """The whole page, as Markdown."""
    lines = [line for command in _commands(build_parser()) for line in _command(command)]
    return "\n".join([HEAD, *lines]).rstrip() + "\n"


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The commands, each before its own."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield command
                yield from _commands(command)


def _command(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## {parser.prog}"
    yield ""
    yield parser.description or ""
    rows = [action for action in parser._actions if not isinstance(action, argparse._SubParsersAction)]
    rows = [action for action in rows if not {"--help", "--debug"} & set(action.option_strings)]
    if rows:
        yield ""
        yield "| option | what |"
        yield "|---|---|"
    for action in rows:
        words = (action.help or "") % {**vars(action), "prog": parser.prog}
        yield f"| `{_written(action)}` | {_sentence(words)}{_more(action)} |"
    yield ""


def _written(action: argparse.Action) -> str:
    """As it is written in a command: --out DIR, or RUN."""
    value = action.metavar or action.dest.upper()
    if not action.option_strings:
        return str(value)
    return ", ".join(action.option_strings) + (f" {value}" if action.nargs != 0 else "")


def _sentence(words: str) -> str:
    words = words.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").rstrip(".")
    return f"{words[0].upper()}{words[1:]}." if words else ""


def _more(action: argparse.Action) -> str:
    """What the parser knows besides: choices, that it is needed, that it may be given again."""
    said = ""
    if action.choices is not None:
        said += " One of " + ", ".join(f"`{choice}`" for choice in action.choices) + "."
    if action.required and action.option_strings:
        said += " Needed."
    several = isinstance(action, argparse._AppendAction) and not FIELDS.keys() & {action.dest}
    return said + (" May be given several times." if several else "")


if __name__ == "__main__":
    print(page(), end="")
