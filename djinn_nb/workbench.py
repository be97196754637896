"""What the panels and the sidebar of one notebook share: actions, questions, one snapshot for all.

Callers (callbacks of widgets, handlers of comms, any thread of the kernel) queue and return. Who
waits, so that nothing else has to: a *worker* carries out actions in order; a run, which ends when
its session rests, has a thread of its own; an *asker* answers questions, the newest of each kind; a
*reader* fetches what snapshots need; a *publisher* makes them, from what is known here alone, and
tells the subscribers. `urgent` passes all of them. Wake-ups are `SimpleQueue`s: an interrupt of the
main thread leaves no lock held.

The notebook's server, session and stop are those of the magics (`current.Current`): a click and a
cell act on the same objects. What a verb does is decided in `verbs`, how things look in the views.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from djinn_nb import briefs
from djinn_nb.composing import compose
from djinn_nb.progress import heard_by
from djinn_nb.reading import Reader
from djinn_nb.stopped import Finished, Stopped
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import AccessDenied, BadArgument, DjinnError
from kernel_server.protocol.snapshot import (
    ActionBrief,
    Busy,
    Notice,
    ProgressBrief,
    Selection,
    Snapshot,
)

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from djinn_nb.current import Current
    from djinn_nb.server import Server
    from djinn_nb.session import Session

#: Snapshots are at least this far apart, and looked at anew this often while somebody watches.
PAUSE_S, TICK_S = 0.02, 2.0
#: Kept of what was done.
MOST_ACTIONS = 50
#: How long an urgent call waits for the server, and a pause for the layer boundary, seconds.
URGENT_S, BOUNDARY_S = 5.0, 2.0

_UNCHANGED: Any = object()
Told = Callable[[Snapshot], None]
Answered = Callable[[Any, BaseException | None], None]


class Workbench:
    """What the views of one notebook act on; made by `workbench()`.

    bench = workbench()
    bench.do("next", "stop = session.next()", lambda: bench.arrived(session.next()))
    bench.snapshot().session
    """

    def __init__(self, current: Current) -> None:
        self.current = current
        self.kernel = secrets.token_hex(4)
        self.reader = Reader(current, self.changed)
        #: what is under way and was done, by number; written by one thread per number
        self.busy: dict[int, Busy] = {}
        self.actions: dict[int, ActionBrief] = {}
        #: what the last action had to say
        self.notice: Notice | None = None
        #: how far a model is loaded; while connecting
        self.loading: ProgressBrief | None = None
        self.is_connecting = False
        #: where, as far as it was said
        self.wanted_address = ""
        #: why the last connecting was refused for its access token
        self.denied: Notice | None = None
        #: the notebook's server then: with another one, that is over
        self.denied_beside: Server | None = None
        #: the connection broke, and what failed for that may still be shown
        self.was_lost = False
        self._selection = Selection()
        self._followed: tuple[str, int] | None = None
        self._forward: int | None = None
        self._numbers = itertools.count(1)
        self._subscribers: list[Told] = []
        self._closed = False
        self._wakes: SimpleQueue[SimpleQueue[None] | None] = SimpleQueue()
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._questions: SimpleQueue[tuple[str, Callable[[], Any], Answered] | None] = SimpleQueue()
        self._adopting: tuple[str, int] | None = None
        self._snapshot = Snapshot(rev=0, kernel=self.kernel, connection="none")
        self._snapshot = replace(compose(self, self._snapshot), rev=1)
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in (
                (self._carry_out, "djinn-worker"),
                (self._answer, "djinn-asker"),
                (self._publish, "djinn-publisher"),
                (self.reader.run, "djinn-reader"),
            )
        ]
        for thread in self._threads:
            thread.start()
        current.listeners.append(self.changed)
        self.changed()

    # -- looking --------------------------------------------------------------------------

    def snapshot(self, *, fresh: bool = False) -> Snapshot:
        """The newest snapshot; fresh: one made after this call. Asks nothing of the server."""
        if fresh and not self._closed and threading.current_thread() not in self._threads:
            made: SimpleQueue[None] = SimpleQueue()
            self._wakes.put(made)
            with contextlib.suppress(Empty):
                made.get(timeout=1.0)
        return self._snapshot

    def subscribe(self, told: Told) -> Callable[[], None]:
        """Tell `told` every newer snapshot, on the publisher's thread; returns how to end that."""
        self._subscribers.append(told)
        self.reader.is_watched = True
        self.changed()

        def unsubscribe() -> None:
            with contextlib.suppress(ValueError):
                self._subscribers.remove(told)
            self.reader.is_watched = bool(self._subscribers)

        return unsubscribe

    def changed(self) -> None:
        """Something may look different: a new snapshot is made soon. Any thread."""
        self._wakes.put(None)
        self.reader.wake()

    @property
    def selection(self) -> Selection:
        """What the views look at together."""
        return self._selection

    def select(
        self,
        *,
        session: str | None = None,
        layer: Any = _UNCHANGED,
        head: Any = _UNCHANGED,
        token: Any = _UNCHANGED,
    ) -> None:
        """Choose a layer, a head, a token (absolute position) for all views; None: no choice.

        session: only if that is the current session; a click on what is no longer shown is dropped.
        Raises BadArgument for what the model or the session has not.
        """
        now = self._snapshot
        if session is not None and session != now.session_id:
            return
        wanted = {"layer": layer, "head": head, "token": token}
        given = {name: value for name, value in wanted.items() if value is not _UNCHANGED}
        for name, value in given.items():
            if value is not None and (type(value) is not int or value < 0):
                raise BadArgument(f"{name} is a whole number from 0, or None, not {value!r}")
        chosen = replace(self._selection, **given)
        if now.model is not None:
            _require_below(chosen.layer, now.model.num_layers, "layer", "the model")
            _require_below(chosen.head, now.model.num_heads, "head", "a layer")
        if now.session is not None:
            _require_below(chosen.token, now.session.num_tokens, "token", "the session")
        self._selection = replace(chosen, session_id=now.session_id)
        self.changed()

    # -- acting ---------------------------------------------------------------------------

    def do(
        self,
        label: str,
        code: str,
        run: Callable[[], Any],
        *,
        waits: bool = False,
    ) -> Future[Any]:
        """Carry out an action on a thread of the workbench; returns at once.

        code: the Python that repeats it, kept with it; empty: it is not recorded. run: calls the
        public API. waits: until a session rests or a model is loaded; it keeps no other action.
        An error becomes a notice, and is in the future.
        """
        future: Future[Any] = Future()
        number = next(self._numbers)
        if code:
            self.actions[number] = ActionBrief(
                number=number, label=label, code=code, outcome="running"
            )
        self.busy[number] = Busy(text=label, since_s=time.time(), can_pause=waits)
        self.changed()

        def carry_out() -> None:
            future.set_running_or_notify_cancel()
            self._run(number, run, future)

        if waits:
            threading.Thread(target=carry_out, name=f"djinn-run-{number}", daemon=True).start()
        else:
            self._work.put(carry_out)
        return future

    def _run(self, number: int, run: Callable[[], Any], future: Future[Any]) -> None:
        busy, action = self.busy[number], self.actions.get(number)

        def told(label: str, done: float, total: float, text: str) -> None:
            self.busy[number] = replace(busy, progress=_progress(label, done, total, text))
            self.changed()

        had, result, failure = self.notice, None, None
        try:
            with heard_by(told):
                result = run()
        except BaseException as error:  # a thread of ours has nobody else to tell
            failure = error
            self.notice = briefs.notice_of(error)
        else:
            if self.notice is had:  # it had nothing to say itself
                self.notice = None
        self.busy.pop(number, None)
        if action is not None:
            self.actions[number] = replace(
                action,
                outcome="done" if failure is None else "failed",
                error=None if failure is None or self.notice is None else self.notice.text,
            )
            for old in list(self.actions)[:-MOST_ACTIONS]:
                self.actions.pop(old, None)
        self.changed()
        if failure is None:
            future.set_result(result)
        else:
            future.set_exception(failure)

    def ask(self, key: str, run: Callable[[], Any], told: Answered) -> None:
        """Ask what only the newest answer matters of: a preview, a lens, a map. Never recorded.

        One question is under way at a time; of those that wait the newest of each key is kept.
        told: gets (answer, error) on the asker's thread; nobody is told of one that was dropped.
        """
        self._questions.put((key, run, told))

    def urgent(self, verb: str) -> dict[str, Any]:
        """Pause or stop waiting for the current session now, past every queue; from any thread.

        verb: "pause", at the next layer boundary, which is waited for; or "terminate". Returns
        `ok`, the session's `status` and `location`, and a `notice` where it was refused.
        """
        try:
            if verb not in ("pause", "terminate"):
                raise BadArgument(f"an urgent verb is 'pause' or 'terminate', not {verb!r}")
            session = self.current.need_session()
            if verb == "pause":
                return self._pause(session)
            # the bulk connection: the other one may be waiting for a lens
            message = m.Terminate(session_id=session.id)
            session.client.call(message, m.Terminated, timeout_s=URGENT_S, bulk=True)
            session.client.mirror.take(m.Event(seq=0, kind="terminated", session_id=session.id))
            return {"ok": True, "status": "terminated", "location": None, "notice": None}
        except DjinnError as error:
            self.notice = briefs.notice_of(error)
            return {"ok": False, "status": "", "location": None, "notice": self.notice}
        finally:
            self.changed()

    def _pause(self, session: Session) -> dict[str, Any]:
        client = session.client
        deadline = time.monotonic() + BOUNDARY_S
        with client.mirror.waiter(session.id) as waiter:
            message = m.Pause(session_id=session.id)
            info = client.call(message, m.SessionReply, timeout_s=URGENT_S, bulk=True).session
            client.mirror.update(info)
            while info.status == "running" and (left := deadline - time.monotonic()) > 0:
                waiter.next(left)
                info = client.mirror.newest(session.id) or info
        return {"ok": True, "status": info.status, "location": info.location, "notice": None}

    def arrived(self, found: Stopped | Finished | None) -> Stopped | Finished | None:
        """Bind what a run ended in as the notebook's `stop`."""
        self.current.bind("stop", found)
        return found

    def notify(self, notice: Notice | None) -> None:
        """Show a notice, or take it away."""
        self.notice = notice
        self.changed()

    def say(self, text: str) -> bool:
        """On a thread of the workbench: show a line as a notice. False on another."""
        if not threading.current_thread().name.startswith("djinn-"):
            return False
        self.notify(Notice(level="info", code="Note", text=text))
        return True

    @contextlib.contextmanager
    def connecting(self, address: str | None) -> Iterator[None]:
        """Show that a server is being connected, how far, and why it could not be."""

        def told(label: str, done: float, total: float, text: str) -> None:
            self.loading = _progress(label, done, total, text)
            self.changed()

        self.is_connecting, self.denied = True, None
        self.wanted_address = address or ""
        self.changed()
        of_cell = not threading.current_thread().name.startswith("djinn-")
        try:
            with heard_by(told, drawn=of_cell):
                yield
            self.notice = None
        except AccessDenied as error:
            self.denied, self.denied_beside = briefs.notice_of(error), self.current.server
            raise
        finally:
            self.is_connecting, self.loading = False, None
            self.changed()

    def close(self) -> None:
        """End the threads; the server and its sessions stay."""
        self._closed = True
        self._subscribers.clear()
        self._work.put(None)
        self._questions.put(None)
        self._wakes.put(None)
        self.reader.close()
        with contextlib.suppress(ValueError):
            self.current.listeners.remove(self.changed)

    @property
    def is_closed(self) -> bool:
        return self._closed

    # -- following ------------------------------------------------------------------------

    def follow(self, info: m.SessionInfo | None, num_layers: int) -> Selection:
        """The selection as far as there is what it names; it goes along when the session stops.

        The layer is that of the stop; the token stays while the forward does, as one steps.
        """
        chosen = self._selection
        if info is None:
            chosen = replace(chosen, session_id=None, token=None)
        else:
            if chosen.session_id != info.id:
                chosen, self._followed = Selection(session_id=info.id), None
            if info.stop is not None and self._followed != (info.id, info.stop.number):
                layer = briefs.layer_at(info.stop.location, num_layers)
                new_forward = self._followed is None or self._forward != info.stop.forward
                chosen = replace(
                    chosen,
                    layer=chosen.layer if layer is None else layer,
                    token=info.stop.end_token - 1 if new_forward else chosen.token,
                )
                self._followed, self._forward = (info.id, info.stop.number), info.stop.forward
            if chosen.token is not None and chosen.token >= len(info.tokens):
                chosen = replace(chosen, token=len(info.tokens) - 1)
        self._selection = chosen
        return chosen

    def adopt(self, session: Session) -> None:
        """Bind the stop of a run of this notebook's for which nobody waits any more."""
        info = session.newest
        key = (info.id, info.stop_number)
        if self._adopting == key or session.client.mirror.is_waited_for(info.id):
            return
        self._adopting = key

        def look() -> None:
            with contextlib.suppress(DjinnError):
                if self.current.session is session:
                    self.current.bind("stop", session.wait(timeout=URGENT_S))

        self._work.put(look)

    # -- the threads ----------------------------------------------------------------------

    def _carry_out(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def _answer(self) -> None:
        waiting: dict[str, tuple[Callable[[], Any], Answered]] = {}
        while not self._closed:
            while not waiting or not self._questions.empty():
                asked = self._questions.get()
                if asked is None:
                    return
                key, run, told = asked
                waiting.pop(key, None)  # the newest waits at the end
                waiting[key] = (run, told)
            run, told = waiting.pop(next(iter(waiting)))
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
            waiting = []
            with contextlib.suppress(Empty):
                waiting.append(self._wakes.get(timeout=TICK_S))
            with contextlib.suppress(Empty):
                while True:
                    waiting.append(self._wakes.get_nowait())
            if self._closed:
                return
            try:
                made = compose(self, self._snapshot)
            except Exception as error:  # shown, since nobody reads a log here
                made = replace(self._snapshot, notice=briefs.notice_of(error))
            if replace(made, rev=self._snapshot.rev) != self._snapshot:
                self._snapshot = replace(made, rev=self._snapshot.rev + 1)
                for told in list(self._subscribers):
                    with contextlib.suppress(Exception):  # as above
                        told(self._snapshot)
            for one in waiting:
                if one is not None:
                    one.put(None)
            time.sleep(PAUSE_S)


def _progress(label: str, done: float, total: float, text: str) -> ProgressBrief:
    share = max(0.0, min(1.0, done / total)) if total else None
    return ProgressBrief(text=f"{label}, {text}" if text else label, done=share)


def _require_below(value: int | None, count: int | None, what: str, owner: str) -> None:
    if value is not None and count is not None and value >= count:
        raise BadArgument(f"{what} {value}: {owner} has {count}, counted from 0")


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
