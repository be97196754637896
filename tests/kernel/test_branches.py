"""Going back, bit for bit: whole kernels on the CPU, with pages in three tiers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from notebooks.harness.inprocess import Local, local_kernel
from notebooks.harness.tiny import make_folder
from tests.kernel import branch_cases, tier_cases


@pytest.fixture(scope="module", params=["llama-float32", "gemma2-bfloat16"])
def local(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Local]:
    family, dtype = request.param.split("-")
    folder = make_folder(family, tmp_path_factory.mktemp("models"))
    with local_kernel(
        model=folder, dtype=dtype, device="cpu", prefill_chunk=16,
        kv_memory_bytes=2 << 20, host_memory_bytes=2 << 20, disk_memory_bytes=2 << 20,
    ) as made:  # fmt: skip
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every page came back, in every tier."""
    local: Local = request.getfixturevalue("local")
    yield
    tier_cases.nothing_is_left(local)


def test_a_stop_returned_to_is_the_same(local: Local) -> None:
    branch_cases.a_stop_returned_to_is_the_same(local)


def test_the_past_can_be_changed_and_returned_to(local: Local) -> None:
    branch_cases.the_past_can_be_changed_and_returned_to(local)


@pytest.mark.parametrize("seed", range(6))
def test_random_returns_end_alike(local: Local, seed: int) -> None:
    branch_cases.random_returns_end_alike(local, seed)
