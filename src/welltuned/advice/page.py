"""docs/evidence.md: every rule, what speaks for it and against it, from the same data as `welltuned why`.

python -m welltuned.advice.page docs/evidence.md
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from welltuned.advice.evidence import Grade, Row, rows
from welltuned.advice.settle import shown
from welltuned.advice.why import MEANING, TABLE, UPDATES, Against, Entry, converted, entries, rate_table
from welltuned.recipe import HYPERPARAMETERS, Method, Tune

GRADES = {
    Grade.MEASURED: "measured: a sweep or a controlled comparison",
    Grade.RECIPE: "recipe of a released run: one point, no sweep",
    Grade.VENDOR: "a vendor's rule or default",
    Grade.THEORY: "theory",
    Grade.DERIVED: "derived by this project from other rows",
    Grade.FOLKLORE: "folklore: said often, with no data behind it",
}


def page() -> str:
    """The whole page, as Markdown."""
    return "\n".join([*_head(), *_keys(), *_evidence()]) + "\n"


def _head() -> Iterator[str]:
    yield "# Every rule, and what speaks for and against it"
    yield ""
    yield "Made by `make docs` from `why.yaml`, `rules.yaml` and `evidence.csv` in `src/welltuned/advice`:"
    yield "change those, not this page. `welltuned why KEY` says the same of one key, with `--model` and `--data` of a"
    yield "run of yours."
    yield ""
    yield "Grades of evidence: " + "; ".join(f"**{grade}** {words}" for grade, words in GRADES.items()) + "."
    yield "Access: **P** the primary text was read, **A** its abstract only, **S** someone else's reading of it."
    yield ""
    yield "Why rows differ: " + "; ".join(f"*{reason}*: {words}" for reason, words in MEANING.items()) + "."


def _keys() -> Iterator[str]:
    for key, found in entries().items():
        yield ""
        yield f"## {key}"
        yield ""
        yield HYPERPARAMETERS[key].doc if key in HYPERPARAMETERS else ""
        for entry in found:
            yield from _entry(entry)
        if key == "learning_rate":
            yield from _table()


def scope(entry: Entry) -> str:
    """Of which methods and tunes an entry speaks, empty where of all."""
    methods = "" if len(entry.methods) == len(Method) else ", ".join(entry.methods)
    tunes = "" if len(entry.tunes) == len(Tune) else ", ".join(entry.tunes)
    return " · ".join(part for part in (methods, tunes) if part)


def _entry(entry: Entry) -> Iterator[str]:
    if scope(entry):
        yield ""
        yield f"### {entry.key}: {scope(entry)}"
    yield ""
    yield f"**Rule.** {escaped(entry.rule)}"
    yield ""
    yield "**For.** " + ", ".join(_link(id) for id in entry.evidence)
    if entry.against:
        yield ""
        yield "**Against**, as written."
        yield ""
        for against in entry.against:
            yield f"- {_link(against.row.id)} {_against(entry, against)}"
    yield ""
    yield f"**To settle it.** {escaped(entry.settle)}"


def _against(entry: Entry, against: Against) -> str:
    compared = converted(entry, against)
    said = f"says {escaped(against.row.value)} (*{', '.join(against.because)}*): {escaped(against.says)}."
    if compared is None:
        return said
    sentence = compared.sentence()
    return f"{said} {sentence[0].upper()}{sentence[1:]}."


def _table() -> Iterator[str]:
    yield ""
    yield "### The law at four sizes and three lengths of run"
    yield ""
    setting = f"{TABLE.family}, r {TABLE.r}, alpha {shown(TABLE.alpha)}, batches of {TABLE.batch}"
    yield f"Supervised, {setting}. Above 135M the short runs are extrapolated, and their ranges are wide."
    yield ""
    runs = [f"{tune}, {updates:,}" for tune in ("LoRA", "full") for updates in UPDATES]
    yield f"| size | {' | '.join(runs)} |"
    yield "|---" * (len(runs) + 1) + "|"
    for line in rate_table():
        yield f"| {line.size} | {' | '.join(shown(rate) for rate in (*line.lora, *line.full))} |"


def _evidence() -> Iterator[str]:
    yield ""
    yield "## Evidence"
    yield ""
    yield "| id | grade | what | value | setting | alpha · rate | source |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows().values():
        cells = (row.value, row.setting, row.alpha_x_lr, row.source)
        what = escaped(about(row))
        grade = f"{row.grade}, {row.access}"
        yield f'| <a id="{row.id}"></a>{row.id} | {grade} | {what} | {" | ".join(escaped(cell) for cell in cells)} |'


def about(row: Row) -> str:
    """Of what a row speaks: SFT, llama 8B, LoRA r16: learning_rate."""
    where = " ".join(word for word in (row.family, row.size) if word not in ("", "any", "all"))
    parts = [row.method if row.method != "any" else "", where, row.variant if row.variant != "any" else ""]
    return f"{', '.join(part for part in parts if part)}: {row.hyperparameter}".removeprefix(": ")


def _link(id: str) -> str:
    return f"[{id}](#{id})"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, also in a table."""
    return text.replace("|", "/").replace("*", "\\*").replace("<", "&lt;")


def main(path: str) -> None:
    Path(path).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
