"""Stopping, stepping, forking and looking change no bit: whole kernels on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from notebooks.harness.inprocess import Local, local_kernel
from notebooks.harness.tiny import make_folder
from tests.kernel import cases

FAMILIES = ("llama", "gemma2", "gpt2", "mixtral")


@pytest.fixture(
    scope="module",
    params=[(family, dtype) for family in FAMILIES for dtype in ("float32", "bfloat16")],
    ids=lambda p: "-".join(p),
)
def local(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Local]:
    family, dtype = request.param
    folder: Path = make_folder(family, tmp_path_factory.mktemp("models"))
    with local_kernel(
        model=folder, dtype=dtype, device="cpu", prefill_chunk=16, kv_memory_bytes=32 << 20
    ) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every session ended, every page came back and the state is sound."""
    local: Local = request.getfixturevalue("local")
    yield
    local.kernel.state.check()
    assert local.kernel.state.pool.num_free == local.cache.num_pages


def test_stops_change_nothing(local: Local) -> None:
    cases.stops_change_nothing(local)


@pytest.mark.parametrize("seed", [0, 1])
def test_random_walks_end_alike(local: Local, seed: int) -> None:
    cases.random_walks_end_alike(local, seed)


def test_undo_gives_the_same_bits(local: Local) -> None:
    cases.undo_gives_the_same_bits(local)


def test_a_sticky_edit_equals_a_hook(local: Local) -> None:
    tolerance = 1e-3 if local.kernel.info.dtype == "float32" else 0.25
    cases.sticky_edit_equals_a_hook(local, tolerance)
