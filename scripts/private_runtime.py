"""A runtime folder for one run, so that its embedded servers are its own and end with it.

Servers started by `connect()` outlive whoever started them; a demo or a test run should leave none.
They are found through the runtime files they wrote into this folder, and asked to end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE_S = 10.0


def end_servers(folder: Path, patience_s: float = PATIENCE_S) -> list[int]:
    """Ask every server announced in a runtime folder to end; returns the pids that did not."""
    pids = []
    for file in (folder / "djinn").glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            pids.append(int(json.loads(file.read_text(encoding="utf-8"))["pid"]))
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    while (left := [pid for pid in pids if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _runs(pid: int) -> bool:
    """Whether the process is there and not a zombie somebody has yet to reap."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@contextlib.contextmanager
def private_runtime() -> Iterator[Path]:
    """Point XDG_RUNTIME_DIR at a fresh folder, mode 0700; at the end its servers are ended."""
    before = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(tempfile.mkdtemp(prefix="djinn-run-"))
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    try:
        yield folder
    finally:
        end_servers(folder)
        shutil.rmtree(folder, ignore_errors=True)
        if before is None:
            del os.environ["XDG_RUNTIME_DIR"]
        else:
            os.environ["XDG_RUNTIME_DIR"] = before
