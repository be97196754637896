"""JupyterLab as `make lab` starts it, in user folders of its own, and Chromium to look at it.

For the browser tests and the pictures of the documents: both need the real thing, and neither may
meet the settings, kernels, tokens or servers of whoever runs them. What is clicked and looked at is
decided by those who use this.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.private_runtime import end_servers

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "notebooks" / "00_tour.ipynb"
#: The lab answers within this, seconds: it loads the bundled model first.
START_S = 120.0
#: Chromium of the distribution, no download; what it would fetch for itself is switched off.
CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@dataclass(frozen=True)
class Lab:
    """A JupyterLab that runs: where it is, and the folders that are its own."""

    address: str
    token: str
    #: what the lab shows; holds a copy of the tour
    files: Path
    #: where its user folders, its runtime files and its log are
    home: Path

    @property
    def log(self) -> Path:
        return self.home / "lab.log"

    def url(self, path: str = "notebooks/00_tour.ipynb") -> str:
        """The address of a file in a workspace that nothing was left open in."""
        return f"{self.address}/lab/tree/{path}?token={self.token}&reset"

    def environment(self) -> dict[str, str]:
        """Of a process that shall meet this lab's kernel server and no other."""
        return _environment(self.home)


def chromium_path() -> str | None:
    """Where the browser is; None where there is none."""
    for name in ("chromium", "chromium-browser"):
        if found := shutil.which(name):
            return found
    return None


def _environment(home: Path) -> dict[str, str]:
    folders = {
        "XDG_CONFIG_HOME": "config",
        "XDG_DATA_HOME": "data",
        "XDG_STATE_HOME": "state",
        "XDG_RUNTIME_DIR": "run",
        "JUPYTER_CONFIG_DIR": "jupyter-config",
        "JUPYTER_DATA_DIR": "jupyter-data",
        "JUPYTER_RUNTIME_DIR": "jupyter-run",
        "IPYTHONDIR": "ipython",
    }
    environment = dict(os.environ)
    for variable, folder in folders.items():
        (home / folder).mkdir(mode=0o700, exist_ok=True)
        environment[variable] = str(home / folder)
    paths = [str(ROOT), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    environment["JUPYTER_PREFER_ENV_PATH"] = "1"
    environment["JUPYTER_PLATFORM_DIRS"] = "1"
    environment.pop("DJINN_TOKEN", None)
    return environment


@contextlib.contextmanager
def lab(
    *flags: str, environment: Mapping[str, str] | None = None, open_to_all: bool = False
) -> Iterator[Lab]:
    """Run what `make lab` runs, with `flags` added; at the end it and its servers are ended.

    `open_to_all`: without an access token of its own, for test tools that carry none.
    Raises RuntimeError, with the end of its log, when it does not answer.
    """
    home = Path(tempfile.mkdtemp(prefix="djinn-lab-"))
    files = home / "files"
    (files / "notebooks").mkdir(parents=True)
    shutil.copy(TOUR, files / "notebooks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Lab(f"http://127.0.0.1:{port}", secrets.token_hex(16), files, home)
    command = [
        *(sys.executable, "-m", "scripts.lab", "--no-browser", f"--port={port}"),
        *("--ServerApp.port_retries=0", "--ServerApp.ip=127.0.0.1"),
        f"--ServerApp.root_dir={files}",
        f"--IdentityProvider.token={'' if open_to_all else here.token}",
        *flags,
    ]
    with here.log.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**_environment(home), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _until_it_answers(here, process)
        yield here
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        if process.poll() is None:
            process.kill()
            process.wait()
        end_servers(home / "run")
        shutil.rmtree(home, ignore_errors=True)


def _until_it_answers(here: Lab, process: subprocess.Popen[bytes]) -> None:
    request = urllib.request.Request(
        f"{here.address}/api/status", headers={"Authorization": f"token {here.token}"}
    )
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            json.load(answer)
            return
        time.sleep(0.1)
    end = "\n".join(here.log.read_text(errors="replace").splitlines()[-12:])
    how = "ended" if process.poll() is not None else f"did not answer in {START_S:.0f} s"
    raise RuntimeError(f"the lab {how}:\n{end}")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser of this machine, without a window.

    Raises RuntimeError when there is none.
    """
    from playwright.sync_api import sync_playwright

    path = chromium_path()
    if path is None:
        raise RuntimeError("no Chromium here: apt-get install chromium fonts-dejavu-core")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(CHROMIUM_FLAGS))
        try:
            yield browser
        finally:
            browser.close()
