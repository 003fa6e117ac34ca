"""A row as it is shown in a terminal: who says what, what is trained, and what is not."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from rich.table import Table
from rich.text import Text

from welltuned.cli.safe import visible
from welltuned.data.show import Gap, Run, Side
from welltuned.data.speakers import Speaker

NEWLINE, TAB = "\u21b5", "\u21e5"
OPEN, CLOSE = "\u27e6", "\u27e7"  # around what is trained, where there is no colour
TRAINED, TRAINED_CONTROL = "black on green", "bold black on green"
UNTRAINED, UNTRAINED_CONTROL = "dim strike", "dim strike magenta"
REJECTED, REJECTED_CONTROL = "black on red", "bold black on red"
NOT_TEXT = "italic yellow"
_LINES = re.compile(r"[^\n]*\n+|[^\n]+")
_INNER_NEWLINE = re.compile(r"\n[^\n]")


@dataclass(slots=True)
class Line:
    """What stands on one line: up to and with its newlines. `speaker` is whose it is, the template's if nobody's."""

    speaker: Speaker = Speaker.TEMPLATE
    side: Side = Side.NEITHER
    parts: list[Run | Gap] = field(default_factory=list)


def lines_of(shown: Sequence[Run | Gap]) -> list[Line]:
    """A line for each of the text's, and a new one for each message."""
    lines = [Line()]
    breaks = _breaks(shown)
    for number, part in enumerate(shown):
        if number in breaks and lines[-1].parts:
            lines.append(Line())
        if isinstance(part, Gap):
            lines[-1].parts.append(part)
            continue
        for text in _LINES.findall(part.text):
            if lines[-1].speaker is Speaker.TEMPLATE:
                lines[-1].speaker = part.speaker
            lines[-1].side = part.side
            lines[-1].parts.append(replace(part, text=text))
            if text.endswith("\n"):
                lines.append(Line())
    return [line for line in lines if line.parts]


def _breaks(shown: Sequence[Run | Gap]) -> set[int]:
    """The parts before which a line begins that is none in the text: somewhere between two speakers.

    Where the template puts a newline between them, that is enough. Else the line begins after the control token that
    ends the turn, if another follows to begin the next, or with what the template writes between them.
    """
    sides = [part.side if isinstance(part, Run) else None for part in shown]
    found = {i for i in range(1, len(sides)) if sides[i] and sides[i - 1] is not None and sides[i] != sides[i - 1]}
    said = [i for i, part in enumerate(shown) if isinstance(part, Run) and part.speaker is not Speaker.TEMPLATE]
    for before, after in zip(said, said[1:], strict=False):
        between = [part for part in shown[before + 1 : after] if isinstance(part, Run)]
        one, other = shown[before], shown[after]
        assert isinstance(one, Run) and isinstance(other, Run)
        if (not between and one.speaker is other.speaker) or _INNER_NEWLINE.search("".join(r.text for r in between)):
            continue
        controls = [before + 1 + i for i, part in enumerate(shown[before + 1 : after]) if _control(part)]
        found.add(controls[0] + 1 if len(controls) > 1 and not one.control else before + 1)
    return found


def _control(part: Run | Gap) -> bool:
    return isinstance(part, Run) and part.control


def row_table(shown: Sequence[Run | Gap], colour: bool) -> Table:
    """The row, with the speakers' names in the margin."""
    grid = Table.grid(padding=(0, 1), pad_edge=True)
    grid.add_column(no_wrap=True, min_width=10, style="bold" if colour else "")
    grid.add_column(overflow="fold")
    last = None
    for line in lines_of(shown):
        who = str(line.side) or line.speaker.name.lower()
        style = "dim" if line.speaker is Speaker.TEMPLATE and not line.side else ""
        grid.add_row(Text("" if who == last else who, style=style), _coloured(line) if colour else _plain(line))
        last = who
    return grid


def legend(colour: bool) -> Text:
    """What the marks mean."""
    text = Text()
    if colour:
        text.append("trained", TRAINED).append("  ").append("rejected", REJECTED).append("  ")
        text.append("not trained", UNTRAINED).append("  ")
        text.append("<control token>", UNTRAINED_CONTROL)
    else:
        text.append(f"{OPEN}trained{CLOSE}  not trained")
    return text.append(f"  {NEWLINE} a newline  {TAB} a tab  \\x1b a character that cannot be shown")


def _coloured(line: Line) -> Text:
    text = Text()
    for part in line.parts:
        if isinstance(part, Gap):
            text.append(_gap(part), NOT_TEXT)
        elif part.trained and part.side is Side.REJECTED:
            text.append(_written(part.text), REJECTED_CONTROL if part.control else REJECTED)
        elif part.trained:
            text.append(_written(part.text), TRAINED_CONTROL if part.control else TRAINED)
        else:
            text.append(_written(part.text), UNTRAINED_CONTROL if part.control else UNTRAINED)
    return text


def _plain(line: Line) -> Text:
    return Text("".join(_bracketed(line)))


def _bracketed(line: Line) -> Iterator[str]:
    inside = False
    for part in line.parts:
        if isinstance(part, Gap):
            yield _gap(part)
            continue
        if part.trained is not inside:
            yield OPEN if part.trained else CLOSE
            inside = part.trained
        yield _written(part.text).replace(OPEN, "\\u27e6").replace(CLOSE, "\\u27e7")
    yield CLOSE if inside else ""


def _gap(gap: Gap) -> str:
    share = "all" if gap.trained == gap.tokens else f"{gap.trained:,}" if gap.trained else "none"
    return f" … {gap.tokens:,} tokens not shown, {share} of them trained … "


def _written(text: str) -> str:
    return visible(text, kept="\n\t").replace("\n", NEWLINE).replace("\t", TAB + " ")
