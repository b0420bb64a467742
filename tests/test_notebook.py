"""The notebook of docs/ runs from its first cell to its last, and is stored without what that gives."""

import os
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs/quickstart.ipynb"


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, with a kernel of its own."""
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(project), os.environ.get("PYTHONPATH", ""))))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1].outputs[-1]
    print(last["data"]["text/plain"])
    assert "fid" in last["data"]["text/plain"] and "accuracy" in last["data"]["text/plain"]
    assert (tmp_path / "runs/notebook/export/model_index.json").is_file()
    assert (tmp_path / "runs/notebook_results.html").is_file()
