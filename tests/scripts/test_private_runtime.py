"""A demo or a test run leaves no server behind, and touches none that is not its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.private_runtime import end_servers, private_runtime

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def stranger():
    process = subprocess.Popen(SLEEPER)
    yield process
    process.kill()
    process.wait()


def _announce(folder: Path, pid: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "key.json").write_text(json.dumps({"address": "x", "pid": pid, "server_id": "y"}))


def test_a_server_announced_in_the_folder_is_ended(stranger: subprocess.Popen):
    process = subprocess.Popen(SLEEPER)
    with private_runtime() as folder:
        _announce(folder / "djinn", process.pid)

    assert process.wait(timeout=60) != 0
    assert stranger.poll() is None
    assert not folder.exists()


def test_the_variable_is_put_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "before")
    with private_runtime() as folder:
        inside = os.environ["XDG_RUNTIME_DIR"]

    assert inside == str(folder)
    assert os.environ["XDG_RUNTIME_DIR"] == "before"


def test_a_file_that_announces_nothing_ends_nothing(tmp_path: Path, stranger: subprocess.Popen):
    (tmp_path / "djinn").mkdir()
    (tmp_path / "djinn" / "broken.json").write_text("{")
    (tmp_path / "djinn" / "other.json").write_text(json.dumps({"pid": None}))

    assert end_servers(tmp_path) == []
    assert stranger.poll() is None
