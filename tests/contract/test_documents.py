"""The documents say what is there: commands exist, paths exist, every library has its reason."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import djinn_nb

ROOT = Path(__file__).parents[2]
FAMILIES = "kernel_server/models/FAMILIES.md"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", _text("Makefile"), flags=re.MULTILINE))


def _make_words(text: str) -> set[str]:
    """Targets named in prose and code blocks: `make demo`, or a line that starts with it."""
    return set(re.findall(r"(?:`|^|\n|&& )make ([a-z][a-z-]*)", text))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", ".ci/run"])
def test_every_make_command_in_a_document_exists(document: str):
    assert _make_words(_text(document)) <= _targets()


def test_the_readme_says_what_every_make_target_does():
    described = set(re.findall(r"^\| `make ([a-z-]+)` \| \S", _text("README.md"), re.MULTILINE))

    assert described == _targets() - {"help", "test test-all bench evaluate"}


def test_ci_runs_everything():
    assert _text(".ci/run").rstrip().endswith("make test-all")


@pytest.mark.parametrize(
    "target", ["setup", "lab", "demo", "test", "test-all", "bench", "evaluate"]
)
def test_a_make_target_expands(target: str):
    ran = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernel_server/README.md"]
)
def test_every_link_and_path_in_a_document_leads_somewhere(document: str):
    text = _text(document)
    folder = (ROOT / document).parent
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text)
    paths = re.findall(r"`((?:djinn_nb|kernel_server|notebooks|tests|scripts)/[\w./-]*\w/?)`", text)

    lost = [link for link in links if not (folder / link).exists()]
    lost += [path for path in paths if not (ROOT / path).exists()]
    assert lost == []


def test_every_direct_dependency_has_a_reason():
    project = PYPROJECT["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    required = {Requirement(line).name for lines in lists for line in lines}
    rows = re.findall(
        r"^\| ([a-z][\w, -]*) \| .+ \| .+ \|$", _text("CONTRIBUTING.md"), re.MULTILINE
    )
    explained = {name for row in rows for name in row.split(", ")} - {"library"}

    assert explained == required


def test_one_version_everywhere():
    version = PYPROJECT["project"]["version"]

    assert djinn_nb.__version__ == version
    assert f"## [{version}]" in _text("CHANGELOG.md")


def test_every_part_of_the_server_has_a_line_in_its_readme():
    text = _text("kernel_server/README.md")
    parts = {
        path.stem
        for path in (ROOT / "kernel_server").iterdir()
        if not path.name.startswith("_")
        and (path.suffix == ".py" or (path / "__init__.py").exists())
    }

    assert {part for part in parts if not re.search(rf"`{part}(/|\.py)?`", text)} == set()


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md"])
def test_a_document_counts_the_families_as_their_table_does(document: str):
    [served] = re.findall(r"^## Served \((\d+)\)$", _text(FAMILIES), re.MULTILINE)
    named = re.findall(r"\b(\d+)(?= are served| families)", _text(document))

    assert named == [served]


def test_the_results_in_the_readme_are_those_of_the_records():
    ran = subprocess.run(
        [sys.executable, "-m", "scripts.readme_results", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_no_tracked_file_names_this_checkout():
    listed = subprocess.run(
        ["git", "grep", "-lF", f"{ROOT}/"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode > 1:
        pytest.skip("not a git checkout")

    assert listed.stdout == ""
