"""`make lab`: a kernel server that the notebook finds, and a URL that leads to the tour."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import djinn_nb

ROOT = Path(__file__).parents[2]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _status_of(url: str, patience_s: float = 90.0) -> int:
    """The page's HTTP status; Jupyter may print its URL a moment before it listens."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=patience_s) as page:
                return page.status
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@pytest.mark.slow
def test_lab_prints_the_url_of_the_tour_and_leaves_a_server_to_find(tmp_path: Path):
    environment = {**os.environ, "JUPYTER_RUNTIME_DIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.lab", "--no-browser", f"--port={_free_port()}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    watchdog = threading.Timer(240, process.kill)  # a lab that prints no URL must not hang the run
    watchdog.start()
    try:
        address = url = None
        for line in process.stdout:
            address = address or (re.search(r"kernel server: (\S+)", line) or [None, None])[1]
            url = (re.search(r"http://127\.0\.0\.1:\d+\S+", line) or [None])[0]
            if url:
                break
        assert url, "no URL was printed"
        status = _status_of(url)
    finally:
        watchdog.cancel()
        os.killpg(process.pid, signal.SIGTERM)
        process.stdout.close()
        process.wait(timeout=60)

    assert "/lab/tree/notebooks/00_tour.ipynb?token=" in url
    assert status == 200
    with djinn_nb.connect() as server:
        assert server.address == address
