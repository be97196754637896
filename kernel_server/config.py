"""How a server is to run: read once from the command line, frozen, passed down."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kernel_server.protocol.errors import BadArgument

DEFAULT_PORT = 5556
DEFAULT_HOST = "127.0.0.1"
#: Shortest lease, seconds: the clock is looked at twice in it.
LEAST_LEASE_S = 1.0
#: How long a thread may keep the interpreter while another waits for it, seconds. At Python's own
#: 5 ms a control call, which takes it about five times, costs 25 beside whoever computes; and the
#: engine, which gives it away at every operation of torch, takes 60 ms for a decode of 13 beside a
#: client that swaps another session without a pause.
SWITCH_INTERVAL_S = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model, where and in which dtype."""

    #: local folder or hub id; None with no geometry: the bundled model
    model: str | None = None
    #: name of a known geometry, filled with random weights
    geometry: str | None = None
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """What one owner (the name of an access token) may take of a server."""

    sessions: int = 64
    #: KV pages; None: the whole pool, or half of it where there are several owners
    kv_bytes: int | None = None
    #: tensors on their way to or from clients, held or announced
    transfer_bytes: int = 4 << 30
    #: values of edits
    edit_bytes: int = 1 << 30
    #: captures and logs
    capture_bytes: int = 4 << 30
    #: named vectors on disk, and the bytes of their files
    vectors: int = 1000
    vector_bytes: int = 1 << 30
    #: requests waiting or carried out at a time
    jobs: int = 32
    #: a notebook uses three
    connections: int = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Everything a server is started with."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quotas: Quotas = field(default_factory=Quotas)
    host: str = DEFAULT_HOST
    port: int | None = DEFAULT_PORT
    #: listen on a Unix socket instead of host and port
    socket: Path | None = None
    #: KV page pool; None: chosen for the device
    kv_memory_bytes: int | None = None
    #: a cap over weights, workspace, pages and tensors of stops on the device; None: none
    device_memory_bytes: int | None = None
    #: tensors of stops: so much is left for them under that cap, and those that sessions left take
    #: no more; None: 1 GiB, and under a cap at most a sixteenth of it
    kept_memory_bytes: int | None = None
    #: KV pages of sessions that left the device: in the host's memory, and in a file
    host_memory_bytes: int = 0
    disk_memory_bytes: int = 0
    #: folder of that file; None: the system's for temporary files
    disk_path: Path | None = None
    #: a session left alone so long leaves the device; None: only when others need its room
    idle_after_s: float | None = 30.0
    #: a session not used for so long is put to rest on disk, after a warning; None: never
    lease_s: float | None = None
    prefill_chunk: int | None = None
    #: run layers of a decode as CUDA graphs, on a GPU and where they give the same bits
    cuda_graphs: bool = True
    decode_bucket: int = 1
    #: where the journal is; None: a folder of the user's own, by address and model
    state_dir: Path | None = None
    #: names that folder instead of the address
    journal_key: str | None = None
    #: sessions outlive the server
    journal: bool = True
    threads: int = 1
    #: JSON file with address and pid, written once the server listens
    runtime_file: Path | None = None
    #: end after this long without clients and unfinished sessions; None: stay
    linger_s: float | None = None
    check: bool = False
    debug: bool = False

    def __post_init__(self) -> None:
        if self.lease_s is None:
            return
        if not self.lease_s >= LEAST_LEASE_S:
            raise BadArgument(
                f"--lease is {self.lease_s:g} s: give at least {LEAST_LEASE_S:g} s, such as 8h or"
                " 90min, or leave it out, and sessions stay"
            )
        if not self.journal:
            raise no_lease()


def no_lease() -> BadArgument:
    """Says why there is no lease without a journal."""
    return BadArgument(
        "--lease needs a journal: at its end a session is in no other place, and would be lost;"
        " leave out --no-journal, or leave out --lease, and sessions stay in memory"
    )
