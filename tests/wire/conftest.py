"""Servers to attack, peers that attack them, and a watch over threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.wire.peers import Attacker, ServerProcess


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    process = ServerProcess()
    yield process
    process.close()


@pytest.fixture
def start_server() -> Iterator[Callable[..., ServerProcess]]:
    with contextlib.ExitStack() as stack:

        def start(**options: str) -> ServerProcess:
            process = ServerProcess(**options)
            stack.callback(process.close)
            return process

        yield start


@pytest.fixture
def attacker(server: ServerProcess) -> Iterator[Attacker]:
    attacker = Attacker.logged_in(server.address)
    yield attacker
    attacker.close()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(5)

    assert not set(threading.enumerate()) - before
