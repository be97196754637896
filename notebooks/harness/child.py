"""A process of its own that reads and answers lines of JSON, as a notebook holds it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Child:
    """Such a process, which has said that it is ready."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def send(self, **asked: Any) -> None:
        """Write one line; `read` waits for an answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()

    def read(self) -> dict[str, Any]:
        """The next answer. Raises RuntimeError when the process ends before it."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError(f"the second process ended with status {self._process.wait()}")


@contextlib.contextmanager
def child(module: str, *arguments: str, **environment: str) -> Iterator[Child]:
    """Run `python -m module` with variables of its own, wait until it is ready, and end it."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
    ) as process:  # fmt: skip
        try:
            made = Child(process)
            assert made.read() == {"ready": True}
            yield made
        finally:
            process.kill()


def answer(**said: Any) -> None:
    """What the process itself writes."""
    print(json.dumps(said), flush=True)
