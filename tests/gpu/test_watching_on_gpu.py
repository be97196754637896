"""Conditions, data breakpoints and logpoints on one GPU, in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from notebooks.harness.inprocess import Local, local_kernel
from notebooks.harness.tiny import make_folder
from tests.kernel import watch_cases

pytestmark = pytest.mark.gpu

MODELS = ("bundled", "llama", "gemma2")


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


def test_watching_changes_no_bit(local: Local) -> None:
    watch_cases.watching_changes_no_bit(local)


def test_a_log_holds_what_stops_show(local: Local) -> None:
    watch_cases.a_log_holds_what_stops_show(local)


def test_conditions_read_the_lens_that_stops_show(local: Local) -> None:
    watch_cases.conditions_read_the_lens_that_stops_show(local)
