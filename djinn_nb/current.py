"""What the magics act on: the notebook's server, session and stop, and breakpoints to come.

The notebook's own variables come first, so magics and Python work on the same objects. A variable
of the user's that merely has one of these names is never overwritten.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from IPython.core.magic import Magics
from IPython.display import display
from traitlets import Bool

from djinn_nb.display import show_stop
from djinn_nb.handles import Breakpoint
from djinn_nb.progress import in_notebook
from djinn_nb.server import Server
from djinn_nb.session import Session
from djinn_nb.stopped import Finished, Stopped
from kernel_server.protocol.errors import NoServer, NotStopped, UnknownSession

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from djinn_nb.comm_bridge import CommBridge
    from djinn_nb.workbench import Workbench

#: Names that the magics bind in the notebook.
BOUND = ("server", "session", "stop")


@dataclass(frozen=True, slots=True)
class Pending:
    """A breakpoint that applies to the runs that follow."""

    location: str
    when: str = "any"
    condition: str | None = None
    ignore: int = 0
    once: bool = False

    def apply(self, session: Session) -> Breakpoint:
        """Set it in a session."""
        return session.break_at(
            self.location,
            when=self.when,
            condition=self.condition,
            ignore=self.ignore,
            once=self.once,
        )

    def describes(self, point: Breakpoint) -> bool:
        """Whether `point` came from it."""
        return (point.location, point.when, point.condition) == (
            self.location, self.when, self.condition,
        )  # fmt: skip


class Current(Magics):
    """The state behind the magics of one notebook."""

    bind_names = Bool(True, help="Bind `server`, `session` and `stop` in the notebook.").tag(
        config=True
    )

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self.names: dict[str, Any] = shell.user_ns
        self.pending: list[Pending] = []
        self.own: dict[str, Any] = dict.fromkeys(BOUND)
        self.opened: Server | None = None
        #: what panels and the sidebar share, once there is one
        self.bench: Workbench | None = None
        #: what tells the front end's extension, in a kernel
        self.bridge: CommBridge | None = None
        #: since when a cell runs, seconds of the monotonic clock
        self.cell_since_s: float | None = None
        #: called when the server, session or stop of the notebook has changed
        self.listeners: list[Callable[[], None]] = []
        self._told: set[str] = set()

    # -- what the magics act on -----------------------------------------------------------

    @property
    def server(self) -> Server | None:
        """The notebook's `server`, or the one connected last."""
        found = self._named("server", Server)
        return found if isinstance(found, Server) and not found.closed else None

    @property
    def session(self) -> Session | None:
        """The notebook's `session`, or the one launched last."""
        found = self._named("session", Session)
        return found if isinstance(found, Session) else None

    @property
    def stop(self) -> Stopped | None:
        """The notebook's `stop`, or the one shown last; the session may have moved since."""
        found = self._named("stop", Stopped)
        return found if isinstance(found, Stopped) else None

    def _named(self, name: str, kind: type) -> Any:
        mine = self.names.get(name)
        return mine if isinstance(mine, kind) else self.own[name]

    def need_server(self) -> Server:
        if (server := self.server) is None:
            raise NoServer("not connected: %djinn_connect first")
        return server

    def need_session(self) -> Session:
        if (session := self.session) is None:
            raise UnknownSession("no session yet: %%djinn_run a prompt, or %djinn_attach one")
        return session

    def need_stop(self) -> Stopped:
        session = self.need_session()
        found = self._named("stop", Stopped)
        if isinstance(found, Stopped) and found.session.id == session.id:
            return found  # the stop on the screen: if the session has moved, the server says so
        if (now := session.stop) is None:
            raise NotStopped(f"session {session.id} is {session.status}, not stopped")
        self.bind("stop", now)
        return now

    def bind(self, name: str, value: Any) -> None:
        """Bind a name in the notebook, unless it holds something of the user's own."""
        self.own[name] = value
        self._bind(name, value)
        self.tell_listeners()

    def _bind(self, name: str, value: Any) -> None:
        if not self.bind_names:
            return
        mine = self.names.get(name)
        if mine is not None and not isinstance(mine, (Server, Session, Stopped, Finished)):
            if name not in self._told:
                self._told.add(name)
                kind = type(mine).__name__
                self.say(
                    f"`{name}` is a variable of yours ({kind}) and is kept: use `djinn_{name}`"
                )
            self.names[f"djinn_{name}"] = value
            return
        self.names[name] = value

    def arrived(self, found: Stopped | Finished) -> None:
        """Bind and display what a run ended in."""
        self.bind("stop", found)
        if isinstance(found, Stopped):
            show_stop(found)
        elif in_notebook():
            display(found)  # type: ignore[no-untyped-call]
        else:
            print(found)

    def use_server(self, server: Server) -> None:
        """Make a server the notebook's; the one before is left, and its sessions stay with it."""
        self.disconnect()
        self.opened = server
        self.bind("server", server)
        for name in ("session", "stop"):
            self.own[name] = None
            if isinstance(self.names.get(name), (Session, Stopped, Finished)):
                self.names[name] = None

    def goes_on(self, session: Session) -> bool:
        """Whether a session can still meet a breakpoint."""
        try:
            return session.status in ("waiting", "running", "stopped")
        except UnknownSession:  # terminated, or its server is another one now
            return False

    def say(self, text: str) -> None:
        """Print a line; on a thread of the workbench, where no cell would show it, as a notice."""
        if self.bench is None or not self.bench.say(text):
            print(text)

    @contextmanager
    def connecting(self, address: str | None) -> Iterator[None]:
        """Around connecting: panels and the sidebar show how far the model is loaded."""
        if self.bench is None:
            yield
            return
        with self.bench.connecting(address):
            yield

    def runs_a_cell(self, *_: object) -> None:
        """A cell begins: IPython's `pre_run_cell`."""
        self.cell_since_s = time.monotonic()

    def ran_a_cell(self, *_: object) -> None:
        """A cell has ended: IPython's `post_run_cell`."""
        self.cell_since_s = None
        self.tell_listeners()

    def tell_listeners(self) -> None:
        """Anything may have changed."""
        for changed in list(self.listeners):
            changed()

    def close(self) -> None:
        """End the workbench; disconnect from the server that a magic or a click connected."""
        if self.bridge is not None:
            self.bridge.close()
            self.bridge = None
        if self.bench is not None:
            self.bench.close()
            self.bench = None
        self.disconnect()

    def disconnect(self) -> None:
        """Disconnect from that server; its sessions stay."""
        if self.opened is not None:
            self.opened.close()
            self.opened = None
