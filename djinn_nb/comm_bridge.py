"""Comms between the workbench and the JupyterLab extension: snapshots out, verbs in.

The front end opens a comm of the target `djinn`; it is told the newest snapshot at once and every
newer one. What it sends is `{"type": "do", "verb", "args", "id"}`, `{"type": "select", …}` or
`{"type": "alive"}`; a `do` is answered when it was refused or is done. A comm that says nothing for
long is told nothing more until it speaks again: pages that were reloaded leave theirs behind.
Handlers only queue.

While a cell runs, comm messages may wait for it. So what is urgent (`urgent`) is executed by the
front end on a subshell of the kernel, and goes to the server past every queue; and silence while a
cell runs is no silence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from concurrent.futures import Future
from typing import Any, cast

from comm import create_comm, get_comm_manager
from IPython.core.getipython import get_ipython

from djinn_nb import briefs, verbs
from djinn_nb.workbench import Workbench, workbench
from kernel_server.protocol.errors import DjinnError
from kernel_server.protocol.snapshot import Snapshot, as_json

#: Targets: of comms that front ends open, and of the one by which the kernel says it is there.
TARGET, HELLO = "djinn", "djinn-push"
#: A front end says every 20 seconds that it is alive; silent for this long, it is gone.
SILENCE_S = 120.0


class CommBridge:
    """The comms of one kernel; made by `%load_ext djinn_nb`.

    bridge = CommBridge(workbench())
    bridge.close()
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._lock = threading.Lock()
        #: held while a snapshot is looked up and told: nobody is told an older one after a newer
        self._telling = threading.Lock()
        #: comm -> when it was last heard
        self._comms: dict[Any, float] = {}
        self._cell_since: float | None = None
        self._end = bench.subscribe(self._push)
        shell: Any = bench.current.shell
        self._events = cast("Any", getattr(shell, "events", None))
        for event, told in self._of_cells:
            self._events.register(event, told)
        get_comm_manager().register_target(TARGET, self._opened)
        # a front end that has the extension opens its comm when it hears this; others ignore it
        self._hello = create_comm(target_name=HELLO, data={"kernel": bench.kernel})

    def close(self) -> None:
        """End the comms; front ends see that the extension was unloaded."""
        self._end()
        for event, told in self._of_cells:
            with contextlib.suppress(ValueError):
                self._events.unregister(event, told)
        get_comm_manager().unregister_target(TARGET, self._opened)
        with self._lock:
            comms = [*self._comms, self._hello]
            self._comms.clear()
        for comm in comms:
            with contextlib.suppress(Exception):  # whoever is gone need not hear it
                comm.close()

    @property
    def num_open(self) -> int:
        """Front ends that are heard."""
        return len(self._comms)

    def _opened(self, comm: Any, message: dict[str, Any]) -> None:
        comm.on_msg(lambda message: self._heard(comm, message["content"]["data"]))
        comm.on_close(lambda message: self._drop(comm))
        self._greet(comm)
        self._bench.changed()

    def _greet(self, comm: Any) -> None:
        with self._telling:
            with self._lock:
                self._comms[comm] = time.monotonic()
            self._send(comm, {"type": "snapshot", "snapshot": as_json(self._bench.snapshot())})

    def insert_cell(self, code: str) -> bool:
        """Have the front end heard last insert a cell below the active one; False without one."""
        with self._lock:
            comm = max(self._comms, key=self._comms.__getitem__, default=None)
        if comm is None:
            return False
        self._send(comm, {"type": "insert_cell", "code": code})
        return True

    def _heard(self, comm: Any, data: Any) -> None:
        with self._lock:
            is_known = comm in self._comms
            if is_known:
                self._comms[comm] = time.monotonic()
        if not is_known:
            self._greet(comm)  # it had been silent
        if not isinstance(data, dict):
            return
        kind, number = data.get("type"), data.get("id")
        try:
            if kind == "do":
                given = data.get("args") or {}
                future = verbs.perform(self._bench, str(data.get("verb")), **given)
                future.add_done_callback(lambda done: self._answer(comm, number, done))
            elif kind == "select":
                fields = {f.name for f in dataclasses.fields(self._bench.selection)}
                wanted = {name: data[name] for name in data if name in fields - {"session_id"}}
                self._bench.select(**wanted)
                self._send(comm, {"type": "answer", "id": number, "ok": True, "error": None})
        except (DjinnError, TypeError) as error:
            notice = briefs.notice_of(error)
            self._bench.notify(notice)
            self._send(comm, _answer(number, notice))

    def _answer(self, comm: Any, number: Any, done: Future[Any]) -> None:
        error = done.exception()
        self._send(comm, _answer(number, None if error is None else briefs.notice_of(error)))

    def _push(self, snapshot: Snapshot) -> None:
        """Runs on the publisher's thread."""
        now = time.monotonic()
        with self._lock:
            if self._cell_since is None:  # else what they say may be waiting for the cell
                for comm in [c for c, heard in self._comms.items() if now - heard > SILENCE_S]:
                    del self._comms[comm]
            comms = list(self._comms)
        if not comms:
            return
        data = {"type": "snapshot", "snapshot": as_json(snapshot)}
        with self._telling:
            for comm in comms:
                self._send(comm, data)

    @property
    def _of_cells(self) -> tuple[tuple[str, Any], ...]:
        if self._events is None:
            return ()
        return (("pre_run_cell", self._cell_begins), ("post_run_cell", self._cell_ends))

    def _cell_begins(self, *_: object) -> None:
        if self._cell_since is None:
            self._cell_since = time.monotonic()

    def _cell_ends(self, *_: object) -> None:
        since, self._cell_since = self._cell_since, None
        if since is not None:  # what was said meanwhile is only coming now
            waited_s = time.monotonic() - since
            with self._lock:
                for comm in self._comms:
                    self._comms[comm] += waited_s

    def _send(self, comm: Any, data: dict[str, Any]) -> None:
        try:
            kernel = getattr(comm, "kernel", None)
            if kernel is None or not hasattr(comm, "topic"):
                comm.send(data)
                return
            # As nobody's answer: `comm.send` names the cell that runs as the cause, and ipykernel
            # then has all that the front end says next wait for that cell.
            content = {"comm_id": comm.comm_id, "data": data}
            kernel.session.send(
                kernel.iopub_socket, "comm_msg", content, parent={}, ident=comm.topic
            )
        except Exception:  # closed meanwhile, or its kernel is going down
            self._drop(comm)

    def _drop(self, comm: Any) -> None:
        with self._lock:
            self._comms.pop(comm, None)


def _answer(number: Any, error: Any) -> dict[str, Any]:
    return {"type": "answer", "id": number, "ok": error is None, "error": as_json(error)}


def is_loaded() -> bool:
    """Whether the extension is loaded in this kernel, so that a comm would be taken."""
    shell = get_ipython()
    magics = None if shell is None else shell.magics_manager.registry.get("DjinnMagics")
    return magics is not None and magics.bridge is not None


def urgent(verb: str) -> str:
    """Pause or terminate the current session now, while a cell runs; one line of JSON.

    It is printed and returned: `ok`, `status`, `location`, and a `notice` where it was refused.

    verb: "pause" or "terminate". For the front end, which executes it on a subshell; in Python,
    `session.pause()` does the same.
    """
    line = json.dumps(_plain(workbench().urgent(verb)))
    print(line)
    return line


def _plain(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: as_json(value) for name, value in answer.items()}
