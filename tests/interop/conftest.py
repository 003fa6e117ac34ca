"""The fixtures are files to be read, not modules to be imported."""

from pathlib import Path

import pytest

from welltuned.advice.lint import findings_of
from welltuned.interop import read_config

collect_ignore_glob = ["fixtures/*"]
FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def read(tmp_path):
    """A function that reads a text as a file of that name, and gives its only run."""

    def run(text, name="config.yaml", **options):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        (config,) = read_config(str(path), **options)
        return config

    return run


@pytest.fixture
def ids():
    """A function that gives the ids that a config is found guilty of."""
    return lambda config: [finding.id for finding in findings_of(config)]
