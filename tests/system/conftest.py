"""One server process with a tiny model and every check on, and a session that must stay unharmed.

The canary runs a step after each test: its tokens must be those of an undisturbed run, and the
server's log must hold no fault of the state machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import djinn_nb as djinn
from djinn_nb import errors
from tests.djinn_nb.conftest import Process, make_model

PROMPT = "When Mary and John went to the store, John gave a drink to"
#: Words of a log that mean a bug of ours, whatever the client was told.
FAULTS = ("Traceback", "internal error", "state machine failed", "AssertionError", "ServerFault")


@dataclass
class World:
    """A server process, its log, and the connection of a client that never misbehaves."""

    process: Process
    folder: Path
    server: djinn.Server

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def connect(self) -> djinn.Server:
        return djinn.connect(self.process.address)

    def infos(self) -> tuple[Any, ...]:
        """Every session as the server describes it now."""
        return self.server._infos()

    def launch(
        self, prompt: object = PROMPT, *, max_new_tokens: int = 8, **wishes: Any
    ) -> djinn.Session:
        return self.server.launch(prompt, max_new_tokens=max_new_tokens, **wishes)

    def terminate_all(self) -> None:
        for session_id in self.server.sessions().index:
            try:
                self.server.attach(session_id).terminate()
            except errors.UnknownSession:
                continue

    def require_sound(self) -> None:
        """No fault in the log; after the last session every page is free again."""
        log = self.log
        assert not [word for word in FAULTS if word in log], log[-3000:]


class Canary:
    """A session that goes on step by step beside whatever happens to the others."""

    def __init__(self, world: World) -> None:
        self.session = world.launch(max_new_tokens=2000, name="canary", seed=5, temperature=0.7)
        reference = self.session.fork()
        self.expected = reference.run_to("logits").session.tokens
        self.reference = reference
        self.session.run_to("logits")

    def step(self) -> None:
        """One more forward, bit-equal to the reference's."""
        ours = self.session.run_to("logits")
        theirs = self.reference.run_to("logits")
        assert ours.forward == theirs.forward
        assert self.session.tokens == self.reference.tokens
        np.testing.assert_array_equal(ours.value.numpy(), theirs.value.numpy())


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def world(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("server") / "run"
    process = Process(folder, "--model", str(model_folder), "--prefill-chunk", "8", "--check")
    try:
        with process.connect() as server:
            made = World(process, folder, server)
            yield made
            made.require_sound()
    finally:
        process.end()


@pytest.fixture
def canary(world: World) -> Iterator[Canary]:
    made = Canary(world)
    yield made
    made.step()
    world.terminate_all()
    assert world.server.memory().loc["KV pages in use", "bytes"] == 0
    world.require_sound()


@pytest.fixture(autouse=True)
def _no_progress_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DJINN_PROGRESS", "0")
