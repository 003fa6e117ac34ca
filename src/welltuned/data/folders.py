"""Which files a folder or a pattern means, and which of them a split's name chooses.

Splits are recognised as on the hub: `train-00000-of-00003.parquet`, `train.jsonl`, `gsm8k_test.jsonl`, `test/a.jsonl`.
Nothing is left out in silence: what is not read is named in the note, in `skipped`, or in an error.
"""

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from welltuned.data.files import PACKINGS, DataFile, data_file, kind_and_packing, reason
from welltuned.errors import InputError
from welltuned.models.paths import named

SPLITS = {  # how a split is spelled in file names → what it is
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("eval", "evaluation"), "eval"),
    **dict.fromkeys(("heldout", "holdout"), "heldout"),
}
SHARD = re.compile(r"(?P<base>.+)-(?P<index>\d{5})-of-(?P<total>\d{5})(-[0-9a-f]+)?")
WORDS = re.compile(r"[^A-Za-z]+")
HELD_OUT = re.compile(r"(held|hold)[-_. ]out")
ABOUT = re.compile(r"\..*|(readme|license|licence)(\..*)?|.*\.md", re.IGNORECASE)  # files about the data, not of it
METADATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
WILDCARD = re.compile(r"[*?\[]")
NAMED_AT_MOST = 5


@dataclass(frozen=True, slots=True)
class Found:
    """The files to read, in order; one sentence on what was chosen among them, if anything; what was not understood."""

    files: tuple[DataFile, ...]
    note: str | None = None
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A data file that is not looked into yet; `place` is relative to the folder or to the pattern's fixed part."""

    path: Path
    name: str
    place: PurePosixPath

    @property
    def stem(self) -> str:
        suffixes = 2 if self.path.suffix.lower() in PACKINGS else 1
        return ".".join(self.place.name.split(".")[:-suffixes])

    @property
    def split(self) -> str | None:
        """`train` of train.jsonl, `train_sft` of train_sft-00000-of-00001.parquet, `test` of test/a.jsonl, or None."""
        shard = SHARD.fullmatch(self.stem)
        base = shard["base"] if shard else self.stem
        word = _split_word(base)
        if word is not None:
            return base if shard else word
        folders = (folder for folder in reversed(self.place.parts[:-1]) if _split_word(folder) is not None)
        return next(folders, None)


def _split_word(text: str) -> str | None:
    """The one word of a name that names a split; None where none or several do."""
    words = {word for word in WORDS.split(HELD_OUT.sub(r"\1out", text.lower())) if word in SPLITS}
    return words.pop() if len(words) == 1 else None


def in_folder(root: Path, name: str, split: str | None) -> Found:
    """All data files below a folder, of one kind and one split."""
    if (root / "dataset_dict.json").is_file() or ((root / "state.json").is_file() and _is_saved(root)):
        return _saved_to_disk(root, name, split)
    below = [(path, PurePosixPath(path.relative_to(root).as_posix())) for path in _walk(root, name)]
    candidates = [_Candidate(path, f"{name.rstrip('/')}/{place}", place) for path, place in below]
    found = _choose(candidates, name, split, "the folder holds no data file")
    _require_all_shards(found.files, name)
    return found


def matching(pattern: str, split: str | None) -> Found:
    """All data files that a pattern such as `data/**/*.jsonl` matches, of one kind and one split."""
    paths = sorted(Path(path) for path in glob.glob(os.path.expanduser(pattern), recursive=True))
    files = [path for path in paths if not path.is_dir()]
    if not files:
        what = "the pattern matches only folders" if paths else "the pattern matches no file"
        raise InputError(what, where=pattern, mend="`**` stands for any folders, `*` for any name in one folder")
    fixed = Path()
    for part in Path(os.path.expanduser(pattern)).parts[:-1]:
        if WILDCARD.search(part):
            break
        fixed /= part
    candidates = [_Candidate(path, str(path), PurePosixPath(path.relative_to(fixed).as_posix())) for path in files]
    return _choose(candidates, pattern, split, "the pattern matches no data file")


