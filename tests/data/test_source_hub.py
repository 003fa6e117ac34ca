"""Hub datasets: through `datasets` where the hub answers, from its cache where it does not, and never a long wait."""

import socket
import threading
import time

import pytest

from welltuned.data import hub
from welltuned.data.source import open_source, read_rows
from welltuned.errors import InputError

datasets = pytest.importorskip("datasets")


@pytest.fixture
def reachable(monkeypatch):
    monkeypatch.setattr(hub, "_out_of_reach", lambda: None)


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return tmp_path / "cache"


@pytest.fixture
def cached(no_cache):
    """A function that leaves a subset of `org/tiny` in the cache, as an earlier load does."""

    def leave(subset, **splits):
        place = no_cache / "org___tiny" / subset / "0.0.0" / "0123456789abcdef"
        place.mkdir(parents=True)
        sizes = datasets.SplitDict()
        for split, texts in splits.items():
            held = datasets.Dataset.from_dict({"text": texts})
            with datasets.arrow_writer.ArrowWriter(path=str(place / f"tiny-{split}.arrow")) as writer:
                writer.write_table(held.data.table)
                writer.finalize()
            sizes.add(datasets.SplitInfo(name=split, num_examples=len(texts), dataset_name="tiny"))
        info = datasets.DatasetInfo(
            features=datasets.Features({"text": datasets.Value("string")}),
            splits=sizes, dataset_name="tiny", config_name=subset, version="0.0.0",
        )  # fmt: skip
        info.write_to_directory(str(place))

    return leave


@pytest.fixture
def endpoint(monkeypatch, no_cache):
    """A function that makes a port of this machine the hub: it answers, is silent, or nobody listens."""
    servers = []

    def serve(answer):
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")

        def run():
            try:
                connection, _ = server.accept()
                connection.recv(65536)
                connection.sendall(answer)
                connection.close()
            except OSError:
                return

        if answer is None:
            server.close()
        elif answer:
            threading.Thread(target=run, daemon=True).start()

    yield serve
    for server in servers:
        server.close()


def fails(spec, *arguments):
    with pytest.raises(InputError) as raised:
        read_rows(spec, *arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def loader(calls, failure=None):
    def load(spec, name, split):
        calls.append((spec, name, split))
        if failure is not None:
            raise failure
        return datasets.Dataset.from_dict({"a": [1, 2], "b": [{"c": "x"}, None]})

    return load


def test_rows_subset_split_and_fingerprint(monkeypatch, reachable):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", loader(calls))
    source = open_source("openai/gsm8k", "main")
    rows = list(source.rows())
    assert [row.origin for row in rows] == ["openai/gsm8k/main:train row 1", "openai/gsm8k/main:train row 2"]
    assert [row.record for row in rows] == [{"a": 1, "b": {"c": "x"}}, {"a": 2, "b": None}]
    assert list(source.rows()) == rows
    assert (source.name, source.size, source.note, source.skipped) == ("openai/gsm8k/main", 0, None, ())
    part = open_source("openai/gsm8k", "main", "train[:10%]")
    assert next(part.rows()).origin == "openai/gsm8k/main:train[:10%] row 1"
    assert source.fingerprint() == source.fingerprint() != part.fingerprint()
    assert open_source("gsm8k").name == "gsm8k"
    assert calls == [
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", "main", "train[:10%]"),
        ("gsm8k", None, "train"),
    ]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (ValueError("BuilderConfig 'x' not found. Available: ['main', 'socratic']"), "Available: ['main', 'socratic']"),
        (
            ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\n"
                "Example of usage:\n\t`load_dataset('openai/gsm8k', 'main')`"
            ),
            "(Config name is missing. Please pick one among the available configs: ['main', 'socratic'])",
        ),
        (ValueError("Unknown split \"dev\". Should be one of ['train', 'test']."), "one of ['train', 'test'])"),
        (
            FileNotFoundError("Dataset 'o/x' doesn't exist on the Hub or cannot be accessed."),
            "doesn't exist on the Hub",
        ),
        (KeyError("anything"), "'anything'"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_what_fails_there_is_one_sentence(monkeypatch, reachable, failure, message):
    monkeypatch.setattr(datasets, "load_dataset", loader([], failure))
    found = fails("openai/gsm8k", "x")
    assert found.startswith("openai/gsm8k: there is no such file, and no such hub dataset could be loaded (")
    assert message in found


def test_a_dataset_without_rows(monkeypatch, reachable):
    empty = datasets.Dataset.from_dict({"a": []})
    monkeypatch.setattr(datasets, "load_dataset", lambda spec, name, split: empty)
    assert fails("org/empty") == "org/empty:train: the dataset has no rows"


def test_a_misspelt_file_is_found_before_the_hub_is_blamed(monkeypatch, tmp_path, reachable):
    monkeypatch.setattr(datasets, "load_dataset", loader([], ValueError("no")))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").mkdir()
    assert fails("dataset").endswith("did you mean datasets?")


def test_out_of_reach_is_said_within_five_seconds(monkeypatch, endpoint):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("this one takes 23 s"))
    for answer in (None, b""):  # refused at once; accepted and never answered
        endpoint(answer)
        start = time.perf_counter()
        found = fails("openai/gsm8k")
        assert time.perf_counter() - start < 5
        assert "http://127.0.0.1:" in found and ") cannot be reached, and its cache cannot serve this" in found


def test_any_answer_of_the_hub_counts(monkeypatch, endpoint):
    monkeypatch.setattr(datasets, "load_dataset", loader([]))
    endpoint(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")
    assert len(read_rows("openai/gsm8k")) == 2


@pytest.mark.parametrize("offline", [True, False])
def test_the_cache_serves_without_a_network(monkeypatch, endpoint, cached, offline):
    endpoint(None)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    cached("main", train=["a", "b", "c"], test=["d"])
    rows = read_rows("org/tiny")
    assert [(row.record["text"], row.origin) for row in rows][2] == ("c", "org/tiny:train row 3")
    assert [row.record["text"] for row in read_rows("org/tiny", "main", "test")] == ["d"]
    assert [row.record["text"] for row in read_rows("org/tiny", None, "train[:2]+test")] == ["a", "b", "d"]
    one, other = open_source("org/tiny", "main"), open_source("org/tiny", "main", "train[1:]")
    assert one.fingerprint() == open_source("org/tiny", "main").fingerprint() != other.fingerprint()
    said = "switched off" if offline else "cannot be reached"
    assert said in one.note and one.note.endswith("org/tiny comes from the cache, as its subset `main`.")
    assert said in fails("org/other")
    assert "dev" in fails("org/tiny", "main", "dev")
    cached("socratic", train=["e"])
    found = fails("org/tiny")
    assert "main" in found and "socratic" in found
    assert "main" in fails("org/tiny", "wrong") and "socratic" in fails("org/tiny", "wrong")


def test_without_the_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "hub datasets need the `datasets` package; pip install datasets" in fails("openai/gsm8k")
