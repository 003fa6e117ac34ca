"""The notebook runs from top to bottom, on a CPU and offline, and was committed as it ran."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "first_run.ipynb"


def test_it_is_committed_with_what_it_printed():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell["outputs"]) for cell in cells) >= len(cells) - 1  # the imports print nothing
    assert all(output.get("name") == "stdout" for cell in cells for output in cell["outputs"])


@pytest.mark.slow
def test_it_runs(tmp_path, smollm2_tokenizer):
    """Also run by .ci/run; the fixture skips it where the demo's model is not installed."""
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    was = ["".join(cell.source) for cell in notebook.cells]
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises where a cell does
    assert was == ["".join(cell.source) for cell in notebook.cells]
    assert (tmp_path / "run" / "report.html").is_file()
