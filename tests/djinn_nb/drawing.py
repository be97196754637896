"""Pictures that follow a workbench in a test, and stops for them to be of."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import djinn_nb as djinn
from djinn_nb.panels.pictures import Picture
from djinn_nb.workbench import Workbench
from tests.djinn_nb.conftest import PROMPT


def until(holds: Callable[[], bool], timeout_s: float = 200.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def stop_at(bench: Workbench, location: object, prompt: Any = PROMPT, **more: Any) -> djinn.Stopped:
    session = bench.current.server.launch(prompt, **{"max_new_tokens": 4, **more})
    bench.current.bind("session", session)
    stop = session.run_to(location)
    bench.current.bind("stop", stop)
    return stop


class Drawn:
    """A picture that follows a workbench, and all that it told and sent."""

    def __init__(self, kind: type[Picture], bench: Workbench) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.sent: list[tuple[dict[str, Any], list[bytes]]] = []
        self.picture = kind(
            bench,
            lambda name, values: self.told.append((name, values)),
            lambda message, buffers: self.sent.append((message, buffers)),
        )
        bench.subscribe(self.picture.follow)

    def ready(self, **wanted: Any) -> dict[str, Any]:
        """What is shown, once it is ready and has these values."""
        found: dict[str, Any] = {}

        def is_wanted() -> bool:
            nonlocal found
            found = self.picture.shown  # looked at once: it may change at any time
            return found["state"] == "ready" and all(found.get(k) == v for k, v in wanted.items())

        until(is_wanted)
        return found

    def tile(self, number: int) -> tuple[dict[str, Any], list[bytes]]:
        """Ask for a tile of the lens, and wait for it."""
        before = len(self.sent)
        version = self.ready()["version"]
        self.picture.take({"type": "need", "version": version, "tile": number})
        until(lambda: len(self.sent) > before)
        return self.sent[-1]
