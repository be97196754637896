"""What a connection was told of pages that moved between tiers. It keeps; it asks nothing."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from kernel_server.protocol import messages as m

if TYPE_CHECKING:
    import pandas as pd


class Swaps:
    """The swaps that events have told of, the newest ones.

    most: how many are kept.
    """

    def __init__(self, most: int = 10_000) -> None:
        self._kept: deque[tuple[float, str, int, str]] = deque(maxlen=most)

    def take(self, event: m.Event, now: float) -> None:
        """Keep what an event tells, if it is of a swap. now: seconds of this process's clock."""
        if event.kind == "swapped":
            self._kept.append((now, event.session_id, event.done, event.text))

    def newest(self, most: int) -> list[tuple[float, str, int, str]]:
        """The newest ones, oldest first: (seconds since the epoch, session, bytes, text)."""
        return list(self._kept)[-most:]

    def frame(self) -> pd.DataFrame:
        """One row each, oldest first: time, session, bytes, text."""
        import pandas as pd

        table = pd.DataFrame(list(self._kept), columns=["time", "session", "bytes", "text"])
        table["time"] = pd.to_datetime(table["time"], unit="s", utc=True)
        return table.astype({"bytes": "int64"})
