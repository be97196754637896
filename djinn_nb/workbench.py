"""What the panels and the sidebar of one notebook share: actions, questions, one snapshot for all.

Callers (callbacks of widgets, handlers of comms, any thread of the kernel) queue and return. One
worker thread carries out actions in order; a run, which waits until its session rests, has a thread
of its own, so that it keeps nothing else; an asker thread answers questions, the newest of each
kind. A publisher thread makes snapshots when something has changed and tells the subscribers.

The notebook's server, session and stop are those of the magics (`current.Current`): a click and a
cell act on the same objects. What a verb does is decided in `verbs`, how things look in the views.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from djinn_nb import briefs
from djinn_nb.progress import heard_by
from djinn_nb.stopped import Finished, Stopped
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import (
    AccessDenied,
    BadArgument,
    ConnectionFailed,
    DjinnError,
    UnknownSession,
)
from kernel_server.protocol.snapshot import (
    ActionBrief,
    Busy,
    Connection,
    MemoryBrief,
    ModelBrief,
    NodeBrief,
    Notice,
    ProgressBrief,
    Selection,
    Snapshot,
    SwapBrief,
)

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from djinn_nb.client import Client
    from djinn_nb.current import Current
    from djinn_nb.session import Session

#: Snapshots are at least this far apart, and memory is asked for this often while somebody looks.
PAUSE_S, MEMORY_S = 0.03, 2.0
#: Kept of what was done, and of swaps.
MOST_ACTIONS, MOST_SWAPS = 50, 200
#: How long an urgent call waits for the server, seconds.
URGENT_S = 5.0

_UNCHANGED: Any = object()


class Workbench:
    """What the views of one notebook act on; made by `workbench()`.

    bench = workbench()
    bench.do("next", "stop = session.next()", run)
    bench.snapshot().session
    """

    def __init__(self, current: Current) -> None:
        self.current = current
        self.kernel = secrets.token_hex(4)
        self._lock = threading.Lock()
        self._actions: deque[ActionBrief] = deque(maxlen=MOST_ACTIONS)
        self._numbers = itertools.count(1)
        self._notice: Notice | None = None
        self._selection = Selection()
        self._busy: dict[int, Busy] = {}
        self._loading: ProgressBrief | None = None
        self._connecting = False
        self._refused: Connection = "none"
        self._subscribers: list[Callable[[Snapshot], None]] = []
        self._watched: Client | None = None
        self._listed = False
        self._branches: tuple[tuple[str, int], tuple[NodeBrief, ...]] = (("", 0), ())
        self._memory: MemoryBrief | None = None
        self._memory_at = 0.0
        self._snapshot = Snapshot(rev=0, kernel=self.kernel, connection="none")
        self._closed = False
        self._changed = threading.Event()
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._questions: dict[str, tuple[Callable[[], Any], Callable[..., None]]] = {}
        self._asked = threading.Event()
        current.listeners.append(self.changed)
        for target, name in (
            (self._carry_out, "djinn-worker"),
            (self._answer, "djinn-asker"),
            (self._publish, "djinn-publisher"),
        ):
            threading.Thread(target=target, name=name, daemon=True).start()
        self.changed()

    # -- looking --------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The newest snapshot; asks nothing of the server."""
        return self._snapshot

    def subscribe(self, told: Callable[[Snapshot], None]) -> Callable[[], None]:
        """Tell `told` every newer snapshot, on the publisher's thread; returns how to end that."""
        self._subscribers.append(told)
        self.changed()

        def unsubscribe() -> None:
            with contextlib.suppress(ValueError):
                self._subscribers.remove(told)

        return unsubscribe

    def changed(self) -> None:
        """Something may look different: a new snapshot is made soon. Any thread."""
        self._changed.set()

    @property
    def selection(self) -> Selection:
        """What the views look at together."""
        return self._selection

    def select(
        self, *, layer: Any = _UNCHANGED, head: Any = _UNCHANGED, token: Any = _UNCHANGED
    ) -> None:
        """Choose a layer, a head, a token (absolute position) for all views; None: no choice.

        Raises BadArgument for what the model or the session has not.
        """
        wanted = {"layer": layer, "head": head, "token": token}
        given = {name: value for name, value in wanted.items() if value is not _UNCHANGED}
        for name, value in given.items():
            if value is not None and (type(value) is not int or value < 0):
                raise BadArgument(f"{name} is a whole number from 0 or None, not {value!r}")
        model, session = self._snapshot.model, self._snapshot.session
        chosen = replace(self._selection, **given)
        if model is not None and chosen.layer is not None and chosen.layer >= model.num_layers:
            raise BadArgument(f"layer {chosen.layer}: the model has {model.num_layers}, from 0")
        heads = None if model is None else model.num_heads
        if heads is not None and chosen.head is not None and chosen.head >= heads:
            raise BadArgument(f"head {chosen.head}: a layer has {heads}, from 0")
        if session is not None and chosen.token is not None and chosen.token >= session.num_tokens:
            raise BadArgument(f"token {chosen.token}: the session has {session.num_tokens}, from 0")
        self._selection = chosen
        self.changed()

    # -- acting ---------------------------------------------------------------------------

    def do(
        self, label: str, code: str, run: Callable[[], Any], *, waits: bool = False
    ) -> Future[Any]:
        """Carry out an action on a thread of the workbench; returns at once.

        code: the Python that repeats it, kept with it. run: calls the public API. waits: it waits
        until a session rests, or a model is loaded, and must not keep the actions after it.
        An error becomes a notice, and is in the future.
        """
        future: Future[Any] = Future()
        number = next(self._numbers)
        action = ActionBrief(number=number, label=label, code=code, outcome="running")
        with self._lock:
            self._actions.append(action)

        def carry_out() -> None:
            future.set_running_or_notify_cancel()
            self._run(action, run, future, can_pause=waits)

        if waits:
            threading.Thread(target=carry_out, name=f"djinn-run-{number}", daemon=True).start()
        else:
            self._work.put(carry_out)
        return future

    def _run(
        self, action: ActionBrief, run: Callable[[], Any], future: Future[Any], *, can_pause: bool
    ) -> None:
        busy = Busy(text=action.label, since_s=time.time(), can_pause=can_pause)
        self._busy[action.number] = busy
        self.changed()

        def told(label: str, done: float, total: float, text: str) -> None:
            share = min(1.0, done / total) if total else None
            words = f"{label}, {text}" if text else label
            progress = ProgressBrief(text=words, done=share)
            self._busy[action.number] = replace(busy, progress=progress)
            self.changed()

        outcome: dict[str, Any] = {"outcome": "done"}
        try:
            with heard_by(told):
                result = run()
        except BaseException as error:  # a thread of ours has nobody else to tell
            self._notice = briefs.notice_of(error)
            outcome = {"outcome": "failed", "error": self._notice.text}
            future.set_exception(error)
        else:
            if self._notice is not None and self._notice.level == "error":
                self._notice = None
            future.set_result(result)
        finally:
            self._busy.pop(action.number, None)
            with self._lock:
                for i, kept in enumerate(self._actions):
                    if kept.number == action.number:
                        self._actions[i] = replace(kept, **outcome)
            self.changed()

    def ask(
        self, key: str, run: Callable[[], Any], told: Callable[[Any, BaseException | None], None]
    ) -> None:
        """Ask a question whose answer only the newest matters of: a preview, a lens, a map.

        At most one is under way; of those that wait, the newest of each key is kept. told: gets
        (answer, error) on the asker's thread; nobody is told of one that was dropped.
        """
        with self._lock:
            self._questions.pop(key, None)
            self._questions[key] = (run, told)
        self._asked.set()

    def urgent(self, verb: str) -> dict[str, Any]:
        """Pause or terminate the current session now, past every queue; from any thread.

        verb: "pause" (at the next layer boundary) or "terminate". Returns `ok`, the session's
        `status`, and a `notice` where it was refused.
        """
        try:
            session = self.current.need_session()
            if verb == "pause":
                return self._pause(session)
            if verb == "terminate":
                session.client.call(
                    m.Terminate(session_id=session.id), m.Terminated, timeout_s=URGENT_S
                )
                session.client.mirror.take(m.Event(seq=0, kind="terminated", session_id=session.id))
                return {"ok": True, "status": "terminated", "notice": None}
            raise BadArgument(f"an urgent verb is 'pause' or 'terminate', not {verb!r}")
        except DjinnError as error:
            self._notice = briefs.notice_of(error)
            return {"ok": False, "status": "", "notice": self._notice}
        finally:
            self.changed()

    def _pause(self, session: Session) -> dict[str, Any]:
        client = session.client
        waited = client.mirror.is_waited_for(session.id)
        info = client.call(m.Pause(session_id=session.id), m.SessionReply, timeout_s=URGENT_S)
        client.mirror.update(info.session)
        if not waited and info.session.status == "running":
            # nobody would show where it stops: an interrupted cell left it running
            self.do("pause", "stop = session.pause()", lambda: self.arrived(session.wait()),
                    waits=True)  # fmt: skip
        return {"ok": True, "status": info.session.status, "notice": None}

    def arrived(self, found: Stopped | Finished | None) -> Stopped | Finished | None:
        """Bind what a run ended in as the notebook's `stop`, and let the views follow it."""
        self.current.bind("stop", found)
        if isinstance(found, Stopped):
            self.follow(found.session.newest)
        return found

    def follow(self, info: m.SessionInfo) -> None:
        """Look at the last token of the layer that a session stands at."""
        if info.stop is not None and self._watched is not None:
            layer = briefs.layer_at(info.stop.location, self._watched.model.num_layers)
            self._selection = replace(
                self._selection,
                session_id=info.id,
                layer=self._selection.layer if layer is None else layer,
                token=info.stop.end_token - 1,
            )

    def notify(self, notice: Notice | None) -> None:
        """Show a notice, or take it away."""
        self._notice = notice
        self.changed()

    @contextlib.contextmanager
    def connecting(self) -> Iterator[None]:
        """Show that a server is being connected, and why it could not be."""
        self._connecting, self._refused = True, "none"
        self.changed()
        try:
            yield
        except AccessDenied:
            self._refused = "denied"
            raise
        finally:
            self._connecting, self._loading = False, None
            self.changed()

    def loading(self, text: str, done: float | None) -> None:
        """Show how far the model is loaded."""
        self._loading = ProgressBrief(text=text, done=done)
        self.changed()

    def close(self) -> None:
        """End the threads; the server and its sessions stay."""
        self._closed = True
        self._subscribers.clear()
        self._work.put(None)
        self._asked.set()
        self._changed.set()
        with contextlib.suppress(ValueError):
            self.current.listeners.remove(self.changed)
        self._watch(None)

    # -- the threads ----------------------------------------------------------------------

    def _carry_out(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def _answer(self) -> None:
        while True:
            self._asked.wait()
            with self._lock:
                key = next(iter(self._questions), None)
                if key is None:
                    self._asked.clear()
                else:
                    run, told = self._questions.pop(key)
            if self._closed:
                return
            if key is None:
                continue
            answer, refusal = None, None
            try:
                with heard_by(lambda *_: None):
                    answer = run()
            except Exception as error:
                refusal = error
            try:
                told(answer, refusal)
            except Exception as error:  # a view that breaks takes no other with it
                self.notify(briefs.notice_of(error))

    def _publish(self) -> None:
        while not self._closed:
            self._changed.wait(MEMORY_S if self._subscribers else None)
            if self._closed:
                return
            self._changed.clear()
            try:
                made = self._made()
            except Exception as error:
                made = replace(self._snapshot, notice=briefs.notice_of(error))
            if replace(made, rev=self._snapshot.rev) != self._snapshot:
                self._snapshot = replace(made, rev=self._snapshot.rev + 1)
                for told in list(self._subscribers):
                    with contextlib.suppress(Exception):  # as above
                        told(self._snapshot)
            time.sleep(PAUSE_S)

    # -- a snapshot -----------------------------------------------------------------------

    def _made(self) -> Snapshot:
        server = self.current.server
        client = None if server is None else server.client
        self._watch(client)
        with self._lock:
            actions = tuple(self._actions)
        common: dict[str, Any] = {
            "rev": self._snapshot.rev,
            "kernel": self.kernel,
            "notice": self._notice,
            "actions": actions,
            "busy": next(iter(self._busy.copy().values()), None),
        }
        if client is None:
            connection: Connection = "connecting" if self._connecting else self._refused
            if self._loading is not None:
                connection = "loading"
            return Snapshot(
                **common,
                connection=connection,
                progress=self._loading,
                pending=briefs.pending_briefs(self.current.pending, 0),
                can=() if self._connecting else ("connect",),
            )
        connection = self._state_of(client)
        if connection in ("lost", "denied") and self._notice is None:
            common["notice"] = _lost(client)
        model = briefs.model_brief(client.model)
        if connection == "ready" and not self._listed:
            try:
                for info in client.call(m.ListSessions(), m.Sessions).sessions:
                    client.mirror.update(info)
                self._listed = True
            except ConnectionFailed as error:
                connection, common["notice"] = "lost", briefs.notice_of(error)
        session = self.current.session
        here = None if session is None else self._info_of(session, client)
        infos = sorted(client.mirror.sessions(), key=lambda info: (len(info.id), info.id))
        sessions = tuple(
            briefs.session_brief(
                info,
                model.num_layers,
                taken_over=here is not None
                and info.id == here.id
                and session is not None
                and self._is_taken_over(session, info, client),
            )
            for info in infos
        )
        listed = here is not None and any(one.id == here.id for one in sessions)
        if not listed:
            here = None
        return Snapshot(
            **common,
            connection=connection,
            address=str(client.transport.address),
            progress=self._loading,
            model=model,
            session_id=None if here is None else here.id,
            sessions=sessions,
            breakpoints=()
            if here is None
            else briefs.breakpoint_briefs(here.breakpoints, model.num_layers),
            pending=briefs.pending_briefs(self.current.pending, model.num_layers),
            branches=() if here is None else self._branches_of(here, client, connection),
            edits=() if here is None else briefs.edit_briefs(here.edits),
            memory=self._memory_of(client, connection),
            selection=self._selection_in(here, model),
            can=_can(connection, here),
        )

    def _watch(self, client: Client | None) -> None:
        """Hear the events of the notebook's server, and of no other."""
        if client is self._watched:
            return
        if self._watched is not None:
            with contextlib.suppress(ValueError):
                self._watched.mirror.listeners.remove(self._heard)
        self._watched, self._listed = client, False
        self._memory, self._memory_at = None, 0.0
        self._branches = (("", 0), ())
        self._selection = Selection()
        if client is not None:
            client.mirror.listeners.append(self._heard)

    def _heard(self, event: m.Event | None) -> None:
        """Runs on the events thread of the connection."""
        if event is None:
            self._listed = False
        elif event.kind == "swapped":
            self._memory_at = 0.0
        self.changed()

    def _state_of(self, client: Client) -> Connection:
        trouble = client.trouble
        if trouble is None:
            return "connecting" if self._connecting else "ready"
        return "denied" if isinstance(trouble, AccessDenied) else "lost"

    def _info_of(self, session: Session, client: Client) -> m.SessionInfo | None:
        """The newest description of the notebook's session; None when it is gone."""
        if session.client is not client:
            return None
        try:
            if client.mirror.is_gone(session.id):
                return None
        except UnknownSession as error:  # another server stands in its place
            if self._notice is None:
                self._notice = briefs.notice_of(error)
            return None
        return session.newest

    def _is_taken_over(self, session: Session, info: m.SessionInfo, client: Client) -> bool:
        """Whether somebody else moved it: it rests where this notebook has not seen it."""
        return (
            info.status == "stopped"
            and info.stop_number != session.seen
            and not client.mirror.is_waited_for(info.id)
        )

    def _branches_of(
        self, info: m.SessionInfo, client: Client, connection: Connection
    ) -> tuple[NodeBrief, ...]:
        key = (info.id, info.revision)
        if self._branches[0] == key or connection != "ready" or info.status == "running":
            return self._branches[1] if self._branches[0][0] == info.id else ()
        try:
            reply = client.call(m.ListBranches(session_id=info.id), m.Branches)
        except DjinnError:  # it ended or runs by now; the next event says so
            return ()
        self._branches = (key, briefs.node_briefs(reply.nodes))
        return self._branches[1]

    def _memory_of(self, client: Client, connection: Connection) -> MemoryBrief | None:
        now = time.monotonic()
        if connection != "ready" or not self._subscribers or now - self._memory_at < MEMORY_S:
            return self._memory
        try:
            rows = client.call(m.DescribeMemory(), m.MemoryReply).rows
        except DjinnError:
            return self._memory
        swaps = [
            SwapBrief(time_s=time_s, session_id=session_id, nbytes=nbytes, text=text)
            for time_s, session_id, nbytes, text in client.mirror.swaps.newest(MOST_SWAPS)
        ]
        self._memory, self._memory_at = briefs.memory_brief(rows, swaps), now
        return self._memory

    def _selection_in(self, info: m.SessionInfo | None, model: ModelBrief) -> Selection:
        """The selection as far as the session has what it names."""
        if info is None:
            return replace(self._selection, session_id=None, token=None)
        if self._selection.session_id != info.id:
            self._selection = Selection(session_id=info.id)
            self.follow(info)
        chosen = self._selection
        if chosen.token is not None and chosen.token >= len(info.tokens):
            chosen = replace(chosen, token=len(info.tokens) - 1)
        self._selection = chosen
        return chosen


def _lost(client: Client) -> Notice:
    assert client.trouble is not None
    return briefs.notice_of(client.trouble)


#: status of the current session -> verbs that it takes
_CAN: dict[str, tuple[str, ...]] = {
    "waiting": ("continue", "next", "step_in", "step_out", "run_to"),
    "running": ("pause",),
    "stopped": (
        "continue", "next", "step_in", "step_out", "step_back", "run_to", "go_to", "rewind",
        "prune", "look", "evict", "restore", "pin",
    ),
    "finished": ("step_back", "go_to", "rewind", "prune", "evict", "restore", "pin"),
    "failed": (),
}  # fmt: skip


def _can(connection: Connection, info: m.SessionInfo | None) -> tuple[str, ...]:
    """Verbs that the server would not refuse for where things stand."""
    if connection != "ready":
        return ("connect",)
    always = ("connect", "launch", "attach", "toggle_breakpoint", "clear_breakpoints")
    if info is None:
        return always
    found = [*always, *_CAN[info.status], "terminate"]
    if info.status in ("waiting", "running", "stopped"):
        found += ["set_breakpoint", "enable_breakpoint", "remove_breakpoint"]
    if info.status in ("waiting", "stopped", "finished"):
        found.append("fork")
    if info.status == "stopped" and any(edit.at_this_stop for edit in info.edits):
        found.append("undo")
    return tuple(dict.fromkeys(found))


def workbench(shell: InteractiveShell | None = None) -> Workbench:
    """The workbench of this notebook, made on first use; loads the extension where it is not.

    Raises BadArgument outside IPython.
    """
    from IPython.core.getipython import get_ipython

    shell = shell or get_ipython()
    if shell is None:
        raise BadArgument("panels live in a notebook: open one, or use the Session in Python")
    if "DjinnMagics" not in shell.magics_manager.registry:
        shell.run_line_magic("load_ext", "djinn_nb")
    magics = shell.magics_manager.registry["DjinnMagics"]
    if magics.bench is None:
        magics.bench = Workbench(magics)
    found: Workbench = magics.bench
    return found
