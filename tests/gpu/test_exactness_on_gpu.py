"""The same on one GPU, in bfloat16: stopping, stepping, forking and looking change no bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from notebooks.harness.inprocess import Local, local_kernel
from notebooks.harness.tiny import make_folder
from tests.kernel import cases

pytestmark = pytest.mark.gpu

MODELS = ("bundled", "llama", "gemma2", "gpt2", "mistral")


@pytest.fixture(scope="module", params=MODELS)
def local(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Local]:
    folder = None
    if request.param != "bundled":
        folder = make_folder(request.param, tmp_path_factory.mktemp("models"))
    with local_kernel(
        model=folder, dtype="bfloat16", device="cuda:0", prefill_chunk=16,
        kv_memory_bytes=64 << 20,
    ) as made:  # fmt: skip
        yield made


def test_stops_change_nothing(local: Local) -> None:
    cases.stops_change_nothing(local)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_walks_end_alike(local: Local, seed: int) -> None:
    cases.random_walks_end_alike(local, seed)


def test_undo_gives_the_same_bits(local: Local) -> None:
    cases.undo_gives_the_same_bits(local)


def test_a_sticky_edit_equals_a_hook(local: Local) -> None:
    cases.sticky_edit_equals_a_hook(local, 0.25)
