"""The client in a real notebook kernel: panels, progress, interrupts, one-line errors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

import djinn_nb as djinn
from tests.djinn_nb.conftest import LONG, PROMPT, Process

pytestmark = pytest.mark.notebook


class Kernel:
    """A notebook kernel, cell by cell."""

    def __init__(self) -> None:
        from jupyter_client.manager import start_new_kernel

        self.manager, self.client = start_new_kernel(startup_timeout=200)

    def send(self, cell: str) -> str:
        return str(self.client.execute(cell))

    def outputs(self, sent: str, timeout_s: float = 200) -> list[dict[str, Any]]:
        """What a cell put out, once it is done."""
        found: list[dict[str, Any]] = []
        while True:
            message = self.client.get_iopub_msg(timeout=timeout_s)
            if message["parent_header"].get("msg_id") != sent:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                return found
            found.append({"kind": kind, **content})

    def run(self, cell: str) -> list[dict[str, Any]]:
        return self.outputs(self.send(cell))

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def one_kernel() -> Iterator[Kernel]:
    made = Kernel()
    assert _errors(made.run("%load_ext djinn_nb")) == []
    yield made
    made.close()


@pytest.fixture
def kernel(one_kernel: Kernel, process: Process, server: djinn.Server) -> Kernel:
    """Connected, with no breakpoints set."""
    assert _errors(one_kernel.run(f"%djinn_connect {process.address}\n%djinn_breaks clear")) == []
    return one_kernel


def _errors(outputs: list[dict[str, Any]]) -> list[str]:
    return ["\n".join(o["traceback"]) for o in outputs if o["kind"] == "error"]


def _shown(outputs: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [o["data"] for o in outputs if o["kind"] == "display_data"]


def test_a_stop_displays_itself_with_tokens_heat_map_and_lens(kernel):
    kernel.run("%djinn_break 3")

    outputs = kernel.run(f"%%djinn_run --max-new-tokens 3\n{PROMPT}")

    assert _errors(outputs) == []
    (panel,) = _shown(outputs)
    for part in ("data:image/png;base64,", "logit lens at position 13", "·Mary", "layers"):
        assert part in panel["text/html"]
    assert panel["text/plain"].startswith("stopped at layers.3.output")

    (again,) = [o for o in kernel.run("stop") if o["kind"] == "execute_result"]
    assert again["data"]["text/html"] == panel["text/html"]

    kernel.run("%djinn_breaks clear")
    (end,) = _shown(kernel.run("%djinn_continue"))
    assert "finished (max_new_tokens)" in end["text/html"]


def test_an_error_is_one_line_with_the_line_of_the_cell(kernel):
    (trace,) = _errors(kernel.run("x = 1\nserver.attach('nobody')"))

    assert "\n" not in trace
    assert trace.startswith("UnknownSession: ")
    assert trace.endswith("(line 2 of the cell)")


def test_an_interrupted_cell_says_what_still_runs_and_can_wait_on(kernel, server, eventually):
    sent = kernel.send(f"%%djinn_run --max-new-tokens {LONG}\nMary")
    eventually(lambda: "running" in set(server.sessions().status))
    time.sleep(0.3)

    kernel.manager.interrupt_kernel()
    outputs = kernel.outputs(sent)

    (trace,) = _errors(outputs)
    assert trace.startswith("interrupted: session ")
    assert "session.wait() waits on, session.pause() stops it" in trace
    assert "\n" not in trace
    assert set(server.sessions().status) == {"running"}
    (panel,) = _shown(kernel.run("%djinn_pause"))
    assert "(pause)" in panel["text/plain"]
    assert _errors(kernel.run("session.next()")) == []


def test_progress_is_one_line_that_goes_away(kernel):
    outputs = kernel.run("%%djinn_run --max-new-tokens 1200\nMary")

    assert _errors(outputs) == []
    updates = [o["data"] for o in outputs if o["kind"] == "update_display_data"]
    assert any("1200" in data["text/plain"] for data in updates)
    assert updates[-1]["text/plain"] == ""
    assert not [o for o in outputs if o["kind"] == "stream" and o["name"] == "stderr"]


def test_a_session_survives_the_kernel(process, server):
    kernel = Kernel()
    kernel.run(f"%load_ext djinn_nb\n%djinn_connect {process.address}")
    kernel.run("%%djinn_run --max-new-tokens 3 --stop-on-entry --name kept\nMary")
    kernel.run("%djinn_next")
    kernel.close()

    with djinn.connect(process.address) as later:
        session = later.attach("kept")

        assert session.stop.location == "layers.0.output"
        assert isinstance(session.continue_(), djinn.Finished)
