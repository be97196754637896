"""What happened to a session, told to its owner's clients."""

from __future__ import annotations

from typing import Literal

from kernel_server.protocol.messages.base import message
from kernel_server.protocol.messages.parts import SessionInfo


@message
class Event:
    """Something that happened to a session. `session` is None for progress and for terminated,
    and for a swap or going on where a later event of the same answer has it.

    `lease` warns that the session's lease ends in `remaining_s` seconds; at 0 it has ended: the
    session is `dormant` then, or `text` says why it cannot be.
    `durability` is about no session: `text` says why nothing is made durable, empty: it is again.
    """

    seq: int
    kind: Literal[
        "launched", "continued", "progress", "stopped", "finished", "failed", "terminated",
        "changed", "swapped", "durability", "lease",
    ]  # fmt: skip
    session_id: str
    session: SessionInfo | None = None
    #: of progress: tokens generated, of how many; during a prefill, layers done
    done: int = 0
    total: int = 0
    text: str = ""
    #: of a lease: seconds
    remaining_s: float | None = None
