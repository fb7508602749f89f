"""The notebooks of the examples: executed from top to bottom, offline, in a kernel of their own."""

import re
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))


def texts_of(cell):
    return "".join(output["text"] for output in cell["outputs"] if output["output_type"] == "stream")


def test_the_quickstart_aligns_its_policy(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    (path,) = NOTEBOOKS
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=240, startup_timeout=120, resources=resources).execute()
    print(f"{path.name}: {time.perf_counter() - started:.0f} s")
    *_, figure, after = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    first, last = map(float, re.search(r"([\d.]+) in the first step, ([\d.]+) in the last", texts_of(figure)).groups())
    assert last > first + 0.2
    assert any("image/png" in output.get("data", ()) for output in figure["outputs"])
    assert len(texts_of(after).splitlines()) == 4
    assert (tmp_path / "outputs" / "notebook" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    for cell in nbformat.read(path, as_version=4)["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
