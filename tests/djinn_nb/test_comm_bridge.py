"""The comms of a real kernel, as the JupyterLab extension uses them; also while a cell runs."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

from tests.djinn_nb.conftest import LONG, PROMPT, Process

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.notebook


class Front:
    """A front end of one kernel: cells, a comm, a subshell."""

    def __init__(self, client: BlockingKernelClient) -> None:
        self.client = client
        self.comm_id = uuid.uuid4().hex
        self.heard: list[dict[str, Any]] = []
        #: what came on the comm while something else was waited for
        self._to_hear: deque[dict[str, Any]] = deque()
        self.opened: list[str] = []

    def run(self, code: str) -> str:
        """Run a cell to its end; returns its error, or an empty text."""
        cell, failure = self.send("execute_request", code=code, silent=False), ""
        while True:
            message = self._next(200)
            if message["parent_header"].get("msg_id") != cell:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "error":
                failure = content["evalue"]
            if kind == "status" and content["execution_state"] == "idle":
                return failure

    def _next(self, timeout_s: float) -> dict[str, Any]:
        """What the kernel publishes next; raises Empty. What is said on the comm is kept."""
        message: dict[str, Any] = self.client.get_iopub_msg(timeout=timeout_s)
        kind, content = message["msg_type"], message["content"]
        if kind == "comm_open":
            self.opened.append(content["target_name"])
        if kind == "comm_msg" and content["comm_id"] == self.comm_id:
            self._to_hear.append(content["data"])
        return message

    def forget(self) -> None:
        """Hear nothing of what came until now."""
        self.heard.clear()
        self._to_hear.clear()

    def send(self, kind: str, subshell: str | None = None, **content: Any) -> str:
        message = self.client.session.msg(kind, content)
        if subshell is not None:
            message["header"]["subshell_id"] = subshell
        self.client.shell_channel.send(message)
        return message["header"]["msg_id"]

    def open(self, subshell: str | None = None) -> None:
        self.speaks_on = subshell
        self.send("comm_open", subshell, comm_id=self.comm_id, target_name="djinn", data={})

    def tell(self, **data: Any) -> None:
        self.send("comm_msg", self.speaks_on, comm_id=self.comm_id, data=data)

    def hear(
        self, holds: Callable[[dict[str, Any]], bool], timeout_s: float = 200
    ) -> dict[str, Any]:
        """The first message on the comm for which it holds."""
        deadline = time.monotonic() + timeout_s
        while True:
            while self._to_hear:
                self.heard.append(self._to_hear.popleft())
                if holds(self.heard[-1]):
                    return self.heard[-1]
            with contextlib.suppress(Empty):
                self._next(0.5)
            assert self._to_hear or time.monotonic() < deadline, self.heard[-3:]

    def snapshot(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        found = self.hear(lambda data: data["type"] == "snapshot" and holds(data["snapshot"]))
        return found["snapshot"]

    def subshell(self) -> str:
        message = self.client.session.msg("create_subshell_request", {})
        self.client.control_channel.send(message)
        while True:
            reply = self.client.get_control_msg(timeout=200)
            if reply["parent_header"].get("msg_id") == message["header"]["msg_id"]:
                return reply["content"]["subshell_id"]

    def stdout_of(self, message_id: str) -> str:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            message = self._next(200)
            if (
                message["parent_header"].get("msg_id") == message_id
                and "text" in message["content"]
            ):
                return message["content"]["text"]
        raise AssertionError("nothing was printed")


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(ROOT), env={**os.environ, "PYTHONPATH": str(ROOT)})
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.fixture
def front(kernel: KernelManager, process: Process) -> Iterator[Front]:
    client = kernel.client()
    client.start_channels()
    client.wait_for_ready(timeout=200)
    made = Front(client)
    assert made.run(f"%load_ext djinn_nb\n%djinn_connect {process.address}") == ""
    # a server that is slow to reach the layer boundary has a pause answered all the same
    assert made.run("from djinn_nb import workbench as w\nw.URGENT_S = w.BOUNDARY_S = 60") == ""
    try:
        yield made
        _clean(made)
    finally:
        client.stop_channels()


def _clean(made: Front) -> None:
    assert made.run("for one in server.sessions().index: server.attach(one).terminate()") == ""
    assert made.run("%unload_ext djinn_nb\n%reset -f") == ""


def test_a_front_end_is_told_the_newest_snapshot_and_every_newer_one(front: Front) -> None:
    front.open()
    first = front.snapshot(lambda s: s["connection"] == "ready" and s["memory"] is not None)
    front.run(f"session = server.launch({PROMPT!r}, max_new_tokens=4)\n_ = session.run_to(3)")
    then = front.snapshot(lambda s: s["session_id"] and s["sessions"][0]["status"] == "stopped")

    assert then["rev"] > first["rev"] and then["kernel"] == first["kernel"]
    assert then["sessions"][0]["location"] == "layers.3.output"
    revs = [data["snapshot"]["rev"] for data in front.heard if data["type"] == "snapshot"]
    assert revs[1:] == sorted(set(revs[1:]))


def test_a_verb_is_carried_out_and_answered_and_a_refused_one_is_told(front: Front) -> None:
    front.open()
    front.tell(type="do", verb="toggle_breakpoint", args={"location": 2}, id=1)
    assert front.hear(lambda d: d["type"] == "answer")["ok"]
    front.tell(type="do", verb="launch", args={"prompt": PROMPT, "max_new_tokens": 2}, id=2)
    answer = front.hear(lambda d: d["type"] == "answer" and d["id"] == 2)
    front.tell(type="do", verb="toggle_breakpoint", args={"location": "layers.77.output"}, id=3)
    refused = front.hear(lambda d: d["type"] == "answer" and d["id"] == 3)

    assert answer == {"type": "answer", "id": 2, "ok": True, "error": None}
    assert not refused["ok"] and refused["error"]["code"] == "UnknownLocation"
    assert front.run("assert stop.location == 'layers.2.output' and session.id") == ""


def test_nonsense_from_a_front_end_harms_nothing(front: Front) -> None:
    front.open()
    front.snapshot(lambda s: s["connection"] == "ready")
    for data in (
        {}, {"type": "do"}, {"type": "do", "verb": 7, "args": [1], "id": 1}, {"type": "alive"},
        {"type": "select", "layer": "x"}, {"type": "do", "verb": "go_to", "args": {"x": 1}},
    ):  # fmt: skip
        front.tell(**data)
    front.tell(type="select", layer=4, id=9)

    answer = front.hear(lambda d: d["type"] == "answer" and d["id"] == 9)
    front.tell(type="select", token=None, head=0, id=10)
    shown = front.snapshot(lambda s: s["selection"]["head"] == 0)
    assert answer["ok"] and shown["selection"]["layer"] == 4


def test_a_pause_over_a_subshell_stops_the_session_that_a_cell_waits_for(front: Front) -> None:
    """What the sidebar's pause button does."""
    front.run(f"session = server.launch([1, 2, 3], max_new_tokens={LONG})")
    subshell = front.subshell()
    front.open()
    cell = front.send("execute_request", code="stop = session.continue_()", silent=False)
    front.snapshot(lambda s: s["sessions"] and s["sessions"][0]["status"] == "running")

    code = "import djinn_nb.comm_bridge as bridge; bridge.urgent('pause')"
    asked = front.send("execute_request", subshell, code=code, silent=False, store_history=False)
    answer = json.loads(front.stdout_of(asked))
    shown = front.snapshot(lambda s: s["sessions"][0]["status"] == "stopped")
    while front.client.get_shell_msg(timeout=200)["parent_header"].get("msg_id") != cell:
        pass

    assert answer["ok"] and answer["notice"] is None
    assert answer["status"] == "stopped"  # with where, so that nobody need wait for a snapshot
    assert answer["location"] == shown["sessions"][0]["location"]
    assert shown["sessions"][0]["reason"] == "pause"
    assert front.run("assert stop.reason == 'pause'") == ""


