"""A world whose invariants are checked after every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.state.world import World


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.finish_checks()
