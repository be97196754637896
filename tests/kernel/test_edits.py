"""Every kind of edit in whole kernels on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from notebooks.harness.inprocess import Local, local_kernel
from notebooks.harness.tiny import make_folder
from tests.kernel import edit_cases

MODELS = [
    ("llama", "float32"),
    ("gemma2", "bfloat16"),
    ("gpt2", "float32"),
    ("mixtral", "bfloat16"),
]


@pytest.fixture(scope="module", params=MODELS, ids=lambda p: "-".join(p))
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
def nothing_is_left(local: Local) -> Iterator[None]:
    """Every session ended, every page came back and the state is sound."""
    yield
    local.kernel.state.check()
    assert local.kernel.state.pool.num_free == local.cache.num_pages


def test_every_kind_is_undone_and_runs_alike(local: Local) -> None:
    edit_cases.every_kind_is_undone_and_runs_alike(local)


def test_a_direction_stays_out_of_every_forward(local: Local) -> None:
    edit_cases.a_direction_stays_out_of_every_forward(local)


def test_the_next_token_is_decided(local: Local) -> None:
    edit_cases.the_next_token_is_decided(local)


def test_a_patch_equals_a_hook(local: Local) -> None:
    tolerance = 1e-3 if local.kernel.info.dtype == "float32" else 0.25
    edit_cases.a_patch_equals_a_hook(local, tolerance)


def test_a_patch_of_everything_becomes_the_other_run(local: Local) -> None:
    edit_cases.a_patch_of_everything_becomes_the_other_run(local)


def test_a_patch_from_another_owners_session_finds_none(local: Local) -> None:
    edit_cases.a_patch_from_another_owner_finds_no_session(local)
