"""Sessions put to rest by a lease, bit for bit the same afterwards: whole kernels on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernel_server.config import ServerConfig
from kernel_server.protocol.errors import BadArgument
from notebooks.harness.inprocess import Local, local_kernel
from notebooks.harness.tiny import make_folder
from tests.kernel import lease_cases

#: what connections say of leases; `a_client_is_told` looks at it
pytestmark = pytest.mark.filterwarnings("ignore:session s")


@pytest.fixture(scope="module", params=["llama float32", "gemma2 bfloat16"])
def local(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Local]:
    family, dtype = request.param.split()
    folder = tmp_path_factory.mktemp("lease")
    with local_kernel(
        model=make_folder(family, folder), dtype=dtype, device="cpu", prefill_chunk=16,
        kv_memory_bytes=2 << 20, host_memory_bytes=2 << 20, disk_memory_bytes=2 << 20,
        state_dir=folder / "journal", lease_s=lease_cases.LEASE_S,
    ) as made:  # fmt: skip
        yield made


@pytest.mark.parametrize("to", [None, "host", "disk"])
def test_what_follows_a_rest_is_the_same(local, to):
    lease_cases.what_follows_a_rest_is_the_same(local, to)


def test_a_client_is_told(local):
    lease_cases.a_client_is_told(local)


def test_restoring_computes_it_again(local):
    lease_cases.restoring_computes_it_again(local)


def test_records_of_logpoints_stay(local):
    lease_cases.records_of_logpoints_stay(local)


def test_branches_and_forks(local):
    lease_cases.branches_and_forks(local)


@pytest.mark.timeout(240)
def test_two_clients_and_the_end_of_a_lease(local):
    lease_cases.two_clients_and_the_end_of_a_lease(local)


def test_what_cannot_be_written_stays(local):
    lease_cases.what_cannot_be_written_stays(local)


def test_a_lease_without_a_journal_is_refused_before_anything_is_loaded():
    with pytest.raises(BadArgument, match=r"--lease needs a journal.*--no-journal") as told:
        ServerConfig(lease_s=60.0, journal=False)
    assert "\n" not in str(told.value)