def is_pattern(spec: str) -> bool:
    return WILDCARD.search(spec) is not None


def _walk(root: Path, name: str) -> Iterator[Path]:
    """Files below `root` in sorted order, hidden ones left out; links to folders are followed, once."""

    def fail(error: OSError) -> None:
        raise InputError(f"the folder cannot be read ({reason(error)})", where=error.filename or name) from error

    found: list[Path] = []
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        found += [Path(folder, file) for file in files if not ABOUT.fullmatch(file)]
    return iter(sorted(found))


def _choose(candidates: Sequence[_Candidate], name: str, split: str | None, nothing: str) -> Found:
    data = [c for c in candidates if c.place.name not in METADATA and kind_and_packing(c.path) is not None]
    skipped = tuple(c.name for c in candidates if c not in data)
    if not data:
        what = nothing + (f", only {_several(skipped)}" if skipped else "")
        raise InputError(what, where=name, mend="its files end in .jsonl, .json, .csv, .tsv, .parquet or .arrow")
    chosen = _of_split(data, name, split)
    _require_one_kind(chosen, name)
    _require_one_set(chosen, name)
    left = [c.name for c in data if c not in chosen]
    note = None
    if left:
        splits = " and ".join(sorted({f"`{c.split}`" for c in chosen}))
        note = f"Of {name} the split {splits} is read ({_several([c.name for c in chosen])}), not {_several(left)}."
    return Found(tuple(data_file(c.path, c.name) for c in chosen), note, skipped)


def _of_split(data: Sequence[_Candidate], name: str, split: str | None) -> list[_Candidate]:
    """The files of the split; without one: all files if they tell of one split or none, else those of `train`."""
    labels = sorted({c.split for c in data if c.split is not None})
    if split is None:
        unnamed = [c.name for c in data if c.split is None]
        if not labels or (len(labels) == 1 and not unnamed):
            return list(data)
        if unnamed:
            named = [c.name for c in data if c.split is not None]
            what = f"some files carry a split's name ({_several(named)}), others none ({_several(unnamed)})"
            raise InputError(what, where=name, mend="set `split`, or name the files with a pattern")
    wanted = [
        _label(part.strip(), data, labels, name, given=split is not None) for part in (split or "train").split("+")
    ]
    return [c for c in data if c.split in wanted or c.stem in wanted]


def _label(split: str, data: Sequence[_Candidate], labels: Sequence[str], name: str, given: bool) -> str:
    """The label that `split` means: as spelled, else the only one of its kind (`validation` for dev.jsonl)."""
    if split in labels or any(c.stem == split for c in data):
        return split
    mend = f"set `split` to one of {', '.join(labels)}" if labels else "leave `split` out"
    if "[" in split:
        raise InputError("slices of a split are for hub datasets", where=name, mend=mend)
    kind = SPLITS.get(split.lower())
    same = [label for label in labels if kind and SPLITS[_split_word(label) or ""] == kind]
    if len(same) == 1:
        return same[0]
    what = f"several splits could be `{split}`: {', '.join(same)}" if same else f"no file carries the split `{split}`"
    if not labels:
        what += ", and no file name tells of a split"
    raise InputError(what if given or same else f"{what}, which is read by default", where=name, mend=mend)


def _require_one_kind(chosen: Sequence[_Candidate], name: str) -> None:
    by_kind: dict[str, str] = {}
    for c in chosen:
        known = kind_and_packing(c.path)
        if known is not None:
            by_kind.setdefault(known[0], c.place.name)
    if len(by_kind) > 1:
        kinds = ", ".join(f"{kind} ({example})" for kind, example in by_kind.items())
        raise InputError(f"there are several kinds of data file: {kinds}", where=name, mend="name one with a pattern")


