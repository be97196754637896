"""`make demo` prints what the notebook did, and fails when the notebook does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[2]


def _demo(folder: Path, *cells: nbformat.NotebookNode) -> subprocess.CompletedProcess[str]:
    path = folder / "tour.ipynb"
    nbformat.write(new_notebook(cells=list(cells)), path)
    return subprocess.run(
        [sys.executable, "-m", "scripts.demo", str(path)], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.notebook
def test_the_transcript_shows_sources_and_outputs_in_order(tmp_path: Path):
    ran = _demo(
        tmp_path,
        new_markdown_cell("# A tour"),
        new_code_cell("x = 20\nprint('layer', x)"),
        new_code_cell("x + 1"),
    )

    expected = ["# A tour", "In [1]: x = 20", "layer 20", "In [2]: x + 1", "Out[2]: 21", "2 cells"]
    found = [ran.stdout.find(text) for text in expected]
    assert ran.returncode == 0, ran.stderr
    assert -1 not in found
    assert found == sorted(found)


@pytest.mark.notebook
def test_a_failing_cell_fails_the_demo_and_is_shown(tmp_path: Path):
    ran = _demo(tmp_path, new_code_cell("1 / 0"), new_code_cell("print('never')"))

    assert ran.returncode == 1
    assert "ZeroDivisionError" in ran.stdout
    assert "never" not in ran.stdout.replace("print('never')", "")
    assert "failed in code cell 1" in ran.stdout


@pytest.mark.notebook
def test_a_notebook_without_code_is_no_demo(tmp_path: Path):
    ran = _demo(tmp_path, new_markdown_cell("nothing here"))

    assert ran.returncode == 1
    assert "no code cell" in ran.stdout


def test_a_missing_notebook_is_named(tmp_path: Path):
    ran = subprocess.run(
        [sys.executable, "-m", "scripts.demo", str(tmp_path / "gone.ipynb")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert ran.returncode == 2
    assert "gone.ipynb" in ran.stderr
