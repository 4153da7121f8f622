from __future__ import annotations

import base64
import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.builders import EXAMPLE_PAIRS, QUICK, ROOT

FOLDER = ROOT / "examples"
KERNEL = "python3"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def stored():
    return nbformat.read(FOLDER / "walkthrough.ipynb", as_version=4)


def kinds(notebook):
    """Of the outputs of each cell of code, but for progress and warnings."""
    cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return [
        [sorted(output.get("data", {"text": ""})) for output in cell if output.get("name") != "stderr"]
        for cell in cells
    ]


def pictures(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})]


def test_the_walkthrough_is_stored_with_its_pictures_and_no_paths_of_a_machine(stored):
    found = pictures(stored)
    assert len(found) == 3
    assert all(picture.startswith(PNG) and len(picture) < 200_000 for picture in found)
    printed = "".join(output.text for cell in stored.cells for output in cell.get("outputs", []) if "text" in output)
    assert "/" not in printed.replace("pairs.jsonl", "")


@pytest.mark.real
def test_the_walkthrough_runs_and_gives_what_is_stored(stored, smollm2, minilm, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two threads wait for each other where other work is running
    expected = kinds(stored)
    NotebookClient(stored, timeout=600, kernel_name=KERNEL, resources={"metadata": {"path": str(FOLDER)}}).execute()
    assert kinds(stored) == expected


@pytest.mark.slow
def test_every_cell_of_the_colab_notebook_runs(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(FOLDER / "colab.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = f"""
MODEL, PAIRS, TRAINING_STEPS = {str(tiny_folder)!r}, {str(EXAMPLE_PAIRS)!r}, 1
OPTIONS = {QUICK | {"samples": 14, "held_out_fraction": 0.5, "seed": 1}!r}
"""
    NotebookClient(notebook, timeout=300, kernel_name=KERNEL, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = "".join(output.get("text", "") + output.get("data", {}).get("text/html", "") for output in outputs)
    assert "LaserResult(" in shown and "splaser report" in shown and "matrices have adapters" in shown
    assert (tmp_path / "lasered" / "model.safetensors").is_file()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_badge_of_the_colab_notebook_leads_to_it():
    notebook = nbformat.read(FOLDER / "colab.ipynb", as_version=4)
    urls = re.findall(r"https://colab\.research\.google\.com/github/(\S+?)\)", notebook.cells[0].source)
    assert urls == ["splaser/splaser/blob/main/examples/colab.ipynb"]
    assert "repo_url: https://github.com/splaser/splaser" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
