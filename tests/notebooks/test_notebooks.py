"""Every notebook runs, and every evaluation notebook can fail: its form, its verdict, its run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from notebooks.evaluate import evaluation_notebooks

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
ALL = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
JUDGED = evaluation_notebooks()
by_name = pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
judged_by_name = pytest.mark.parametrize("path", JUDGED, ids=lambda p: p.stem)

#: Put before the verdict: spoils each of its inputs by itself.
SPOIL = """
import dataclasses
from notebooks.harness.verdict import VerdictFailed, failures

def spoiled(criterion):
    if isinstance(criterion.limit, str):
        return dataclasses.replace(criterion, value=criterion.limit + "?")
    wrong = {"==": criterion.limit + 1, "!=": criterion.limit, "<=": 2 * abs(criterion.limit) + 1,
             "<": criterion.limit, ">=": -2 * abs(criterion.limit) - 1, ">": criterion.limit}
    return dataclasses.replace(criterion, value=wrong[criterion.comparison])

assert failures(run.criteria, run.controls) == []
for i, criterion in enumerate(run.criteria):
    others = [*run.criteria[:i], spoiled(criterion), *run.criteria[i + 1:]]
    assert len(failures(others, run.controls)) == 1, criterion
for i, control in enumerate(run.controls):
    missed = dataclasses.replace(control, changed=max(control.changed, 1), caught=False)
    others = [*run.controls[:i], missed, *run.controls[i + 1:]]
    assert len(failures(run.criteria, others)) == 1, control
assert run.criteria and run.controls
"""
#: Put after it: spoils one for good.
FAIL = """
run.criteria[0] = spoiled(run.criteria[0])
try:
    run.verdict()
except VerdictFailed as error:
    assert run.criteria[0].name in str(error)
else:
    raise AssertionError("a verdict passes on what it must not accept")
"""


@pytest.fixture
def kernel_environment(own_user_folders, monkeypatch):
    """An environment for a kernel, of a user of its own."""
    root = str(NOTEBOOKS.parent)
    wanted = {
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "JUPYTER_PREFER_ENV_PATH": "1",
    }
    for name, value in wanted.items():
        monkeypatch.setenv(name, value)
    return dict(os.environ)


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def test_there_is_a_tour_and_at_least_one_evaluation_notebook():
    assert ALL[0].name == "00_tour.ipynb"
    assert JUDGED[0].name == "01_resume_is_exact.ipynb"


@by_name
def test_a_notebook_is_kept_without_outputs(path):
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(path))


@judged_by_name
def test_an_evaluation_notebook_opens_with_one_claim(path):
    cells = nbformat.read(path, as_version=4).cells

    claims = [cell for cell in cells if "**Claim.**" in cell.source]
    assert claims == [cells[0]] and cells[0].source.count("**Claim.**") == 1


@judged_by_name
def test_its_first_code_cell_holds_the_parameters(path):
    first = code_cells(path)[0]
    namespace: dict[str, object] = {}
    exec(first.source, namespace)

    assert "parameters" in tags(first)
    assert namespace["size"] == "smoke" and namespace["results"] is None


@judged_by_name
def test_it_plants_a_fault_and_ends_with_its_verdict(path):
    cells = code_cells(path)

    assert any("run.control(" in cell.source for cell in cells)
    assert cells[-1].source.strip() == "run.verdict()" and tags(cells[-1]) == ["verdict"]
    assert sum("run.verdict()" in cell.source for cell in cells) == 1


@pytest.mark.notebook
@pytest.mark.timeout(900)
@by_name
def test_it_runs_at_smoke_size_and_changing_one_input_makes_its_verdict_fail(
    path, kernel_environment, tmp_path
):
    """By nbval, and once: most of the time goes into what the verdict rests on. The tour has no
    verdict, it only runs."""
    if path in JUDGED:
        notebook = nbformat.read(path, as_version=4)
        notebook.cells.insert(len(notebook.cells) - 1, nbformat.v4.new_code_cell(SPOIL))
        notebook.cells.append(nbformat.v4.new_code_cell(FAIL))
        path = tmp_path / path.name
        nbformat.write(notebook, path)
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "-q", "-c", os.devnull]
    command += ["--rootdir", str(path.parent), "-p", "no:cacheprovider", str(path)]
    command += ["--nbval-cell-timeout", "840", "--nbval-kernel-startup-timeout", "300"]

    done = subprocess.run(
        command, env=kernel_environment, capture_output=True, text=True, timeout=880
    )

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    cells = len(code_cells(path))
    assert f"{cells} passed" in done.stdout, done.stdout[-2000:]
