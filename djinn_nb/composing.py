"""One snapshot from what is known in the kernel: nothing here asks the server, so nothing waits.

Which states are bad, and what may be done in each, is decided here; the words are in `briefs`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from djinn_nb import briefs
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import AccessDenied, ConnectionLost, NoServer, UnknownSession
from kernel_server.protocol.snapshot import (
    Busy,
    Connection,
    Notice,
    ProgressBrief,
    SessionBrief,
    Snapshot,
)

if TYPE_CHECKING:
    from djinn_nb.client import Client
    from djinn_nb.current import Current
    from djinn_nb.session import Session
    from djinn_nb.workbench import Workbench

#: A cell that has run for this long is one that clicks wait for, seconds; shorter ones would flash.
LONG_CELL_S = 1.0


def compose(bench: Workbench, before: Snapshot) -> Snapshot:
    """How everything stands now. before: the snapshot made last; its `rev` is kept."""
    current = bench.current
    server = current.server
    actions = tuple(action for _, action in sorted(bench.actions.copy().items()))
    busy = next(iter(bench.busy.copy().values()), None)
    if server is not bench.denied_beside:
        bench.denied = None  # connected since, in a cell or by a click
    if server is None:
        connection: Connection = "none" if bench.denied is None else "denied"
        if bench.is_connecting:
            connection = "connecting" if bench.loading is None else "loading"
        notice = bench.notice or bench.denied
        if notice is None and connection == "none":
            notice = briefs.not_connected()
        return Snapshot(
            rev=before.rev,
            kernel=bench.kernel,
            connection=connection,
            address="" if connection == "none" else bench.wanted_address,
            notice=notice,
            progress=bench.loading,
            pending=briefs.pending_briefs(current.pending, 0),
            actions=actions,
            busy=busy,
            selection=bench.follow(None, 0),
            can=() if bench.is_connecting else ("connect",),
        )
    client = server.client
    connection = _connection(bench, client)
    model_info = client.known_model
    model = None if model_info is None else briefs.model_brief(model_info)
    num_layers = 0 if model is None else model.num_layers
    if connection == "lost":
        bench.was_lost = True
    elif connection == "ready" and bench.was_lost:
        bench.was_lost = False
        if bench.notice is not None and bench.notice.code in _OF_CONNECTION:
            bench.notice = None  # what failed for want of a connection
    session = current.session
    here, trouble = _here(session, client)
    if here is not None and session is not None and connection == "ready":
        if session.is_taken_over:
            trouble = briefs.taken_over(here)
        elif here.status != "running" and here.stop_number != session.seen:
            bench.adopt(session)  # an interrupted cell left it running
        if here.status == "failed" and trouble is None:
            trouble = briefs.failed(here)
    taken_over = trouble is not None and trouble.code == "TakenOver"
    infos = sorted(client.mirror.sessions(), key=lambda info: (len(info.id), info.id))
    known = () if model is None else infos
    if client.trouble is not None:
        notice = briefs.lost(server.address, client.trouble)
    else:
        said = bench.notice
        if trouble is not None and said is not None and said.level == "info":
            said = None  # a remark stands behind what has to be dealt with
        notice = said or bench.denied or trouble or briefs.leases(client.leases.standing)
    running = here if here is not None and here.status == "running" else None
    return Snapshot(
        rev=before.rev,
        kernel=bench.kernel,
        connection=connection,
        address=server.address,
        notice=notice,
        progress=bench.loading or bench.reader.loading,
        model=model,
        session_id=None if here is None else here.id,
        sessions=tuple(
            _session(info, num_layers, taken_over and here is not None and info.id == here.id)
            for info in known
        ),
        breakpoints=() if here is None else briefs.breakpoint_briefs(here.breakpoints, num_layers),
        pending=briefs.pending_briefs(current.pending, num_layers),
        branches=() if here is None else bench.reader.branches(client, here.id),
        edits=() if here is None else briefs.edit_briefs(here.edits),
        memory=bench.reader.memory(client),
        selection=bench.follow(here, num_layers),
        actions=actions,
        busy=_busy(busy, running, client, before, in_cell=_waits_for_cell(current)),
        can=_can(connection, here, taken_over),
    )


def _connection(bench: Workbench, client: Client) -> Connection:
    if bench.is_connecting:
        return "connecting" if bench.loading is None else "loading"
    if client.trouble is None:
        if client.known_model is not None:
            return "ready"
        # a server that took the place of another one is still being looked at
        return "connecting" if bench.reader.loading is None else "loading"
    return "denied" if isinstance(client.trouble, AccessDenied) else "lost"


def _here(session: Session | None, client: Client) -> tuple[m.SessionInfo | None, Notice | None]:
    """The newest description of the notebook's session; or why there is none."""
    if session is None:
        return None, None
    if session.client is not client:  # of a server that the notebook has left
        return None, None
    try:
        session_id = session.id
    except UnknownSession:
        return None, briefs.replaced(session.newest.id, str(client.transport.address))
    if client.mirror.is_gone(session_id):
        return None, briefs.ended(session_id, here=session_id in client.mirror.ended_here)
    return session.newest, None


