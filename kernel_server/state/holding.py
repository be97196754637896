"""What sessions hold of the device beside their pages, and what is kept of stops that they left.

What a session needs to go on is never dropped. Where the device is capped, a session is made, sent
back or looked into only if what it may come to hold fits beside the others, so that those that were
let in can go on. What is kept of stops that sessions left takes no more than its budget, nor than
the others leave of the cap: the stops that were left longest ago, of all sessions, lose their
tensors first, which are computed again when somebody goes back (`branching`). What forks share of a
stop counts once. Sizes are bounds, computed in `tensor_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kernel_server.protocol.errors import OutOfDeviceMemory
from kernel_server.protocol.location import NOT_STARTED
from kernel_server.state.branches import Cursor, KeptStop
from kernel_server.state.instructions import DropNodes, KeepTensors
from kernel_server.state.paging import Paging
from kernel_server.state.quotas import size
from kernel_server.state.sessions import Session
from kernel_server.state.tensor_bytes import needed_at, standing_bytes, stop_bytes


class Holding(Paging):
    """Counts the tensors of sessions, and keeps those of stops as long as there is room."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        #: of all sessions, in the order they were left
        self.kept_stops: dict[int, KeptStop] = {}
        self.kept_bytes = 0
        self._stops_kept = 0

    # -- what sessions need to go on ------------------------------------------------------------

    def standing_bytes(self) -> int:
        """Bytes at most of the tensors that sessions hold or come to hold as they go on."""
        # a list: whoever asks where the memory is asks from another thread
        return sum(standing_bytes(self.shape, session) for session in list(self.sessions.values()))

    def require_tensors(self, more: int, what: str) -> None:
        """Raise `OutOfDeviceMemory` unless `more` bytes of tensors fit beside those of the sessions
        there are; what: who would hold them, in words for the message."""
        most = self.limits.tensor_bytes
        if most is None or more <= 0:
            return
        have = self.standing_bytes()
        if have + more <= most:
            return
        raise OutOfDeviceMemory(
            f"{what} needs up to {size(more)} of the device beside its pages, and sessions up to"
            f" {size(have)} of the {size(most)} that --device-memory leaves for that: terminate a"
            " session, or start the server with more --kept-memory",
            needed=more,
            have=have,
            limit=most,
        )

    def require_place(self, session: Session, start: int, place: Cursor) -> None:
        """Raise `OutOfDeviceMemory` unless the session may go to a place, by running from the
        beginning of the forward `start` on."""
        if self.limits.tensor_bytes is None:
            return
        forward, point = place
        ways = (needed_at(self.shape, session, *way) for way in ((start, NOT_STARTED), place))
        more = max(ways) - standing_bytes(self.shape, session)
        there = "the start" if point == NOT_STARTED else self.location(point)
        self.require_tensors(more, f"going to {there} of forward {forward}")

    # -- what is kept of stops that were left -----------------------------------------------------

    def kept_room(self) -> int:
        """Bytes that kept stops may take now, of all sessions together."""
        limits = self.limits
        if limits.tensor_bytes is None:
            return limits.kept_bytes
        return max(0, min(limits.kept_bytes, limits.tensor_bytes - self.standing_bytes()))

    def can_keep(self, session: Session) -> bool:
        """Whether what the session holds where it stands may be kept when it goes."""
        return self._may_be_kept(stop_bytes(self.shape, session))

    def _may_be_kept(self, nbytes: int) -> bool:
        return nbytes <= min(self.limits.kept_bytes_per_session, self.limits.kept_bytes)

    def keep_stop(self, session: Session, node: int) -> None:
        """Keep what the session holds at a node that it leaves, if it may be; the last one to
        go."""
        kept = session.tree.kept.pop(node, None)
        if kept is None:
            nbytes = stop_bytes(self.shape, session)
            if not self._may_be_kept(nbytes):
                return
            self._stops_kept += 1
            kept = KeptStop(self._stops_kept, node, nbytes, {session.id: None})
            self.kept_bytes += nbytes
            self.emit(KeepTensors(session_id=session.id, node=node))
        session.tree.kept[node] = kept
        self.kept_stops.pop(kept.id, None)
        self.kept_stops[kept.id] = kept

    def share_kept(self, child: Session) -> None:
        """A fork holds what its tree names."""
        for kept in child.tree.kept.values():
            kept.holders[child.id] = None

    def forget_kept(self, session: Session, nodes: Iterable[int]) -> list[int]:
        """Count what is kept of these nodes as the session's no more; returns those it was."""
        gone = []
        for node in nodes:
            kept = session.tree.kept.pop(node, None)
            if kept is None:
                continue
            gone.append(node)
            del kept.holders[session.id]
            if not kept.holders:
                del self.kept_stops[kept.id]
                self.kept_bytes -= kept.nbytes
        return gone

    def drop_kept(self, session: Session, nodes: Iterable[int]) -> None:
        """Let nodes of a session lose their tensors."""
        if gone := self.forget_kept(session, sorted(nodes)):
            self.emit(DropNodes(session_id=session.id, nodes=tuple(gone)))

    def keep_to_room(self) -> None:
        """Let the stops that were left longest ago lose their tensors, while too much is kept."""
        if not self.kept_stops:
            return
        room = self.kept_room()
        while self.kept_bytes > room:
            kept = next(iter(self.kept_stops.values()))
            for holder in tuple(kept.holders):
                self.drop_kept(self.sessions[holder], (kept.node,))

    def check_kept(self) -> None:
        """Assert that what is kept is counted once, by all that hold it, and is within bounds."""
        assert self.kept_bytes == sum(kept.nbytes for kept in self.kept_stops.values())
        room = self.kept_room()
        assert self.kept_bytes <= room, f"{self.kept_bytes} bytes are kept, room is for {room}"
        held: dict[int, set[str]] = {}
        for session in self.sessions.values():
            for node, kept in session.tree.kept.items():
                assert kept.node == node, f"{session.id} holds node {kept.node} as {node}"
                held.setdefault(kept.id, set()).add(session.id)
        assert held == {number: set(kept.holders) for number, kept in self.kept_stops.items()}