def test_a_verb_over_a_subshell_is_heard_while_a_cell_runs_also_after_it_was_told_things(
    front: Front,
) -> None:
    """What is told while a cell runs must not make the front end's words wait for that cell."""
    front.open(front.subshell())
    front.snapshot(lambda s: s["connection"] == "ready")
    front.run(f"session = server.launch([1, 2, 3], max_new_tokens={LONG})")
    cell = front.send("execute_request", code="stop = session.continue_()", silent=False)
    told = front.snapshot(lambda s: s["busy"] is not None and s["busy"]["progress"] is not None)

    front.tell(type="do", verb="toggle_breakpoint", args={"location": 3}, id=21)
    answer = front.hear(lambda d: d["type"] == "answer" and d["id"] == 21)
    while front.client.get_shell_msg(timeout=200)["parent_header"].get("msg_id") != cell:
        pass

    assert answer["ok"]
    assert told["busy"]["can_pause"] and 0 <= told["busy"]["progress"]["done"] <= 1
    # heard while the cell ran: else it would have run to the session's end
    assert front.run("assert stop.location == 'layers.3.output', stop") == ""


def test_who_is_silent_is_told_nothing_more_until_it_speaks_again(front: Front) -> None:
    front.open()
    front.snapshot(lambda s: s["connection"] == "ready")
    assert front.run("from djinn_nb import comm_bridge, verbs\ncomm_bridge.SILENCE_S = 0.3") == ""
    time.sleep(0.6)
    counted = "get_ipython().magics_manager.registry['DjinnMagics'].bridge.num_open"
    assert front.run("from djinn_nb.workbench import workbench\nbench = workbench()") == ""
    deadline = time.monotonic() + 200
    while True:
        # a push outside a cell, from a thread
        push = "import threading; threading.Timer(0.5, lambda: bench.select(layer=3)).start()"
        assert front.run(push) == ""
        time.sleep(1.2)
        if front.run(f"assert {counted} == 0, {counted}") == "":
            break
        assert time.monotonic() < deadline, "it is told on and on"
    assert front.run("comm_bridge.SILENCE_S = 120") == ""

    front.forget()
    front.tell(type="alive")

    front.snapshot(lambda s: s["selection"]["layer"] == 3)
    assert front.run(f"assert {counted} == 1, {counted}") == ""


