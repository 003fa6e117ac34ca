"""Tokenised datasets on disk, one folder a store, named by all that their content depends on.

A folder is written beside its place and renamed into it, so it is whole or not there, and two processes that build the
same one at once do not disturb each other. What is not whole all the same (a full disk, a copy cut short) is built
again.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from welltuned.data.store import ABOUT, ExampleStore, StoreWriter, open_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
FOLDER_VARIABLE = "WELLTUNED_CACHE"
MOST_BYTES = 20 * 10**9  # of all stores together; the least recently used go first
ABANDONED = 24 * 3600  # seconds after which a folder that is still being written belongs to a process that is gone
BESIDE = ".building-"
LONGEST_HEAD = 1_000  # characters of a tokenizer's JSON before its added tokens


class Cache:
    """The cache folder. Whatever is worth a word to the user is added to `notes`."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder or default_folder()
        self.notes: list[str] = []

    def find(self, key: str) -> ExampleStore | None:
        """The store of this name, if it is there and whole."""
        place = self.folder / key
        if not place.is_dir():
            return None
        try:
            store = open_store(place)
        except (OSError, ValueError, KeyError, TypeError):
            self.notes.append(f"The cached tokens in {place} are damaged: they are made again.")
            shutil.rmtree(place, ignore_errors=True)
            return None
        with suppress(OSError):  # a cache that may only be read
            os.utime(place / ABOUT)  # when it was used last
        return store

    def begin(self) -> StoreWriter:
        """A writer beside the stores, or in a temporary folder where the cache cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return StoreWriter(Path(tempfile.mkdtemp(prefix=BESIDE, dir=self.folder)))
        except OSError as error:
            self.notes.append(
                f"The cache folder {self.folder} cannot be written ({error.strerror}): the tokens are kept for this "
                f"run only. Let {FOLDER_VARIABLE} name a folder that can be written."
            )
            return StoreWriter()

    def publish(self, key: str, writer: StoreWriter) -> ExampleStore:
        """Give a closed writer's folder its name. One of two that build the same store at once keeps the other's."""
        store = writer.store()
        if writer.folder is None or writer.temporary:
            return store
        place = self.folder / key
        try:
            writer.folder.rename(place)
        except OSError:
            writer.discard()
        self._prune(place)
        return store

    def _prune(self, used: Path) -> None:
        """Remove what was used least recently, until the rest is small enough, and what a dead process left."""
        found = []
        for place in self.folder.iterdir():
            try:
                if place.name.startswith(BESIDE):
                    if time.time() - place.stat().st_mtime > ABANDONED:
                        shutil.rmtree(place, ignore_errors=True)
                    continue
                size = sum(file.stat().st_size for file in place.iterdir())
                found.append(((place / ABOUT).stat().st_mtime, size, place))
            except OSError:  # another process has just removed it, or it is not ours
                continue
        total = sum(size for _, size, _ in found)
        removed = 0
        for _, size, place in sorted(found):
            if total - removed <= MOST_BYTES:
                break
            if place != used:
                shutil.rmtree(place, ignore_errors=True)
                removed += size
        if removed:
            self.notes.append(
                f"{removed / 1e9:.1f} GB of cached tokens that were not used lately were removed from {self.folder}."
            )


def default_folder() -> Path:
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "welltuned" / "tokens"


def cache_key(
    fingerprint: str,
    name: str,
    tokenizer: "PreTrainedTokenizerBase",
    template: str | None,
    options: Mapping[str, Any],
) -> str:
    """The name of a store: changes with whatever its content depends on.

    That is the source's content and name (origins begin with it), tokenizer, template and options, and this room's own
    code with the libraries that it calls: a row tokenised by an older version must not turn up in a newer one.
    """
    parts = {
        "format": FORMAT_VERSION,
        "source": fingerprint,
        "name": name,
        "tokenizer": tokenizer_digest(tokenizer),
        "template": template,
        # Such a template writes today's date into each row.
        "day": time.strftime("%Y-%m-%d") if template and "strftime_now" in template else None,
        "options": dict(options),
        "code": _code(),
    }
    return blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hex digest of all that decides which ids a text gets."""
    parts: list[Any] = [
        type(tokenizer).__name__,
        tokenizer.special_tokens_map,
        sorted((index, str(token), token.special) for index, token in tokenizer.added_tokens_decoder.items()),
        {key: value for key, value in tokenizer.init_kwargs.items() if isinstance(value, bool)},
    ]
    if tokenizer.is_fast:
        parts.append(_without_lengths(tokenizer.backend_tokenizer.to_str()))
    else:
        parts.append(sorted(tokenizer.get_vocab().items()))
    return blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _without_lengths(state: str) -> str:
    """A tokenizer's JSON without its truncation and padding, which whoever called it last has set.

    They stand before the added tokens; where they do not, the whole is read, which takes half a second.
    """
    head, found, rest = state.partition('"added_tokens"')
    if found and '"truncation"' in head and '"padding"' in head and len(head) < LONGEST_HEAD:
        return rest
    return json.dumps({**json.loads(state), "padding": None, "truncation": None}, sort_keys=True)


@lru_cache(maxsize=1)
def _code() -> str:
    found = blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.name.encode() + path.read_bytes())
    for name in ("transformers", "tokenizers", "jinja2"):
        try:
            found.update(f"{name} {version(name)}".encode())
        except PackageNotFoundError:
            continue
    return found.hexdigest()
