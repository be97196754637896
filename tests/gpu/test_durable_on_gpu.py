"""Saved, loaded and restarted on one GPU, in bfloat16: the same bits as left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from notebooks.harness.inprocess import local_kernel
from notebooks.harness.tiny import make_folder
from tests.kernel import durable_cases

pytestmark = pytest.mark.gpu


@pytest.fixture(params=("bundled", "llama", "gemma2"))
def start(request: pytest.FixtureRequest, tmp_path: Path) -> durable_cases.Start:
    folder = None
    if request.param != "bundled":
        folder = make_folder(request.param, tmp_path)
    return lambda: local_kernel(
        model=folder, dtype="bfloat16", device="cuda:0", prefill_chunk=16,
        kv_memory_bytes=64 << 20, host_memory_bytes=64 << 20, disk_memory_bytes=64 << 20,
        state_dir=tmp_path / "journal",
    )  # fmt: skip


def test_an_edited_stop_comes_back(start: durable_cases.Start, tmp_path: Path) -> None:
    durable_cases.an_edited_stop_comes_back(start, tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_random_sequences_end_alike(start: durable_cases.Start, tmp_path: Path, seed: int) -> None:
    durable_cases.sequences_end_alike(start, tmp_path, seed, kernels=3, steps=30)