def test_a_long_cell_makes_nobody_silent(front: Front) -> None:
    front.open()
    front.snapshot(lambda s: s["connection"] == "ready")
    silence = "from djinn_nb import comm_bridge\ncomm_bridge.SILENCE_S"

    # in one cell: what passes between two of them counts as silence
    cell = "import time; time.sleep(1.5)\nget_ipython().run_line_magic('djinn_break', '4')"
    assert front.run(f"{silence} = 0.5\n{cell}\ntime.sleep(1)\ncomm_bridge.SILENCE_S = 120") == ""

    shown = front.snapshot(lambda s: bool(s["pending"]))
    assert shown["pending"][0]["location"] == "layers.4.output"


def test_a_cell_is_inserted_by_the_front_end_that_is_there(front: Front) -> None:
    bridge = "get_ipython().magics_manager.registry['DjinnMagics'].bridge"
    assert front.run(f"assert not {bridge}.insert_cell('1')") == ""
    front.open()
    front.snapshot(lambda s: True)

    code = f"assert {bridge}.insert_cell('stop = session.next()')"
    front.send("execute_request", code=code, silent=False)

    inserted = front.hear(lambda d: d["type"] == "insert_cell")
    assert inserted["code"] == "stop = session.next()"


def test_a_front_end_can_ask_whether_a_comm_would_be_taken(front: Front, process: Process) -> None:
    asked = "from djinn_nb.comm_bridge import is_loaded"
    assert front.run(f"{asked}\nassert is_loaded()") == ""
    assert front.run("%unload_ext djinn_nb\nassert not is_loaded()") == ""
    assert front.run(f"%load_ext djinn_nb\n%djinn_connect {process.address}") == ""
    assert front.run("assert is_loaded()") == ""


def test_control_the_same_pause_on_the_main_shell_waits_for_the_cell(front: Front) -> None:
    front.run(f"session = server.launch([1, 2, 3], max_new_tokens={LONG})\nimport time")
    front.open()
    code = "import djinn_nb.comm_bridge as bridge; bridge.urgent('terminate')"
    began = time.monotonic()
    front.send("execute_request", code="time.sleep(2)\nassert session.status == 'waiting'")
    answer = json.loads(front.stdout_of(front.send("execute_request", code=code, silent=False)))

    assert time.monotonic() - began >= 2
    assert answer["status"] == "terminated"


def test_the_kernel_says_that_it_is_there_and_says_goodbye(front: Front, process: Process) -> None:
    front.open()
    front.snapshot(lambda s: True)
    front.opened.clear()
    front.send("execute_request", code="%unload_ext djinn_nb\n%load_ext djinn_nb", silent=False)
    closed = False
    while not (closed and front.opened):
        message = front._next(200)
        kind, content = message["msg_type"], message["content"]
        closed |= kind == "comm_close" and content["comm_id"] == front.comm_id

    assert "djinn-push" in front.opened  # the target that the extension registers
    assert front.run(f"%djinn_connect {process.address}") == ""
