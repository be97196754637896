"""Logpoints as the user holds them: the records fetched so far, as a table and as arrays.

The server keeps the records and numbers them, so whoever asks for those after the last he has
misses none. Files are written and read in `log_files`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from djinn_nb.checks import flag, whole
from djinn_nb.client import COMPUTE_S
from djinn_nb.handles import Breakpoint
from djinn_nb.log_files import MAX_BYTES, LogStream, SavedLog, read
from djinn_nb.log_rows import COLUMNS, LoggedTensor, noted, rows_of, tensors_of
from kernel_server.protocol import messages as m

if TYPE_CHECKING:
    import pandas as pd

    from djinn_nb.session import Session

__all__ = ["LoggedTensor", "Logpoint", "SavedLog", "read"]


class Logpoint(Breakpoint):
    """Notes what it finds without stopping; made by `session.log_at()`.

    log = session.log_at([3, 7], what="tensor", tokens=-1)
    session.continue_()
    log.frame()
    """

    def __init__(self, session: Session, info: m.BreakpointInfo) -> None:
        super().__init__(session, info)
        self._records: list[m.LogRecord] = []
        self._last_seq = 0
        self._fetching = threading.Lock()

    @property
    def what(self) -> str:
        """`summary` or `tensor`."""
        return self._last.what

    @property
    def dropped(self) -> int:
        """Records that were lost because the log was full."""
        return self._session.refreshed(self).info.dropped

    def records(self) -> list[m.LogRecord]:
        """All records so far, the oldest first; only new ones are fetched.

        Works while the session runs, and after it is finished.
        """
        with self._fetching:
            while True:
                reply = self._fetch(self._last_seq)
                self._records += reply.records
                if reply.records:
                    self._last_seq = reply.records[-1].seq
                if not reply.records or self._last_seq >= reply.last_seq:
                    break
            self._session.warn_of_lost_records(self.id, reply.dropped)
            return list(self._records)

    def frame(self) -> pd.DataFrame:
        """One row per record and token: forward, location, position, token (its text), token_id,
        norm (L2), largest (magnitude) and num_nan.

            log.frame().groupby("location")["norm"].mean()
        """
        import pandas as pd

        return pd.DataFrame(rows_of(self.records(), self._texts), columns=COLUMNS)

    def tensors(self) -> dict[str, LoggedTensor]:
        """The rows noted at each location, in the order they came; empty for a summary.

        log.tensors()["layers.3.output"].values     # [rows, hidden]
        """
        return tensors_of(noted(self.records()))

    def stream(
        self, folder: str | Path, *, max_bytes: int = MAX_BYTES, release: bool = False
    ) -> LogStream:
        """Write the records to a folder of this computer while the session runs, or afterwards.

        Goes on after what the folder already holds, so an interrupted stream is resumed by calling
        it again; a torn file is written anew. max_bytes: of the folder. release: let the server
        free what is safe on disk, so that a long run does not fill the log; then no other client
        gets those records.

        Raises BadArgument when the folder holds another log; QuotaExceeded when it is full.

            with log.stream("run-1"):
                session.continue_()
            djinn_nb.logs.read("run-1").frame
        """
        info = self._last
        model = self._session.client.model
        header = {
            "server_id": self._session.client.initialized.server_id,
            "session": self._session.id,
            "logpoint": info.id,
            "locations": list(info.locations),
            "what": info.what,
            "condition": info.condition,
            "when": info.when,
            "model": model.name,
            "weights": str(model.fingerprint.get("weights", "")),
        }
        return LogStream(
            self._fetch,
            self._texts,
            Path(folder).expanduser(),
            header,
            max_bytes=whole(max_bytes, "max_bytes", least=1),
            release=flag(release, "release"),
        )

    def _fetch(self, after: int, release: bool = False) -> m.LogReply:
        message = m.ReadLog(
            session_id=self._session.id, breakpoint_id=self.id, after=after, release=release
        )
        return self._session.client.call(message, m.LogReply, timeout_s=COMPUTE_S, bulk=True)

    def _texts(self, token_ids: Sequence[int]) -> list[str]:
        return self._session.client.token_texts(token_ids)


def lost_records(session: str, logpoint: int, dropped: int) -> None:
    """Say once that a log was full."""
    lost = "1 record" if dropped == 1 else f"{dropped} records"
    warnings.warn(
        f"logpoint {logpoint} of session {session} is full and has lost {lost} so far: stream it"
        " with release=True, or set one with more max_bytes",
        stacklevel=3,
    )
