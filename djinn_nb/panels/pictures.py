"""What the views of numbers share: one stop at a time, read on the asker's thread, drawn elsewhere.

A `Picture` turns snapshots and a person's moves into plain values (`shown`, for whatever draws it)
and questions to the server. It knows no widgets, so that it is tested without a browser; what is
read, and how it looks, is decided by its subclasses and the scripts in `static/`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from djinn_nb import briefs, verbs
from djinn_nb.stopped import Stopped
from djinn_nb.workbench import Workbench
from kernel_server.protocol.errors import BadArgument, DjinnError, StaleStop
from kernel_server.protocol.snapshot import Snapshot

#: Told of a part that is new: its name (a trait of the canvas), and its plain values.
Told = Callable[[str, dict[str, Any]], None]
#: Told of a message that only concerns what is visible, and of its buffers.
Sent = Callable[[dict[str, Any], list[bytes]], None]


class Picture:
    """Values of the current stop, and what a person may do with them.

    `shown`: `state` is "empty", "reading", "ready" or "refused", with a `text` that says why.
    `marks`: the selection and other small values; `reading`: what is shown is being replaced.
    """

    #: verbs that its messages may perform
    verbs: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, bench: Workbench, told: Told | None = None, sent: Sent | None = None
    ) -> None:
        self.bench = bench
        self.told: Told = told or (lambda name, values: None)
        self.sent: Sent = sent or (lambda message, buffers: None)
        self.shown: dict[str, Any] = {"state": "empty", "text": empty_text(bench.snapshot())}
        self.marks: dict[str, Any] = {}
        self._key: tuple[Any, ...] | None = None
        self._lock = threading.RLock()

    # -- following ------------------------------------------------------------------------

    def follow(self, snapshot: Snapshot) -> None:
        """Bring the picture up to date; on the publisher's thread. Asks only if values are new."""
        with self._lock:
            self._mark(**self.marks_of(snapshot))
            stop = self.stop_of(snapshot)
            if stop is None:
                self._key = None
                self._mark(reading=False)
                self.show({"state": "empty", "text": empty_text(snapshot)})
                return
            key = (*version_of(stop), *self.wish_of(snapshot))
            if key == self._key:
                return
            self._key = key
            if self.shown["state"] != "ready":
                self.show({"state": "reading", "text": "reading the stop …"})
            self._mark(reading=True)
            self.changed(key)
            self.bench.ask(
                f"{type(self).__name__} {id(self)}",
                lambda: self.read(stop, key),
                lambda found, error: self._answered(key, found, error),
            )

    def _answered(
        self, key: tuple[Any, ...], found: dict[str, Any] | None, error: BaseException | None
    ) -> None:
        with self._lock:
            if key != self._key:
                return  # the session has moved on, and what is newer is on its way
            self._mark(reading=False)
            if error is None:
                assert found is not None
                self.show({"state": "ready", "text": "", "version": version_text(key), **found})
                return
            if not isinstance(error, StaleStop):
                self.show({"state": "refused", "text": briefs.notice_of(error).text})
                return
            self._key = None  # the snapshot to come has the newer stop

    def _mark(self, **values: Any) -> None:
        marks = {**self.marks, **values}
        if marks != self.marks:
            self.marks = marks
            self.told("marks", marks)

    def show(self, values: dict[str, Any]) -> None:
        """Put other values in place of those shown."""
        if values != self.shown:
            self.shown = values
            self.told("shown", values)

    def stop_of(self, snapshot: Snapshot) -> Stopped | None:
        """The notebook's stop, if its session stands there now."""
        stop, session = self.bench.current.stop, snapshot.session
        if snapshot.connection != "ready" or session is None or session.status != "stopped":
            return None
        try:
            here = stop is not None and stop.session.id == session.id
        except DjinnError:  # of a server that was replaced
            return None
        return stop if here and stop is not None and stop.number == session.stop_number else None

    # -- what a subclass decides ----------------------------------------------------------

    def wish_of(self, snapshot: Snapshot) -> tuple[Any, ...]:
        """What else, besides the stop, decides the values: they are read anew when it changes."""
        return ()

    def marks_of(self, snapshot: Snapshot) -> dict[str, Any]:
        """Small values that change often: the selection, and what can be done."""
        chosen = snapshot.selection
        return {
            "layer": chosen.layer,
            "head": chosen.head,
            "token": chosen.token,
            # those of the session; where it has none, those of the runs that follow
            "breakpoints": [one.location for one in snapshot.breakpoints if one.enabled]
            or [one.location for one in snapshot.pending],
            "can": list(snapshot.can),
        }

    def changed(self, key: tuple[Any, ...]) -> None:
        """Values are about to be read anew: forget what was kept of the old ones."""

    def read(self, stop: Stopped, key: tuple[Any, ...]) -> dict[str, Any]:
        """The values, by the public API; on the asker's thread."""
        raise NotImplementedError

    def heard(self, message: Mapping[str, Any]) -> None:
        """Another message than those that every picture knows."""
        raise BadArgument(f"there is no message {message.get('type')!r}")

    # -- acting ---------------------------------------------------------------------------

    def take(self, message: object) -> None:
        """What a person did: choose, act, or ask for what is visible; any thread, returns at once.

        A refusal becomes a notice.
        """
        try:
            if not isinstance(message, Mapping):
                raise BadArgument("a message of a panel is a mapping")
            if message.get("type") == "select":
                chosen = {n: message[n] for n in ("layer", "head", "token") if n in message}
                self.bench.select(**chosen)
            elif message.get("type") == "do":
                self._do(message)
            else:
                self.heard(message)
        except DjinnError as error:
            self.bench.notify(briefs.notice_of(error))

    def _do(self, message: Mapping[str, Any]) -> None:
        verb, given = message.get("verb"), message.get("given", {})
        if verb not in self.verbs or not isinstance(given, Mapping):
            raise BadArgument(f"this panel does {', '.join(self.verbs)}, not {verb!r}")
        verbs.perform(self.bench, verb, **given)


def version_of(stop: Stopped) -> tuple[str, int, int]:
    """Tells the values at one stop from those at another, and from those after an edit."""
    session = stop.session
    return session.id, stop.number, session.client.mirror.values_version(session.id)


def version_text(key: tuple[Any, ...]) -> str:
    """The same for a script, which names it in what it asks for."""
    return " ".join(map(str, key))


def layer_of(snapshot: Snapshot) -> int:
    """The layer that a picture of one layer is of: the one chosen, else that of the stop."""
    chosen, session, model = snapshot.selection.layer, snapshot.session, snapshot.model
    if chosen is not None:
        return chosen
    assert session is not None and model is not None
    if session.layer is not None:
        return session.layer
    return 0 if session.location == "embedding" else model.num_layers - 1


def empty_text(snapshot: Snapshot) -> str:
    """Why there is nothing to draw, and what to do."""
    session = snapshot.session
    if snapshot.connection != "ready":
        return "not connected: press Connect in the panel of sessions, or run %djinn_connect"
    if session is None:
        return "no session yet: launch a prompt with a breakpoint set, or run %%djinn_run"
    if session.status == "running":
        return f"session {session.id} is running: it is drawn where it stops; Pause stops it now"
    if session.status == "finished":
        return (
            f"session {session.id} is finished: go back to one of its stops in the panel of"
            " branches, or launch again with a breakpoint"
        )
    if session.status == "failed":
        return f"session {session.id} has failed: {session.error or 'launch again'}"
    if session.status == "waiting":
        return f"session {session.id} has not begun: set a breakpoint and press Continue"
    return f"session {session.id} stands where this notebook has not looked: press Look again"
