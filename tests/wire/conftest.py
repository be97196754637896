"""Servers to attack, peers that attack them, and a watch over threads."""

from __future__ import annotations

import contextlib
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
def _watched(no_thread_is_left: None) -> None:
    """Every test here is watched for threads it leaves."""
