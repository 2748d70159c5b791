"""The guide, run anew with small settings: no cell fails, and every section shows its pictures."""

import json
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from notebooks.execute import GUIDE, executed, tidy

SMALL = {
    "prior": {"images": 8, "steps": 2},
    "finetune": {"steps": 4, "log_every": 1},
    "generate": {"prompts": ["photo of {subject}"], "images_per_prompt": 2, "steps": 2},
    "evaluate": {"class_images": 4},
    "cluster": {"samplers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guide")


@pytest.fixture(scope="module")
def guide(folder: Path) -> NotebookNode:
    notebook = nbformat.read(GUIDE, 4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = f"SETTINGS = {SMALL!r}"
    notebook.cells.append(nbformat.v4.new_code_cell("import sys\nprint(sys.executable)"))
    executed(notebook, folder)
    assert notebook.cells.pop().outputs[0].text.strip() == sys.executable
    tidy(notebook, folder)
    return notebook


def pictures(notebook: NotebookNode) -> dict[str, int]:
    """How many each section shows."""
    shown: dict[str, int] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("##"):
            section = cell.source.splitlines()[0].lstrip("# ")
            shown[section] = 0
        elif cell.cell_type == "code" and shown:
            shown[section] += sum("image/png" in output.get("data", {}) for output in cell.outputs)
    return shown


SHOWN = {
    "1. Set-up": 1, "2. Augmenting the training set": 1, "3. Creating the training set": 1, "4. Fine-tuning": 1, "5. Testing the result": 1, "6. Exercises": 0,
    "Exercise 1: without prior preservation": 1, "Exercise 2: adapters instead of weights": 1, "Exercise 3: a prompt of your own": 1,
    "7. Stable Diffusion 1.4 on two GPUs": 0,
}  # fmt: skip


def test_every_section_shows_its_pictures(guide: NotebookNode):
    assert pictures(guide) == SHOWN


def test_the_shipped_one_was_run_and_is_small():
    shipped = nbformat.read(GUIDE, 4)
    text = json.dumps(shipped)
    shown = pictures(shipped)
    assert {k: n for k, n in shown.items() if not k.startswith("Exercise")} == {k: n for k, n in SHOWN.items() if not k.startswith("Exercise")}
    assert GUIDE.stat().st_size < 1_500_000
    assert not any(noise in text for noise in ("/tmp/", "/home/", "/work/", "it/s]", "Traceback", "Warning"))


def test_what_it_leaves_out_of_the_outputs(guide: NotebookNode, folder: Path):
    text = json.dumps(guide)
    assert str(folder) not in text
    assert "%|" not in text
    assert "class-images: 8 pictures, up to date" in text
