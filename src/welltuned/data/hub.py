"""A dataset of the hub, through `datasets`: from the network, or from its cache where the hub cannot be reached."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING, Any

from welltuned.data.readers import Refuse, Row, raised
from welltuned.errors import InputError

if TYPE_CHECKING:
    import datasets

CONNECT_SECONDS = 3.0  # the hub's own client tries six times and gives up after 23 s
BATCH_ROWS = 256
MEND = "check the name, `subset` and `split`, and the network; or name a local file"


@dataclass(frozen=True, slots=True)
class HubSource:
    """One split of a hub dataset, as rows; its content lies in the cache of `datasets`, which maps it into memory."""

    name: str
    split: str
    dataset: "datasets.Dataset"
    size: int = 0
    note: str | None = None
    skipped: tuple[str, ...] = ()

    def rows(self, refuse: Refuse = raised) -> Iterator[Row]:
        number = 0
        for batch in self.dataset.iter(batch_size=BATCH_ROWS):
            columns = list(batch)
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield Row(dict(zip(columns, values, strict=True)), f"{self.name}:{self.split} row {number}")
        if not number:
            raise InputError("the dataset has no rows", where=f"{self.name}:{self.split}")

    def fingerprint(self) -> str:
        """Of the dataset's own fingerprint, which is the same in every process, and of id, subset and split."""
        own: str = self.dataset._fingerprint  # there is no public name for it
        said = "\0".join((self.name, self.split, own))
        return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()


def open_hub(spec: str, subset: str | None, split: str | None, near: str | None = None) -> HubSource:
    """The dataset, downloaded where that is needed. `near` names a local file that may have been meant."""
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        mend = near or "pip install datasets"
        what = "there is no such file, and hub datasets need the `datasets` package"
        raise InputError(what, where=spec, mend=mend) from error
    chosen = split or "train"
    away = _out_of_reach()
    try:
        dataset = _load(spec, subset, chosen) if away is None else _load_cached(spec, subset, chosen)
    except Exception as error:  # of two libraries and all they use: whatever it is, it is one sentence
        what = f"there is no such file, and no such hub dataset could be loaded ({_sentence(error)})"
        if away is not None:
            what = f"there is no such file, {away}, and its cache cannot serve this ({_sentence(error)})"
        raise InputError(what, where=spec, mend=near or MEND) from error
    note = None
    if away is not None:
        note = f"{away[:1].upper()}{away[1:]}: {spec} comes from the cache, as its subset `{dataset.config_name}`."
    return HubSource(f"{spec}/{subset}" if subset else spec, chosen, dataset, note=note)


def _out_of_reach() -> str | None:
    """Why the hub cannot be asked, None where it can: any answer within three seconds counts.

    In a thread, because looking up a host's name has no time limit of its own.
    """
    import datasets

    if datasets.config.HF_HUB_OFFLINE:
        return "the hub is switched off (HF_HUB_OFFLINE)"
    answers: list[Any] = []
    thread = Thread(target=_ask, args=(datasets.config.HF_ENDPOINT, answers), daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS + 0.5)
    return None if answers else f"the hub ({datasets.config.HF_ENDPOINT}) cannot be reached"


def _ask(endpoint: str, answers: list[Any]) -> None:
    import huggingface_hub

    try:
        answers.append(huggingface_hub.get_session().head(endpoint, timeout=CONNECT_SECONDS))
    except Exception:  # of the HTTP client, whichever that is: no answer
        return


def _load(spec: str, subset: str | None, split: str) -> "datasets.Dataset":
    import datasets

    return datasets.load_dataset(spec, name=subset, split=split)


def _load_cached(spec: str, subset: str | None, split: str) -> "datasets.Dataset":
    """What an earlier load left in the cache, by the builder that `load_dataset` falls back to after its retries."""
    from datasets.packaged_modules.cache.cache import Cache

    builder = Cache(repo_id=spec, dataset_name=spec.split("/")[-1], config_name=subset, version="auto", hash="auto")
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _sentence(error: BaseException) -> str:
    """An error's lines up to its example, as one."""
    lines = []
    for line in str(error).strip().splitlines():
        if line.startswith("Example"):
            break
        lines.append(line.strip())
    return " ".join(lines).rstrip(".")[:400] or type(error).__name__
