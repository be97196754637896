"""Pages in three tiers: whole kernels on the CPU, where the device is a pool of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from notebooks.harness.inprocess import Local, local_kernel
from notebooks.harness.tiny import make_folder
from tests.kernel import tier_cases


@pytest.fixture(scope="module", params=["llama-float32", "gemma2-bfloat16"])
def local(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Local]:
    family, dtype = request.param.split("-")
    folder = make_folder(family, tmp_path_factory.mktemp("models"))
    with local_kernel(
        model=folder, dtype=dtype, device="cpu", prefill_chunk=16,
        kv_memory_bytes=400 << 10, host_memory_bytes=600 << 10, disk_memory_bytes=2 << 20,
    ) as made:  # fmt: skip
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every page came back, in every tier."""
    local: Local = request.getfixturevalue("local")
    yield
    tier_cases.nothing_is_left(local)


@pytest.mark.parametrize("to", ["host", "disk"])
def test_an_evicted_session_goes_on_bit_for_bit(local: Local, to: str) -> None:
    tier_cases.an_evicted_session_goes_on_bit_for_bit(local, to)


def test_more_sessions_than_the_device_holds(local: Local) -> None:
    tier_cases.more_sessions_than_the_device_holds(local)


@pytest.mark.parametrize("seed", range(4))
def test_random_moves_end_alike(local: Local, seed: int) -> None:
    tier_cases.random_moves_end_alike(local, seed)


@pytest.mark.parametrize("spare", [1, 3])
def test_pages_change_places(local: Local, spare: int) -> None:
    tier_cases.pages_change_places(local, spare)


def test_copies_that_are_late_take_no_old_bytes_for_new(local: Local) -> None:
    tier_cases.copies_that_are_late_take_no_old_bytes_for_new(local)


def test_a_full_disk_is_told_and_loses_nothing(local: Local) -> None:
    tier_cases.a_full_disk_is_told_and_loses_nothing(local)


@pytest.mark.parametrize("group", [0, -1])
def test_a_copy_that_brings_nothing_is_made_again(local: Local, group: int) -> None:
    tier_cases.a_copy_that_brings_nothing_is_made_again(local, group)


def test_what_follows_pressure_is_as_before(local: Local) -> None:
    tier_cases.what_follows_pressure_is_as_before(local)
