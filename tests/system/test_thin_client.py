"""The client alone, installed without torch and transformers, runs the tour against a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "notebooks" / "00_tour.ipynb"
#: What one stop may cost until its data is asked for, bytes.
STOP_MOST = 8 << 10


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a clean environment that has the client's wheel and what it requires."""
    folder = tmp_path_factory.mktemp("client")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    made = folder / "venv" / "bin" / "python"
    install = [made, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    install += ["-c", str(ROOT / "constraints.txt"), str(wheel)]
    subprocess.run(install, check=True, cwd=folder)
    return made


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the bundled model, from the environment of these tests."""
    log = (tmp_path_factory.mktemp("server") / "log").open("w")
    command = [sys.executable, "-m", "kernel_server", "serve", "--port", "0"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()
            log.close()


@pytest.fixture(scope="module")
def found(python: Path, address: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("elsewhere")
    script = folder / "thin_client.py"
    script.write_text((Path(__file__).parent / "thin_client.py").read_text())
    ran = subprocess.run(
        [python, script, address, TOUR],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"DJINN_PROGRESS": "0", "PYTHONPATH": "", "IPYTHONDIR": str(folder)},
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-5000:]
    made: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    print(f"\n{made}")
    return made


def test_the_tour_runs_where_torch_and_transformers_are_not(found):
    code = [c for c in json.loads(TOUR.read_text())["cells"] if c["cell_type"] == "code"]

    assert found["cells"] == len(code) > 10
    assert found["importable"] == found["loaded"] == []


def test_a_stop_costs_a_few_kilobytes_with_its_event(found):
    assert 100 < found["stop"] <= STOP_MOST
    assert all(100 < step <= STOP_MOST for step in found["steps"])
    assert found["summary"] <= STOP_MOST


@pytest.mark.parametrize("part", ["data", "row"])
def test_data_that_is_asked_for_costs_what_it_weighs(found, part):
    weighs = found[f"{part}_weighs"]

    assert weighs <= found[part] <= weighs + STOP_MOST


def test_the_count_sees_what_comes(found):
    assert found["received"] > found["data"] + found["stop"] + sum(found["steps"])
