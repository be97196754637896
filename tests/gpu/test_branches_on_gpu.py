"""Going back on one GPU, in bfloat16: the same bits as left alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from notebooks.harness.inprocess import Local, local_kernel
from notebooks.harness.tiny import make_folder
from tests.kernel import branch_cases, tier_cases
from tests.kernel.cases import prompt_of

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=("bundled", "llama", "gemma2"))
def local(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Local]:
    folder = None
    if request.param != "bundled":
        folder = make_folder(request.param, tmp_path_factory.mktemp("models"))
    with local_kernel(
        model=folder, dtype="bfloat16", device="cuda:0", prefill_chunk=16,
        kv_memory_bytes=64 << 20, host_memory_bytes=64 << 20, disk_memory_bytes=64 << 20,
    ) as made:  # fmt: skip
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    local: Local = request.getfixturevalue("local")
    yield
    tier_cases.nothing_is_left(local)


def test_a_stop_returned_to_is_the_same(local: Local) -> None:
    branch_cases.a_stop_returned_to_is_the_same(local)


def test_the_past_can_be_changed_and_returned_to(local: Local) -> None:
    branch_cases.the_past_can_be_changed_and_returned_to(local)


@pytest.mark.parametrize("seed", range(3))
def test_random_returns_end_alike(local: Local, seed: int) -> None:
    branch_cases.random_returns_end_alike(local, seed)


def test_what_is_kept_is_bounded_and_nothing_is_lost(local: Local) -> None:
    # the engine's thread has what its libraries work in once it has run a session to its end
    branch_cases.references_of(local, [prompt_of(local, 1.4, new_tokens=3)])
    tier_cases.wait_until(lambda: local.kernel.engine.nbytes() == (0, 0))
    before = torch.cuda.memory_allocated()
    branch_cases.what_is_kept_is_bounded(local, steps=20)
    tier_cases.wait_until(lambda: local.kernel.engine.nbytes() == (0, 0))
    assert torch.cuda.memory_allocated() - before < 64 << 20


def test_an_edited_past_comes_back_though_nothing_is_kept(local: Local) -> None:
    branch_cases.edits_come_back(local)
