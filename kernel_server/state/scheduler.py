"""Whose turn it is: runnable sessions, round robin by owner, then by session. No clock.

An owner with a hundred runnable sessions gets as many turns as an owner with one. How long a turn
is, and whether a running stretch is interrupted for the next, is decided by the caller.
"""

from __future__ import annotations

from collections import deque


class Scheduler:
    """A queue of runnable sessions."""

    def __init__(self) -> None:
        #: owner -> runnable session ids in order, as the keys of a dict; never empty
        self._queues: dict[str, dict[str, None]] = {}
        self._turns: deque[str] = deque()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, owner: str, session_id: str, *, first: bool = False) -> None:
        """Queue a session behind its owner's others, or `first` of all."""
        queue = self._queues.get(owner)
        if queue is None:
            queue = self._queues[owner] = {}
            if not first:
                self._turns.append(owner)
        elif first:
            self._turns.remove(owner)
        assert session_id not in queue, f"{session_id} is queued twice"
        if first:
            self._queues[owner] = {session_id: None, **queue}
            self._turns.appendleft(owner)
        else:
            queue[session_id] = None

    def remove(self, owner: str, session_id: str) -> bool:
        """Take a session out of the queue; False when it was not in it."""
        queue = self._queues.get(owner)
        if queue is None or session_id not in queue:
            return False
        del queue[session_id]
        if not queue:
            del self._queues[owner]
            self._turns.remove(owner)
        return True

    def next(self) -> str | None:
        """Take the session whose turn it is out of the queue."""
        if not self._turns:
            return None
        owner = self._turns.popleft()
        queue = self._queues[owner]
        session_id = next(iter(queue))
        del queue[session_id]
        if queue:
            self._turns.append(owner)
        else:
            del self._queues[owner]
        return session_id

    def queued(self) -> list[str]:
        """Ids of all queued sessions, by owner."""
        return [session_id for queue in self._queues.values() for session_id in queue]

    def check(self) -> None:
        """Assert that every owner with a queue has one turn, and the others none."""
        assert sorted(self._turns) == sorted(self._queues), "turns and queues differ"
        assert all(self._queues.values()), "an owner has an empty queue"