def _require_one_set(chosen: Sequence[_Candidate], name: str) -> None:
    """No file both packed and unpacked, no shard of the same name in two folders: those would be read as one."""
    plain: dict[PurePosixPath, str] = {}
    shards: dict[str, _Candidate] = {}
    for c in chosen:
        twin = plain.setdefault(c.place.parent / c.stem, c.name)
        if twin != c.name:
            what = f"the same data seems to be there twice: {twin} and {c.name}"
            raise InputError(what, where=name, mend="remove one, or name the files with a pattern")
        if SHARD.fullmatch(c.stem):
            other = shards.setdefault(c.place.name, c)
            if other is not c:
                what = f"there are several subsets: {other.place.parent} and {c.place.parent} both hold {c.place.name}"
                raise InputError(what, where=name, mend=f"set `subset: {other.place.parent}`, or name its folder")


def _require_all_shards(files: Sequence[DataFile], name: str) -> None:
    """Of three shards three must be there."""
    shards = [(f.path.parent, found) for f in files if (found := SHARD.match(f.path.name))]
    for (_, base, total), group in groupby(sorted(shards, key=_shard_set), key=_shard_set):
        missing = set(range(int(total))) - {int(shard["index"]) for _, shard in group}
        if missing:
            what = f"of the {int(total)} shards of `{base}` {len(missing)} are missing, the first is {min(missing):05d}"
            raise InputError(what, where=name, mend="complete the folder, or name the files with a pattern")


def _shard_set(item: tuple[Path, re.Match[str]]) -> tuple[str, str, str]:
    folder, shard = item
    return str(folder), shard["base"], shard["total"]


def _several(names: Sequence[str]) -> str:
    """`a, b, c`, or the first few and how many more."""
    shown = ", ".join(PurePosixPath(name).name for name in names[:NAMED_AT_MOST])
    return shown + (f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else "")


def _is_saved(root: Path) -> bool:
    return "_data_files" in _read_object(root / "state.json", str(root / "state.json"))


def _saved_to_disk(root: Path, name: str, split: str | None) -> Found:
    """What `datasets.save_to_disk` wrote: a folder with state.json, or one such folder for each split."""
    if not (root / "dataset_dict.json").is_file():
        if split is not None:
            raise InputError("the saved dataset has no splits", where=name, mend="leave `split` out")
        return Found(_saved_files(root, name))
    index = f"{name}/dataset_dict.json"
    splits = _read_object(root / "dataset_dict.json", index).get("splits")
    if not isinstance(splits, list) or not splits or not all(isinstance(label, str) for label in splits):
        raise InputError("the saved dataset names no splits", where=index, mend="save it again")
    chosen = split or (splits[0] if len(splits) == 1 else "train")
    if chosen not in splits:
        mend = f"set `split` to one of {', '.join(splits)}"
        raise InputError(f"the saved dataset has no split `{chosen}`", where=name, mend=mend)
    folder = named(root, chosen, index)
    left = [label for label in splits if label != chosen]
    note = f"Of {name} the split `{chosen}` is read, not {', '.join(left)}." if left else None
    return Found(_saved_files(folder, f"{name.rstrip('/')}/{chosen}"), note)


def _saved_files(root: Path, name: str) -> tuple[DataFile, ...]:
    state = _read_object(root / "state.json", f"{name}/state.json")
    listed = state.get("_data_files") or []
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in listed]
    if not names or not all(isinstance(file, str) for file in names):
        raise InputError("the saved dataset names no data files", where=f"{name}/state.json", mend="save it again")
    if state.get("_indices_data_files"):
        mend = "save it again after `flatten_indices()`"
        raise InputError("the saved dataset keeps the order of its rows in a separate index", where=name, mend=mend)
    where = f"{name}/state.json"
    return tuple(data_file(named(root, file, where), f"{name}/{file}") for file in names if isinstance(file, str))


def _read_object(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the saved dataset cannot be read ({reason(error)})", where=name) from error
    return value if isinstance(value, dict) else {}
