"""How many bytes of one kind each owner holds, against one limit for all of them.

Bookkeeping only: integers by owner. What is counted, and what becomes of bytes that are refused, is
decided by whoever holds them.
"""

from __future__ import annotations

from kernel_server.protocol.errors import QuotaExceeded


class OwnerBytes:
    """Bytes of one kind by owner; one who would hold more than the limit is refused.

    what: the kind, in words for messages. limit_bytes: of each owner; None: no limit.
    then: the next move of somebody who is refused. Not safe to use from two threads at once.

        captures = OwnerBytes("captures", 1 << 30, "remove a capture")
        captures.take("ann", 4096)
        captures.give_back("ann", 4096)
    """

    def __init__(self, what: str, limit_bytes: int | None, then: str) -> None:
        self.what = what
        self.limit_bytes = limit_bytes
        self._then = then
        self._held: dict[str, int] = {}

    def held(self, owner: str) -> int:
        """Bytes this owner holds now."""
        return self._held.get(owner, 0)

    def require(self, owner: str, nbytes: int) -> None:
        """Raise `QuotaExceeded` unless the owner may hold `nbytes` more."""
        require_room(self.what, self.held(owner), nbytes, self.limit_bytes, self._then)

    def take(self, owner: str, nbytes: int) -> None:
        """Count `nbytes` more, or raise `QuotaExceeded` and count none."""
        assert nbytes >= 0, f"{nbytes} bytes of {self.what} cannot be taken"
        self.require(owner, nbytes)
        if nbytes:
            self._held[owner] = self.held(owner) + nbytes

    def give_back(self, owner: str, nbytes: int) -> None:
        """Count `nbytes` less."""
        left = self.held(owner) - nbytes
        assert nbytes >= 0 and left >= 0, f"{owner} gives back more {self.what} than were taken"
        if left:
            self._held[owner] = left
        else:
            self._held.pop(owner, None)


def require_room(what: str, held: int, more: int, limit: int | None, then: str) -> None:
    """Raise `QuotaExceeded` unless `more` bytes beside the `held` ones stay within `limit`."""
    if limit is None or held + more <= limit:
        return
    raise QuotaExceeded(
        f"{size(more)} of {what} do not fit: you hold {size(held)}, the limit of one owner is"
        f" {size(limit)}; {then}",
        needed=more,
        have=held,
        limit=limit,
    )


def size(nbytes: int) -> str:
    """Bytes for a message.

    >>> size(3 << 20)
    '3.0 MiB'
    """
    return f"{nbytes} bytes" if nbytes < 1 << 20 else f"{nbytes / 2**20:.1f} MiB"
