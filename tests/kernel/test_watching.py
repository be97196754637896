"""Conditions, data breakpoints and logpoints of whole kernels on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from notebooks.harness.inprocess import Local, local_kernel
from notebooks.harness.tiny import make_folder
from tests.kernel import watch_cases


@pytest.fixture(
    scope="module",
    params=[("llama", "float32"), ("gemma2", "bfloat16"), ("gpt2", "bfloat16")],
    ids=lambda p: "-".join(p),
)
def local(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Local]:
    family, dtype = request.param
    folder = make_folder(family, tmp_path_factory.mktemp("models"))
    with local_kernel(
        model=folder, dtype=dtype, device="cpu", prefill_chunk=16, kv_memory_bytes=32 << 20
    ) as made:
        yield made
        made.kernel.state.check()
        assert made.kernel.state.pool.num_free == made.cache.num_pages


def test_watching_changes_no_bit(local: Local) -> None:
    watch_cases.watching_changes_no_bit(local)


def test_a_log_holds_what_stops_show(local: Local) -> None:
    watch_cases.a_log_holds_what_stops_show(local)


def test_conditions_read_the_lens_that_stops_show(local: Local) -> None:
    watch_cases.conditions_read_the_lens_that_stops_show(local)