def _session(info: m.SessionInfo, num_layers: int, taken_over: bool) -> SessionBrief:
    return briefs.session_brief(info, num_layers, taken_over=taken_over)


def _waits_for_cell(current: Current) -> bool:
    """Whether a cell has run for so long that somebody may want to click meanwhile."""
    since_s = current.cell_since_s
    return since_s is not None and time.monotonic() - since_s > LONG_CELL_S


def _busy(
    busy: Busy | None,
    running: m.SessionInfo | None,
    client: Client,
    before: Snapshot,
    *,
    in_cell: bool,
) -> Busy | None:
    """What is being carried out; a session that a cell runs counts, with how far it is."""
    if running is None:
        return busy if busy is None else replace(busy, can_pause=False)
    event = client.mirror.progress(running.id)
    progress = None
    if event is not None:
        share = max(0.0, min(1.0, event.done / event.total)) if event.total else None
        progress = ProgressBrief(text=event.text or f"{event.done} of {event.total}", done=share)
    if busy is not None:
        return replace(busy, can_pause=True, progress=progress or busy.progress, in_cell=in_cell)
    text = f"session {running.id} runs"
    was = before.busy
    since_s = was.since_s if was is not None and was.text == text else time.time()
    return Busy(text=text, since_s=since_s, can_pause=True, progress=progress, in_cell=in_cell)


_OF_CONNECTION = (NoServer.code, ConnectionLost.code)
#: status of the current session -> verbs that it takes
_CAN: dict[str, tuple[str, ...]] = {
    "waiting": (
        "continue", "next", "step_in", "step_out", "run_to", "fork", "evict", "restore", "pin",
    ),
    "running": ("pause",),
    "stopped": (
        "continue", "next", "step_in", "step_out", "step_back", "run_to", "go_to", "rewind",
        "prune", "fork", "evict", "restore", "pin",
    ),
    "finished": (
        "step_back", "go_to", "rewind", "prune", "fork", "evict", "restore", "pin",
    ),
    "failed": (),
}  # fmt: skip
#: always: without a session they are of runs to come
_BREAKPOINTS = ("toggle_breakpoint", "set_breakpoint", "clear_breakpoints")


def _can(connection: Connection, info: m.SessionInfo | None, taken_over: bool) -> tuple[str, ...]:
    """Verbs that the server would not refuse for where things stand."""
    if connection in ("connecting", "loading"):
        return ()
    if connection != "ready":
        return ("connect",)
    always = ["connect", "launch", "attach", "select"]
    if info is None:
        return (*always, *_BREAKPOINTS, "remove_breakpoint")
    if taken_over:
        return (*always, "look", *(("pause",) if info.status == "running" else ()), "terminate")
    found = [*always, *_CAN[info.status], *_BREAKPOINTS, "remove_breakpoint", "look", "terminate"]
    if info.status in ("waiting", "running", "stopped"):
        found.append("enable_breakpoint")
    if info.status == "stopped" and any(edit.at_this_stop for edit in info.edits):
        found.append("undo")
    return tuple(found)
