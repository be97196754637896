"""A control call while the engine computes, against idle and against another computing process.

One server process with the bundled model. The call asks for one session (`Describe`): decoded,
decided and answered by the state, as every control call is. Arms, alternating in one run: server
idle; server generating; server idle beside a process that runs the same model's forwards. The last
says what two busy processes on this machine cost anybody.
`python -m tests.benchmarks.control` prints the record as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from djinn_nb import Server, Session, connect
from djinn_nb.client import Client
from kernel_server.protocol import messages as m

ROUNDS = 30
CALLS = 100

_BURN = """
import torch
torch.set_num_threads(1)
from kernel_server.models.registry import open_model
model = open_model(device="cpu").model
ids = torch.arange(5, 133)[None]
with torch.inference_mode():
    model(ids)
    print("ready", flush=True)
    while True:
        model(ids[:, :1])
"""


def measure(rounds: int = ROUNDS) -> dict[str, Any]:
    """Microseconds per call in each arm."""
    times: dict[str, list[float]] = {"idle": [], "computing": [], "beside a computing process": []}
    # a server of its own, so that nobody else's sessions are on it
    with connect(device="cpu", prefill_chunk=512, kv_memory="129MiB") as server, _burning() as burn:
        session = server.launch(list(range(5, 40)), max_new_tokens=1)
        client = server._client
        _calls(client, session.id, CALLS)
        for _ in range(rounds):
            times["idle"] += _calls(client, session.id, CALLS)
            with _generating(server):
                times["computing"] += _calls(client, session.id, CALLS)
            with _awake(burn):
                times["beside a computing process"] += _calls(client, session.id, CALLS)
        session.terminate()
    return {
        "rounds": rounds,
        "calls_per_round": CALLS,
        "us": {name: _figures(each) for name, each in times.items()},
    }


def _calls(client: Client, session_id: str, count: int) -> list[float]:
    message = m.Describe(session_id=session_id)
    found = []
    for _ in range(count):
        began = time.perf_counter()
        client.call(message, m.SessionReply)
        found.append(1e6 * (time.perf_counter() - began))
    return found


def _figures(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {"p50": round(cuts[49], 1), "p99": round(cuts[98], 1)}


@contextlib.contextmanager
def _generating(server: Server) -> Iterator[Session]:
    """A session that decodes until the block ends."""
    running = server.launch(list(range(5, 69)), max_new_tokens=400)
    client = server._client
    client.control(m.Continue(session_id=running.id, seen=0))
    time.sleep(0.1)  # past the prefill
    try:
        yield running
    finally:
        assert running.status == "running", "the generation ended before the calls did"
        running.terminate()


@contextlib.contextmanager
def _burning() -> Iterator[int]:
    """A process that computes when it is woken; yields its pid, asleep."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _BURN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline().strip() == "ready"
            os.kill(process.pid, signal.SIGSTOP)
            yield process.pid
        finally:
            process.kill()


@contextlib.contextmanager
def _awake(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGCONT)
    time.sleep(0.1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGSTOP)


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
