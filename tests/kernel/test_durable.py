"""Saved, loaded and restarted, bit for bit: whole kernels on the CPU, with pages in three tiers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from notebooks.harness.inprocess import local_kernel
from notebooks.harness.tiny import make_folder
from tests.kernel import durable_cases, lease_cases


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("models")
    yield {family: make_folder(family, folder) for family in ("llama", "gemma2")}


def starter(
    folder: Path, dtype: str, tmp_path: Path, lease_s: float | None = None
) -> durable_cases.Start:
    return lambda: local_kernel(
        model=folder, dtype=dtype, device="cpu", prefill_chunk=16, kv_memory_bytes=2 << 20,
        host_memory_bytes=2 << 20, disk_memory_bytes=2 << 20, state_dir=tmp_path / "journal",
        lease_s=lease_s,
    )  # fmt: skip


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("gemma2", "bfloat16")])
def test_an_edited_stop_comes_back(families, tmp_path, family, dtype):
    start = starter(families[family], dtype, tmp_path)
    durable_cases.an_edited_stop_comes_back(start, tmp_path)


def test_what_is_compared_is_compared_again(families, tmp_path):
    start = starter(families["llama"], "float32", tmp_path)
    durable_cases.what_is_compared_with_the_location_before_is_compared_again(start)


#: what connections say of leases
@pytest.mark.filterwarnings("ignore:session s")
def test_a_pin_outlives_its_kernel(families, tmp_path):
    start = starter(families["llama"], "float32", tmp_path, lease_s=lease_cases.LEASE_S)
    durable_cases.a_pin_outlives_its_kernel(start)


@pytest.mark.parametrize("seed", range(2))
def test_random_sequences_end_alike(families, tmp_path, seed):
    start = starter(families["llama"], "float32", tmp_path)
    durable_cases.sequences_end_alike(start, tmp_path, seed, kernels=3, steps=16)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", range(2, 6))
def test_long_random_sequences_end_alike(families, tmp_path, seed):
    family = ("llama", "float32") if seed % 2 else ("gemma2", "bfloat16")
    start = starter(families[family[0]], family[1], tmp_path)
    durable_cases.sequences_end_alike(start, tmp_path, seed, kernels=5, steps=30)
