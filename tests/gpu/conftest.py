"""What GPU tests need that run in processes beside each other on one card: turns, and one place."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

#: Waits until no other process of the run is in such a block.
Turn = Callable[[], AbstractContextManager[None]]


@pytest.fixture(scope="session")
def of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all processes of this run, and of no other."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def turn(of_the_run: Path) -> Turn:
    """For what takes so much of the card, or of the bus, that two at once do not go."""

    @contextlib.contextmanager
    def taken() -> Iterator[None]:
        with (of_the_run / "turn.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    return taken
