"""Build the documentation: `python tools/site.py` writes build/site, or says what is wrong and exits with 1.

The pages are the repository's own Markdown. They are laid out in build/docs as in the repository, with every file that
they link to, so that a link works in both places. Zensical refuses pages, anchors and references that do not exist; the
finished pages are then read again, since it does not look at links to other files, nor at what a page would load.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

PAGES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "notebooks/*.ipynb")
LINK = re.compile(r"(?<!`)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
LOADED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}
NOT_LOADED = {"canonical", "next", "prev", "alternate", "license"}


# ── laying out ───────────────────────────────────────────────────────────────────────────────────────────────────────


def lay_out(root: Path, place: Path) -> list[str]:
    """Copy the pages, and what they link to, from `root` to `place`; what is linked to and does not exist."""
    shutil.rmtree(place, ignore_errors=True)
    waiting = [path for pattern in PAGES for path in sorted(root.glob(pattern))]
    done: set[Path] = set()
    missing: list[str] = []
    while waiting:
        path = waiting.pop()
        if path in done:
            continue
        done.add(path)
        _copy(path, place / path.relative_to(root))
        if path.suffix != ".md":
            continue
        for target in _targets(path):
            if target.is_file() and target.is_relative_to(root):
                waiting.append(target)
            else:
                missing.append(
                    f"{path.relative_to(root)}: {os.path.relpath(target, root)} is no file of the repository"
                )
    return sorted(missing)


def _copy(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, to)
    if path.suffix == ".ipynb":
        to.with_suffix(".md").write_text(as_markdown(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")


def _targets(page: Path) -> Iterator[Path]:
    """The files that a page links to; a notebook's page is made from it."""
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        parts = urlsplit(link)
        if parts.path and not parts.scheme:
            target = Path(os.path.normpath(page.parent / unquote(parts.path)))
            notebook = target.with_suffix(".ipynb")
            yield notebook if target.suffix == ".md" and notebook.is_file() else target


def as_markdown(notebook: dict) -> str:
    """A notebook as a page: its text, its code, and below each what it printed when it last ran."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join("".join(_text(output)) for output in cell["outputs"])
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _text(output: dict) -> str | list[str]:
    return output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"]


# ── reading the finished pages ───────────────────────────────────────────────────────────────────────────────────────


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self._in_style = tag == "style"
        self.anchors |= {given[name] for name in ("id", "name") if name in given and tag != "meta"}
        self.loads += css_loads(given.get("style", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in LOADED and LOADED[tag] in given and given.get("rel") not in NOT_LOADED:
            self.loads.append(given[LOADED[tag]])

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.loads += css_loads(data)


def css_loads(text: str) -> list[str]:
    """What a style sheet asks for: url(...), and @import by name."""
    found = re.findall(r"""url\(([^)]*)\)|@import\s*("[^"]*"|'[^']*')""", text)
    return [(url or name).strip("\"' ") for url, name in found]


def faults(site: Path) -> list[str]:
    """Links that lead nowhere, anchors that are not there, and anything that would be loaded over a network."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for address in [*page.links, *page.loads]:
            if (wrong := _wrong(site, path, pages, address, loaded=address in page.loads)) is not None:
                found.append(f"{path.relative_to(site)}: {wrong}")
    for sheet in site.rglob("*.css"):
        loads = css_loads(sheet.read_text(encoding="utf-8"))
        found += [f"{sheet.relative_to(site)}: loads {load}" for load in loads if _is_elsewhere(load)]
    return list(dict.fromkeys(found))


def _is_elsewhere(address: str) -> bool:
    return address.startswith("//") or urlsplit(address).scheme in ("http", "https")


def _wrong(site: Path, path: Path, pages: dict[Path, Page], address: str, loaded: bool) -> str | None:
    parts = urlsplit(address)
    if _is_elsewhere(address):
        return f"loads {address}" if loaded else None
    if parts.scheme or (path.name == "404.html" and parts.path.startswith("/")):
        return None
    target = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.is_relative_to(site) or not target.is_file():
        return f"{address} leads nowhere"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors | {"__top"}:
        return f"{address}: there is no such anchor"
    return None


# ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _plainly(said: str) -> str:
    """What Zensical said, without colours and without the traceback that ends it."""
    return re.sub(r"\x1b\[[0-9;]*m", "", said).split("Traceback (most recent call last)")[0].rstrip()


def main(root: Path) -> int:
    wrong = lay_out(root, root / "build" / "docs")
    if not wrong:
        command = [Path(sys.executable).with_name("zensical"), "build", "--strict", "--clean"]
        built = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wrong = faults(root / "build" / "site") if built.returncode == 0 else [_plainly(built.stdout)]
    print("\n".join(wrong) or "The documentation is in build/site; open build/site/index.html.", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parents[1]))
