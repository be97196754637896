"""Names that are promised and not here yet: using one says so, instead of an AttributeError.

One table; the classes inherit `Planned` and know nothing of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernel_server.protocol.errors import NotSupported

#: class -> name -> what it will do, and what to use today
PLANNED: dict[str, dict[str, str]] = {
    "Server": {},
    "Session": {},
    "Stopped": {},
}


class Planned:
    """Gives a planned name of the class a typed error; any other unknown name is as usual."""

    # hidden from type checkers, which are to go on reporting misspelt names
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            owner = type(self).__name__
            if (what := PLANNED.get(owner, {}).get(name)) is not None:
                raise NotSupported(f"{owner}.{name} is planned, not in this version: {what}")
            raise AttributeError(f"{owner!r} object has no attribute {name!r}")
