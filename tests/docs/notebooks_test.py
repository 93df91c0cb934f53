"""Every notebook runs from top to bottom in its own kernel, and its stored outputs are small.

After you change a notebook, `TFBIG_STORE_NOTEBOOKS=1 python -m pytest tests/docs/notebooks_test.py`
stores its new outputs.
"""

import os
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted(pathlib.Path(__file__).parents[2].glob("notebooks/*.ipynb"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# Bytes of a notebook with its outputs. Cloning the repository should stay quick.
LARGEST = 300_000

# Directories that identify the machine, and objects' addresses, which change with every run.
OF_A_MACHINE = re.compile(r"/(tmp|home|root|Users|usr|opt|var|work|content|mnt)/|\b0x[0-9a-f]{8,}")


def test_there_are_notebooks():
    # Otherwise the parametrizations below would be empty and pass.
    assert NOTEBOOKS


@pytest.mark.timeout(400)
@each_notebook
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    # A cell that raises, for example because an assertion fails, raises here.
    NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    assert any(output.output_type == "display_data" for output in _outputs(notebook))
    if os.environ.get("TFBIG_STORE_NOTEBOOKS"):
        _store(notebook, path)


@each_notebook
def test_stored_outputs_are_those_of_a_run(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    # Each cell ran once, in order, with nothing before or between.
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = _outputs(nbformat.read(path, as_version=4))
    assert any("image/png" in output.get("data", ()) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)


@each_notebook
def test_stored_outputs_are_small(path):
    assert path.stat().st_size < LARGEST


@each_notebook
def test_stored_outputs_say_nothing_of_a_machine(path):
    for output in _outputs(nbformat.read(path, as_version=4)):
        for text in _texts(output):
            assert not OF_A_MACHINE.search(text), text


@each_notebook
def test_first_code_cell_installs_on_colab_alone(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert 'if "google.colab" in sys.modules:' in cells[0].source
    assert "%pip install" in cells[0].source
    assert not any("%pip" in cell.source for cell in cells[1:])


def _outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def _texts(output):
    """The text of an output that readers see."""
    if output.output_type == "stream":
        return [output.text]
    return [v for kind, v in output.get("data", {}).items() if kind.startswith("text/")]


def _store(notebook, path):
    """Stores outputs that do not change with every run and interest readers."""
    for cell in notebook.cells:
        # The time of the run.
        cell.metadata.pop("execution", None)
        # TensorFlow's messages about the machine.
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)
