"""Edits of a session that has not begun: they lie ahead, at a location that has to be named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from djinn_nb.edits import Editing
from djinn_nb.handles import Edit
from djinn_nb.stopped import Finished, Stopped
from kernel_server.protocol.errors import BadEdit, NotStopped

if TYPE_CHECKING:
    from djinn_nb.session import Session


class _Start(Editing):
    """Where a session waits before its first forward: no values, but edits may lie ahead."""

    def __init__(self, session: Session, number: int) -> None:
        self.session = session
        self._number = number

    @property
    def number(self) -> int:
        return self._number

    @property
    def location(self) -> str:
        raise BadEdit(
            f"session {self.session.id} has not begun, so say where to edit: location=16, or a name"
            " such as 'layers.3.middle'"
        )

    def __repr__(self) -> str:
        return f"session {self.session.id}, not begun"


def edit(where: Session | Stopped, **change: Any) -> Edit:
    """Edit at a stop, or in a session where it stands: stopped, or waiting to begin.

    change: as of `Stopped.edit`; a session that waits needs `location`. Raises what that raises,
    and NotStopped.

        edit(session, add=vector, location=16, sticky=True)
    """
    if isinstance(where, Finished):
        raise NotStopped(f"session {where.session.id} is finished: go back, or launch again")
    if isinstance(where, Stopped):
        return where.edit(**change)
    stop = where.stop
    if stop is not None:
        return stop.edit(**change)
    if where.newest.status != "waiting":
        raise NotStopped(
            f"session {where.id} is {where.newest.status}: edit it at a stop, or before it begins",
            status=where.newest.status,
        )
    return _Start(where, where.newest.stop_number).edit(**change)
