"""What the README shows runs as it is written, against a real server with the bundled model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
CELLS = [b for b in BLOCKS if "import djinn_nb" not in b and "gpu-box" not in b and "…" not in b]
[PLAIN] = [b for b in BLOCKS if "import djinn_nb" in b]


@pytest.mark.notebook
@pytest.mark.usefixtures("own_user_folders")
def test_the_cells_of_the_readme_run_in_a_notebook(tmp_path: Path):
    notebook = new_notebook(cells=[new_code_cell(block.rstrip()) for block in CELLS])
    place = {"metadata": {"path": str(tmp_path)}}  # some cells save files
    client = NotebookClient(
        notebook,
        timeout=240,
        startup_timeout=240,
        iopub_timeout=120,  # or what is shown late is not kept
        kernel_name="python3",
        resources=place,
    )

    client.execute()

    said = str([cell.outputs for cell in notebook.cells])
    assert len(CELLS) == 9
    assert "layers.20.output" in said
    assert "layers.23.output" in said  # in the table of the logpoint
    assert "differs_at" in said
    assert "first divergence" in said


@pytest.mark.notebook
@pytest.mark.usefixtures("own_user_folders")
def test_the_plain_python_of_the_readme_runs_as_a_script(tmp_path: Path):
    script = tmp_path / "quick_start.py"
    script.write_text(
        PLAIN
        + "print(stop.location, session.layers_executed, len(session.tokens))\nserver.close()\n"
    )

    ran = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True)

    assert ran.returncode == 0, ran.stderr
    location, _, tokens = ran.stdout.splitlines()[-1].split()
    assert location == "layers.20.output"
    assert int(tokens) >= 14


@pytest.mark.parametrize("document", ["README.md", "kernel_server/README.md"])
def test_every_command_line_of_the_server_in_a_document_is_known(document: str):
    text = (ROOT / document).read_text(encoding="utf-8")
    lines = re.findall(r"python -m kernel_server (\w+)([^\n|`]*)", text)

    assert lines
    for command, rest in lines:
        shown = subprocess.run(
            [sys.executable, "-m", "kernel_server", command, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        flags = set(re.findall(r"--[a-z-]+", rest))
        assert shown.returncode == 0, f"{command}: {shown.stderr}"
        assert flags <= set(re.findall(r"--[a-z-]+", shown.stdout)), f"{command}{rest}"


def test_a_notebook_cell_of_the_readme_is_valid():
    notebook = new_notebook(cells=[new_code_cell(block) for block in CELLS])

    nbformat.validate(notebook)
