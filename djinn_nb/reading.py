"""Fetching what snapshots need of the server, on a thread of its own: sessions, branches, memory.

It keeps the newest answers; a server that is slow or gone keeps nobody else from working.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from djinn_nb import briefs
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import DjinnError
from kernel_server.protocol.snapshot import MemoryBrief, NodeBrief, ProgressBrief, SwapBrief

if TYPE_CHECKING:
    from djinn_nb.client import Client
    from djinn_nb.current import Current

#: How often memory is asked for while somebody watches, the least time between two looks, and the
#: time until what could not be read is asked for again, seconds.
MEMORY_S, PAUSE_S, AGAIN_S = 2.0, 0.05, 0.5
#: Swaps shown.
MOST_SWAPS = 200


class Reader:
    """The newest answers about the notebook's server; `run` belongs to its thread."""

    def __init__(self, current: Current, changed: Callable[[], None]) -> None:
        self.is_watched = False
        self._current = current
        self._changed = changed
        self._wakes: SimpleQueue[None] = SimpleQueue()
        self._closed = False
        #: how far a server that took the place of another one has loaded its model
        self.loading: ProgressBrief | None = None
        self._failed = False
        self._client: Client | None = None
        #: (server, doubts) of the list of sessions that was read
        self._listed: tuple[str, int] | None = None
        self._branches: tuple[tuple[Any, ...], tuple[NodeBrief, ...]] = ((), ())
        self._memory: MemoryBrief | None = None
        self._memory_at = 0.0

    # -- what was read --------------------------------------------------------------------

    def is_listed(self, client: Client) -> bool:
        """Whether the sessions of the server that answers now have been listed."""
        listed = self._listed
        return (
            client is self._client
            and listed is not None
            and listed[0] == client.initialized.server_id
        )

    def branches(self, client: Client, session_id: str) -> tuple[NodeBrief, ...]:
        """The branch tree of a session, as read last."""
        key, nodes = self._branches
        return nodes if key[:2] == (client.initialized.server_id, session_id) else ()

    def memory(self, client: Client) -> MemoryBrief | None:
        """What the server holds, as read last."""
        return self._memory if client is self._client else None

    def forget_branches(self) -> None:
        """The tree has changed without the session moving."""
        key, nodes = self._branches
        self._branches = (key[:2], nodes)
        self._changed()

    # -- reading --------------------------------------------------------------------------

    def wake(self) -> None:
        """There may be something to read."""
        self._wakes.put(None)

    def close(self) -> None:
        self._closed = True
        self._wakes.put(None)
        self._watch(None)

    def run(self) -> None:
        """Read until closed."""
        while not self._closed:
            with contextlib.suppress(Empty):
                calm_s = MEMORY_S if self.is_watched else 30.0
                self._wakes.get(timeout=AGAIN_S if self._failed else calm_s)
                while True:
                    self._wakes.get_nowait()
            if self._closed:
                return
            server = self._current.server
            client = None if server is None else server.client
            self._watch(client)
            try:
                read = client is not None and client.trouble is None and self._read(client)
                self._failed = self.loading is not None
            except DjinnError:  # not now
                read, self._failed = False, True
            if read:
                self._changed()
            time.sleep(PAUSE_S)

    def _watch(self, client: Client | None) -> None:
        """Hear of the notebook's server, and of no other."""
        if client is self._client:
            return
        if self._client is not None:
            with contextlib.suppress(ValueError):
                self._client.mirror.listeners.remove(self._changed)
        self._listed, self._memory, self._memory_at, self.loading = None, None, 0.0, None
        self._client = client
        if client is not None:
            client.mirror.listeners.append(self._changed)
            self._changed()

    def _read(self, client: Client) -> bool:
        """Read what is out of date; True if anything was."""
        read = [self._read_model(client)]
        if self.loading is not None:
            return True
        read += [
            self._read_sessions(client),
            self._read_branches(client),
            self._read_memory(client),
        ]
        return any(read)

    def _read_model(self, client: Client) -> bool:
        if client.known_model is not None:
            return False
        found = client.initialize()  # another server has come
        if found.phase == "loading":
            self.loading = ProgressBrief(
                text=f"loading the model, {found.progress}", done=found.fraction
            )
            return True
        self.loading = None
        client.model  # noqa: B018 - kept by the client
        return True

    def _read_sessions(self, client: Client) -> bool:
        key = (client.initialized.server_id, client.mirror.num_doubts)
        if self._listed == key:
            return False
        before = {info.id for info in client.mirror.sessions()}
        client.mirror.listed(client.call(m.ListSessions(), m.Sessions).sessions, before)
        self._listed = key
        return True

    def _read_branches(self, client: Client) -> bool:
        session = self._current.session
        if session is None or session.client is not client:
            return False
        info = session.newest
        key = (client.initialized.server_id, info.id, info.stop_number, info.revision)
        if self._branches[0] == key or info.status == "running" or client.mirror.is_gone(info.id):
            return False
        nodes = client.call(m.ListBranches(session_id=session.id), m.Branches).nodes
        self._branches = (key, briefs.node_briefs(nodes))
        return True

    def _read_memory(self, client: Client) -> bool:
        if not self.is_watched or time.monotonic() - self._memory_at < MEMORY_S:
            return False
        self._memory_at = time.monotonic()
        rows = client.call(m.DescribeMemory(), m.MemoryReply).rows
        swaps = [
            SwapBrief(time_s=time_s, session_id=session_id, nbytes=nbytes, text=text)
            for time_s, session_id, nbytes, text in client.mirror.swaps.newest(MOST_SWAPS)
        ]
        found = briefs.memory_brief(rows, swaps)
        if found == self._memory:
            return False
        self._memory = found
        return True
